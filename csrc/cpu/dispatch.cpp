// Chooses the instruction set once, when the extension loads.
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace lowrank {

extern const Kernels kernels_baseline[3];
#if defined(__x86_64__)
extern const Kernels kernels_avx2[3];
extern const Kernels kernels_avx512[3];
extern const Kernels kernels_avx512_bf16[3];
#endif

namespace {

struct Isa {
  const char* name;
  const Kernels* table;
  bool supported;
};

const std::vector<Isa>& known() {
#if defined(__x86_64__)
  static const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const std::vector<Isa> list = {
      {"baseline", kernels_baseline, true},
      {"avx2", kernels_avx2, avx2},
      {"avx512", kernels_avx512, avx512},
      {"avx512_bf16", kernels_avx512_bf16, avx512 && __builtin_cpu_supports("avx512bf16")},
  };
#else
  static const std::vector<Isa> list = {{"baseline", kernels_baseline, true}};
#endif
  return list;
}

const Isa* best() {
  const Isa* chosen = nullptr;
  for (const Isa& candidate : known())
    if (candidate.supported) chosen = &candidate;
  return chosen;
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

const Kernels& kernels(Dtype dtype) { return current()->table[static_cast<int>(dtype)]; }

std::string isa() { return current()->name; }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Isa& candidate : known())
    if (candidate.supported) names.emplace_back(candidate.name);
  return names;
}

void set_isa(const std::string& name) {
  std::string possible;
  for (const Isa& candidate : known()) {
    if (!candidate.supported) continue;
    if (name == candidate.name) {
      current() = &candidate;
      return;
    }
    possible += (possible.empty() ? "" : ", ") + std::string(candidate.name);
  }
  throw std::invalid_argument("LOWRANK_FAST_CPU_ISA must be one of those this CPU runs (" + possible + "); got " + name);
}

}  // namespace lowrank
