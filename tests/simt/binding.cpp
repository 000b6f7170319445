// The torch bindings of csrc/cuda on the CPU: they think they launch on a GPU, and the SIMT harness runs the kernels.
//
// Stands in for cuda_device.cpp. Every tensor that a launch names is declared to the harness with its exact extent, so
// a wrong stride or size in a binding is found like a wrong index in a kernel; findings come back as a failed launch.
#include <torch/extension.h>

#include <chrono>
#include <string>

#include "cuda_ops.cpp"  // one translation unit: torch's headers are most of the work
#include "cuda_routed_ops.cpp"

extern "C" {
size_t lowrank_forward(const lowrank::ForwardArgs*, void*, int*);
size_t lowrank_backward(const lowrank::BackwardArgs*, void*, int*);
size_t lowrank_routed_forward(const lowrank::RoutedArgs*, void*, int*);
size_t lowrank_routed_backward(const lowrank::RoutedArgs*, void*, int*);
void simt_reset(uint64_t seed, double preempt);
void simt_buffer(const char* name, void* base, size_t rows, size_t row_bytes, size_t stride, int writable,
                 int initialised);
const char* simt_findings();
}

namespace lowrank {
namespace {

bool runs = true;  // false: a launch returns at once
std::string findings;
int64_t launches = 0;

enum Access { kRead, kWrite, kUpdate };

void declare_bytes(const char* name, const void* data, int64_t rows, int64_t row_bytes, int64_t stride, Access access) {
  if (!data || rows == 0 || row_bytes == 0) return;
  if (stride < row_bytes) {  // expanded, or one row
    row_bytes += (rows - 1) * stride;
    rows = 1;
    stride = row_bytes;
  }
  simt_buffer(name, const_cast<void*>(data), rows, row_bytes, stride, access != kRead, access != kWrite);
}
void declare(const char* name, const Rows& t, int64_t tokens, int64_t d, int size, Access access) {
  declare_bytes(name, t.data, tokens, d * size, t.stride * size, access);
}
template <class F>
void declare_factor(const char* name, const F& f, int64_t rank, int64_t n, int element, Access access) {
  if (!f.data) return;
  const int64_t size = f.wide ? 4 : element, groups = rank > f.group ? rank / f.group : 1;
  const int64_t reach = (groups - 1) * f.group_stride + (rank / groups - 1) * f.rank_stride + (n - 1) * f.n_stride + 1;
  declare_bytes(name, f.data, 1, reach * size, reach * size, access);
}
void floats_of(const char* name, const float* data, int64_t count, Access access) {
  declare_bytes(name, data, 1, 4 * count, 4 * count, access);
}
int size_of(int32_t dtype) { return dtype == kF32 ? 4 : 2; }
void seed_of(const Dropout& dropout) { declare_bytes("seed", dropout.seed, 1, 16, 16, kRead); }

void declare_all(const ForwardArgs& a) {
  const int e = size_of(a.dtype);
  const bool in_place = a.out.data && a.out.data == a.y.data;
  declare("x", a.x, a.tokens, a.d_in, e, kRead);
  if (!in_place) declare("y", a.y, a.tokens, a.d_out, e, kRead);
  declare("out", a.out, a.tokens, a.d_out, e, in_place ? kUpdate : kWrite);
  declare_factor("A", a.A, a.rank, a.d_in, e, kRead);
  declare_factor("B", a.B, a.rank, a.d_out, e, kRead);
  floats_of("t", a.t_in, a.tokens * a.rank, kRead);
  floats_of("t", a.t_out, a.tokens * a.rank, kWrite);
  seed_of(a.dropout);
}
void declare_all(const BackwardArgs& a) {
  const int e = size_of(a.dtype);
  declare("g", a.g, a.tokens, a.d_out, e, kRead);
  if (a.x.data != a.g.data) declare("x", a.x, a.tokens, a.d_in, e, kRead);
  declare("dx", a.dx, a.tokens, a.d_in, e, kWrite);
  declare_factor("A", a.A, a.rank, a.d_in, e, kRead);
  declare_factor("B", a.B, a.rank, a.d_out, e, kRead);
  declare_factor("dA", a.dA, a.rank, a.d_in, e, kWrite);
  declare_factor("dB", a.dB, a.rank, a.d_out, e, kWrite);
  floats_of("t", a.t, a.tokens * a.rank, kRead);
  floats_of("dt", a.dt_in, a.tokens * a.rank, kRead);
  floats_of("dt", a.dt_out, a.tokens * a.rank, kWrite);
  seed_of(a.dropout);
}
void declare_all(const RoutedArgs& a) {
  const int e = size_of(a.dtype), bank = a.rank * a.experts;
  const bool in_place = a.out.data && a.out.data == a.y.data;
  const int64_t router = a.router_on_x ? a.d_in : a.rank;
  declare("x", a.x, a.tokens, a.d_in, e, kRead);
  if (!in_place) declare("y", a.y, a.tokens, a.d_out, e, kRead);
  declare("out", a.out, a.tokens, a.d_out, e, in_place ? kUpdate : kWrite);
  declare("g", a.g, a.tokens, a.d_out, e, kRead);
  declare("dx", a.dx, a.tokens, a.d_in, e, kWrite);
  declare_factor("A", a.A, a.rank, a.d_in, e, kRead);
  declare_factor("B", a.B, bank, a.d_out, e, kRead);
  declare_factor("R", a.R, router, a.experts, e, kRead);
  declare_factor("dA", a.dA, a.rank, a.d_in, e, kWrite);
  declare_factor("dB", a.dB, bank, a.d_out, e, kWrite);
  declare_factor("dR", a.dR, router, a.experts, e, kWrite);
  declare_bytes("token_mask", a.token_mask, 1, a.tokens, a.tokens, kRead);
  declare_bytes("active", a.active, 1, a.experts, a.experts, kRead);
  floats_of("weights", a.weights, a.experts, kRead);
  floats_of("t", a.t_out, a.tokens * a.rank, kWrite);
  floats_of("p", a.p_out, a.tokens * a.experts, kWrite);
  floats_of("w", a.w_out, a.segments * a.experts, kWrite);
  floats_of("t", a.t, a.tokens * a.rank, kRead);
  floats_of("p", a.p, a.tokens * a.experts, kRead);
  floats_of("w", a.w, a.segments * a.experts, kRead);
  floats_of("dweights", a.dweights, a.experts, kWrite);
  seed_of(a.dropout);
}

template <class Args, size_t (*plan)(const Args*, void*, int*)>
size_t run(const Args& a, void* workspace, void*, int* error) {
  if (!workspace || !runs) return plan(&a, nullptr, error);
  simt_reset(1, 0.0);
  declare_all(a);
  const size_t used = plan(&a, workspace, error);
  launches++;
  findings = simt_findings();
  if (!findings.empty()) *error = 1;
  return used;
}

const KernelTable table = {run<ForwardArgs, lowrank_forward>, run<BackwardArgs, lowrank_backward>,
                           run<RoutedArgs, lowrank_routed_forward>, run<RoutedArgs, lowrank_routed_backward>};
std::unique_ptr<torch::Library> library;

// Seconds per call of residual_add_ through the dispatcher, from C++: without Python's conversion of arguments.
double seconds_per_call(Tensor y, const Tensor& x, const Tensor& A, const Tensor& B, int64_t calls) {
  using Call = Tensor(Tensor&, const Tensor&, const Tensor&, const Tensor&, double, double, const Seed&, bool);
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("lowrank_fast::residual_add_", "").typed<Call>();
  const pybind11::gil_scoped_release released;
  const c10::InferenceMode inference;
  const auto began = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < calls; i++) op.call(y, x, A, B, 1.0, 0.0, {}, false);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count() / static_cast<double>(calls);
}

}  // namespace

const KernelTable& kernels_for(int) { return table; }
void* current_stream(int) { return nullptr; }
const char* error_text(int) { return findings.c_str(); }

}  // namespace lowrank

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The CUDA bindings for CPU tensors; their kernels run in the SIMT harness.";
  m.def("register", [](const std::string& key) {
    lowrank::library = std::make_unique<torch::Library>(torch::Library::IMPL, "lowrank_fast",
                                                        c10::parseDispatchKey(key), __FILE__, __LINE__);
    lowrank::register_adds(*lowrank::library);
    lowrank::register_routed(*lowrank::library);
  });
  m.def("seconds_per_call", &lowrank::seconds_per_call);
  m.def("unregister", [] { lowrank::library.reset(); });
  m.def("launches", [] { return lowrank::launches; }, "How many launches the harness has run.");
  m.def(
      "run_kernels", [](bool on) { lowrank::runs = on; }, "Off: a launch returns at once, to time what comes before.");
}
