// The Python module `lowrank_fast._C`. Importing it registers the CPU kernels for the ops; the functions below say what
// was built and what is in use, and stand in for public functions in eager mode (cpu/eager.h).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

#include "cpu/eager.h"
#include "cpu/tensors.h"

namespace py = pybind11;

namespace {

#define LOWRANK_TEXT_OF(x) #x
#define LOWRANK_TEXT(x) LOWRANK_TEXT_OF(x)

std::map<std::string, std::string> build_info() {
  std::map<std::string, std::string> facts;
#if defined(__clang__)
  facts["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  facts["compiler"] = "gcc " __VERSION__;
#endif
  facts["c++"] = LOWRANK_TEXT(__cplusplus);
#if defined(_OPENMP)
  facts["openmp"] = LOWRANK_TEXT(_OPENMP);
#else
  facts["openmp"] = "no";
#endif
#if defined(LOWRANK_TORCH_VERSION)
  facts["torch"] = LOWRANK_TEXT(LOWRANK_TORCH_VERSION);
#endif
  return facts;
}

bool multiply_add(int64_t count, bool bfloat16) {
  const auto run = lowrank::kernels(bfloat16 ? lowrank::Dtype::bf16 : lowrank::Dtype::f32).multiply_add;
  if (run)
    lowrank::split(at::get_num_threads(), count, 1, [&](int64_t, int64_t begin, int64_t end) { run(end - begin); });
  return run != nullptr;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of lowrank_fast.";
  m.def("isa", &lowrank::isa, "The CPU instruction set in use.");
  m.def("isas", &lowrank::isas, "The CPU instruction sets that this machine runs, lowest first.");
  m.def("testable_isas", &lowrank::testable_isas,
        "`isas()`, and `amx` also where only AVX-512 bf16 is there: for testing, the same kernels through oneDNN's "
        "AVX-512 bf16.");
  m.def("set_isa", &lowrank::set_isa, "Use another of `testable_isas()`; ValueError for any other.");
  m.def("build_info", &build_info, "Compiler and library versions of this build.");
  m.def("multiply_add", &multiply_add, py::arg("count"), py::arg("bfloat16"), py::call_guard<py::gil_scoped_release>(),
        "Perform `count` multiply-adds on the registers of all threads, reading no memory: a bound for benchmarks. "
        "False where the kernels of this dtype multiply with more than vector registers.");
  lowrank::add_eager_functions(m.ptr());
}
