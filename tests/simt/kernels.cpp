// The kernels and launch plans of csrc/cuda, compiled for the harness, with a C interface for Python.
#define LOWRANK_ARCH simt_host
#include "routed_plan.cuh"

namespace kernels = lowrank::LOWRANK_ARCH;

extern "C" {

// 1: the sm_90 forms where they apply; 0: the sm_80 forms.
void lowrank_use_clusters(int on) { kernels::use_clusters = on != 0; }

size_t lowrank_forward(const lowrank::ForwardArgs* a, void* workspace, int* error) {
  return kernels::forward(*a, workspace, nullptr, error);
}
size_t lowrank_backward(const lowrank::BackwardArgs* a, void* workspace, int* error) {
  return kernels::backward(*a, workspace, nullptr, error);
}
size_t lowrank_routed_forward(const lowrank::RoutedArgs* a, void* workspace, int* error) {
  return kernels::routed_forward(*a, workspace, nullptr, error);
}
size_t lowrank_routed_backward(const lowrank::RoutedArgs* a, void* workspace, int* error) {
  return kernels::routed_backward(*a, workspace, nullptr, error);
}

}  // extern "C"
