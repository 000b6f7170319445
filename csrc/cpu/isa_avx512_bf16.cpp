// The kernels for the instruction set `avx512_bf16`: 16 floats to a register.
#if defined(__x86_64__)
#include <immintrin.h>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#endif
#define LOWRANK_BF16_STORE 1
#define LOWRANK_LANES 16
#include "kernels_impl.h"

namespace lowrank {
extern const Kernels kernels_avx512_bf16[3];
const Kernels kernels_avx512_bf16[3] = {table<F32>(), table<BF16>(), table<F16>()};
}  // namespace lowrank

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
