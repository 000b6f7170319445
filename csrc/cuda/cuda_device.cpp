// The Python module, and what the bindings ask of the device: the kernels for it, torch's current stream on it.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <array>
#include <atomic>
#include <iterator>
#include <utility>

#include "architectures.h"  // written by the build: LOWRANK_TABLES, LOWRANK_ARCHITECTURES
#include "cuda_binding.h"

// From the CUDA runtime, which is linked statically into this extension. 75 and 76: cudaDevAttrComputeCapabilityMajor,
// Minor.
extern "C" int cudaDeviceGetAttribute(int* value, int attribute, int device);
extern "C" const char* cudaGetErrorString(int error);

// LOWRANK_TABLE(80, sm_80) LOWRANK_TABLE(90, sm_90a) ...: one per compiled architecture.
#define LOWRANK_TABLE(arch, name) extern "C" const lowrank::KernelTable* lowrank_table_##name();
LOWRANK_TABLES
#undef LOWRANK_TABLE

namespace lowrank {

namespace {

// Machine code runs on its own capability (and, without an "a", on later ones of the same major version); a GPU newer
// than all of them takes the PTX of the newest set.
const KernelTable* choose_kernels(int device) {
  const std::pair<int, const KernelTable*> compiled[] = {// oldest first
#define LOWRANK_TABLE(arch, name) {arch, lowrank_table_##name()},
                                                         LOWRANK_TABLES
#undef LOWRANK_TABLE
  };
  int major = 0, minor = 0;
  const int status = cudaDeviceGetAttribute(&major, 75, device) | cudaDeviceGetAttribute(&minor, 76, device);
  TORCH_CHECK(status == 0, "lowrank_fast: cannot read the compute capability of CUDA device ", device);
  const int capability = 10 * major + minor;
  const KernelTable* table = nullptr;
  for (const auto& [built, candidate] : compiled)
    if (built <= capability && built / 10 == major && (major < 9 || built == capability)) table = candidate;
  if (!table && capability > std::rbegin(compiled)->first) table = std::rbegin(compiled)->second;
  TORCH_CHECK(table, "lowrank_fast: no CUDA kernels for compute capability ", major, ".", minor,
              "; rebuild with LOWRANK_FAST_CUDA_ARCHS=", capability, " or use use_backend(\"triton\")");
  return table;
}

}  // namespace

const KernelTable& kernels_for(int device) {
  static std::array<std::atomic<const KernelTable*>, 64> chosen;
  const auto index = static_cast<size_t>(device);
  if (index >= chosen.size()) return *choose_kernels(device);
  const KernelTable* table = chosen[index].load(std::memory_order_acquire);
  if (!table) chosen[index].store(table = choose_kernels(device), std::memory_order_release);
  return *table;
}

namespace {

// torch's own function, of the libtorch_cuda that it has loaded; null under a torch without CUDA. Looked up, because
// the extension is not linked with that library, so as to load, and say what is missing, without it; and a symbol left
// open stays null, since torch loads its libraries outside the scope that all extensions share.
auto torch_current_stream() {
  using Function = int (*)(int32_t device, void** stream);
  static const auto found = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Function>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  return found;
}

}  // namespace

void* current_stream(int device) {
  const auto get = torch_current_stream();
  TORCH_CHECK(get, "lowrank_fast: this torch has no CUDA; install a CUDA build of torch");
  void* stream = nullptr;
  TORCH_CHECK(get(device, &stream) == 0, "lowrank_fast: no current CUDA stream");
  return stream;
}

const char* error_text(int error) { return cudaGetErrorString(error); }

}  // namespace lowrank

#define LOWRANK_TEXT_OF(...) #__VA_ARGS__
#define LOWRANK_TEXT(...) LOWRANK_TEXT_OF(__VA_ARGS__)

PYBIND11_MODULE(_CUDA, m) {
  m.doc() = "CUDA kernels of lowrank_fast; `register()` puts them behind the ops.";
  m.attr("architectures") = LOWRANK_ARCHITECTURES;
  m.attr("torch_version") = LOWRANK_TEXT(LOWRANK_TORCH_VERSION);
  m.attr("finds_torch_cuda") = lowrank::torch_current_stream() != nullptr;
  m.def("register", [] {
    static torch::Library library(torch::Library::IMPL, "lowrank_fast", c10::DispatchKey::CUDA, __FILE__, __LINE__);
    lowrank::register_adds(library);
    lowrank::register_routed(library);
  });
}
