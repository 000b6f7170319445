// The instruction sets this build has, the ones this CPU runs, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace lowrank {

// The kernels in use for activations of `dtype`.
const Kernels& kernels(Dtype dtype);

std::string isa();                         // the name in use: the best this CPU runs, or LOWRANK_FAST_CPU_ISA
std::vector<std::string> isas();           // those this CPU has the instructions of, lowest first
std::vector<std::string> testable_isas();  // and `amx` where oneDNN runs the same kernels on AVX-512 bf16, for testing
void set_isa(const std::string& name);     // one of testable_isas(); else throws std::invalid_argument, naming them

}  // namespace lowrank
