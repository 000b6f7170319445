// The kernels for the instruction set `baseline`: 4 floats to a register.
#define LOWRANK_LANES 4
#include "kernels_impl.h"

namespace lowrank {
extern const Kernels kernels_baseline[3];
const Kernels kernels_baseline[3] = {table<F32>(), table<BF16>(), table<F16>()};
}  // namespace lowrank
