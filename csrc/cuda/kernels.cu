// All kernels and launch plans for one architecture. Compiled once per architecture with -DLOWRANK_ARCH=sm_80 (the
// namespace, so that the copies do not meet at link time) and -gencode for that architecture alone; see
// lowrank_fast/cuda_build.py.
#include "routed_plan.cuh"

#define LOWRANK_PASTE(a, b) a##b
#define LOWRANK_TABLE_NAME(arch) LOWRANK_PASTE(lowrank_table_, arch)

// The entry that cuda_ops.cpp finds by name.
extern "C" const lowrank::KernelTable* LOWRANK_TABLE_NAME(LOWRANK_ARCH)() {
  namespace kernels = lowrank::LOWRANK_ARCH;
  static const lowrank::KernelTable table = {kernels::forward, kernels::backward, kernels::routed_forward,
                                             kernels::routed_backward};
  return &table;
}
