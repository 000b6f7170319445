// Chooses the instruction set once, when the extension loads.
#include "dispatch.h"

#include <stdexcept>

#include "brgemm.h"

namespace lowrank {

extern const Kernels kernels_baseline[3];
#if defined(__x86_64__)
extern const Kernels kernels_avx2[3];
extern const Kernels kernels_avx512[3];
extern const Kernels kernels_avx512_bf16[3];
extern const Kernels kernels_amx;  // for bfloat16
#endif

namespace {

struct Isa {
  const char* name;
  const Kernels* tables[3];  // by Dtype
  bool native;               // this CPU has the instructions
};

Isa with(const char* name, const Kernels* tables, bool native) {
  return {name, {&tables[0], &tables[1], &tables[2]}, native};
}

const std::vector<Isa>& known() {
#if defined(__x86_64__)
  static const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  static const std::vector<Isa> list = {
      with("baseline", kernels_baseline, true),
      with("avx2", kernels_avx2, avx2),
      with("avx512", kernels_avx512, avx512),
      with("avx512_bf16", kernels_avx512_bf16, avx512_bf16),
      {"amx", {&kernels_avx512_bf16[0], &kernels_amx, &kernels_avx512_bf16[2]}, avx512_bf16 && brgemm_uses_amx()},
  };
#else
  static const std::vector<Isa> list = {with("baseline", kernels_baseline, true)};
#endif
  return list;
}

// `amx` rounds float32 parameters to bfloat16, and its speed on tiles has not been measured: it is used when asked for.
bool on_request(const Isa& candidate) { return std::string(candidate.name) == "amx"; }

// Whether the CPU runs it: `amx` also where oneDNN does the same products on AVX-512, so that it is tested there.
bool testable(const Isa& candidate) {
#if defined(__x86_64__)
  if (candidate.tables[1] == &kernels_amx) {
    static const bool runs = __builtin_cpu_supports("avx512bf16") && brgemm_runs();
    return runs;
  }
#endif
  return candidate.native;
}

const Isa* best() {
  const Isa* chosen = nullptr;
  for (const Isa& candidate : known())
    if (candidate.native && !on_request(candidate)) chosen = &candidate;
  return chosen;
}

template <class F>
std::vector<std::string> names(const F& wanted) {
  std::vector<std::string> found;
  for (const Isa& candidate : known())
    if (wanted(candidate)) found.emplace_back(candidate.name);
  return found;
}

const Isa*& current() {
  static const Isa* chosen = best();
  return chosen;
}

}  // namespace

Scratch& scratch() {
  static thread_local Scratch s;
  return s;
}

float* grouped_scratch(int64_t floats) {
  static thread_local std::vector<float> buffer;
  if (static_cast<int64_t>(buffer.size()) < floats) buffer.resize(floats);
  return buffer.data();
}

const Kernels& kernels(Dtype dtype) {
  const Kernels* table = current()->tables[static_cast<int>(dtype)];
#if defined(__x86_64__)
  if (table == &kernels_amx && !brgemm_enabled()) return kernels_avx512_bf16[static_cast<int>(dtype)];
#endif
  return *table;
}

std::string isa() { return current()->name; }

std::vector<std::string> isas() {
  return names([](const Isa& candidate) { return candidate.native; });
}

std::vector<std::string> testable_isas() { return names(testable); }

void set_isa(const std::string& name) {
  std::string possible;
  for (const Isa& candidate : known()) {
    if (!testable(candidate)) continue;
    if (name == candidate.name) {
      current() = &candidate;
      return;
    }
    possible += (possible.empty() ? "" : ", ") + std::string(candidate.name);
  }
  throw std::invalid_argument("LOWRANK_FAST_CPU_ISA must be one of those this CPU runs (" + possible + "); got " +
                              name);
}

}  // namespace lowrank
