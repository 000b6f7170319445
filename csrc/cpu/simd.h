// One vector register of floats in the instruction set being compiled, and the three activation dtypes in it.
//
// GCC's vector extensions carry the arithmetic, so the kernels are the same source for SSE2, AVX2, AVX-512 and whatever
// else the compiler targets; only the 16-bit conversions name instructions. The including file defines LOWRANK_LANES
// (4, 8 or 16) and, where the hardware has it, LOWRANK_BF16_STORE.
//
// A *unit* is 2 * kLanes elements held in two registers (a, b): the first and second half of the unit, or for bfloat16
// its even and odd elements, which costs one shift and one mask instead of two shuffles.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int kLanes = LOWRANK_LANES;
constexpr int kUnit = 2 * kLanes;

typedef float V __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VU __attribute__((vector_size(4 * kLanes)));
typedef int32_t VI __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VH __attribute__((vector_size(2 * kLanes)));
typedef float UnalignedV __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t UnalignedVU __attribute__((vector_size(4 * kLanes), aligned(2), may_alias));
typedef uint16_t UnalignedVH __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

#define LOWRANK_INLINE static inline __attribute__((always_inline))

LOWRANK_INLINE V load(const float* p) { return *reinterpret_cast<const UnalignedV*>(p); }
LOWRANK_INLINE void store(float* p, V v) { *reinterpret_cast<UnalignedV*>(p) = v; }
// Pins a value to a register: GCC 12 otherwise stores some loop-invariant ones to the stack, which halves the speed of
// the inner loops that read them.
#if LOWRANK_LANES == 16 && !defined(__clang__)
#define LOWRANK_IN_REGISTER(v) asm("" : "+v"(v))
#else
#define LOWRANK_IN_REGISTER(v) (void)(v)
#endif
#define LOWRANK_OPAQUE(pointer) asm("" : "+r"(pointer))  // keeps the compiler from precomputing every row's address

// sum += a * b, in the register of the sum: the compiler would overwrite a factor and copy it back, and of 16 registers
// leave one operand in memory and load it for every product.
LOWRANK_INLINE void add_product(V& sum, V a, V b) {
#if LOWRANK_LANES >= 8 && defined(__GNUC__) && !defined(__clang__)
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#else
  sum += a * b;
#endif
}

// The same with one float for all lanes. AVX-512 reads it as part of the instruction, so there is one less to issue;
// each product loads it anew, so two of eight rows or ranks are multiplied this way, where loads and products both have
// room.
constexpr int kFromMemory = kLanes == 16 ? 2 : 0;
LOWRANK_INLINE void add_product(V& sum, const float* a, V b) {
#if LOWRANK_LANES == 16 && defined(__GNUC__) && !defined(__clang__)
  asm("vfmadd231ps %1%{1to16%}, %2, %0" : "+v"(sum) : "m"(*a), "v"(b));
#else
  sum += (*a - V{}) * b;
#endif
}

LOWRANK_INLINE V broadcast(float s) { return s - V{}; }
LOWRANK_INLINE V select(VI mask, V a, V b) { return (V)(((VI)a & mask) | ((VI)b & ~mask)); }

// A unit of columns, into the second-level cache.
template <class T>
LOWRANK_INLINE void prefetch_unit(const T* p) {
  for (int i = 0; i < kUnit * int(sizeof(T)); i += 64) __builtin_prefetch(reinterpret_cast<const char*>(p) + i, 0, 2);
}

// ---------------------------------------------------------------------------------------------- float32

struct F32 {
  using T = float;
  static constexpr bool even_odd = false;
  LOWRANK_INLINE void load2(const T* p, V& a, V& b) {
    a = load(p);
    b = load(p + kLanes);
  }
  LOWRANK_INLINE void store2(T* p, V a, V b) {
    store(p, a);
    store(p + kLanes, b);
  }
  template <int Half>
  LOWRANK_INLINE V load_half(const T* p) {
    return load(p + Half * kLanes);
  }
  LOWRANK_INLINE V load1(const T* p) { return load(p); }
  LOWRANK_INLINE void store1(T* p, V v) { store(p, v); }
};

// ---------------------------------------------------------------------------------------------- bfloat16

LOWRANK_INLINE VU bf16_bits(V v) {  // round to nearest even into the high half; NaN stays NaN
  VU u = (VU)v;
  VU rounded = u + 0x7fff + ((u >> 16) & 1);
  VI nan = v != v;
  return (VU)select(nan, (V)(u | 0x400000), (V)rounded);
}

struct BF16 {
  using T = uint16_t;
  static constexpr bool even_odd = true;
  LOWRANK_INLINE void load2(const T* p, V& even, V& odd) {
    VU pairs = *reinterpret_cast<const UnalignedVU*>(p);
    even = (V)(pairs << 16);
    odd = (V)(pairs & 0xffff0000u);
  }
  template <int Half>
  LOWRANK_INLINE V load_half(const T* p) {
    VU pairs = *reinterpret_cast<const UnalignedVU*>(p);
    return (V)(Half ? pairs & 0xffff0000u : pairs << 16);
  }
  LOWRANK_INLINE void store2(T* p, V even, V odd) {
#if defined(LOWRANK_BF16_STORE)
    // [odd 16 | even 16] of bfloat16, then one permute to interleave them
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, halves));
#else
    *reinterpret_cast<UnalignedVU*>(p) = (bf16_bits(even) >> 16) | (bf16_bits(odd) & 0xffff0000u);
#endif
  }
  LOWRANK_INLINE V load1(const T* p) {
    return (V)(__builtin_convertvector(*reinterpret_cast<const UnalignedVH*>(p), VU) << 16);
  }
  LOWRANK_INLINE void store1(T* p, V v) {
    *reinterpret_cast<UnalignedVH*>(p) = __builtin_convertvector(bf16_bits(v) >> 16, VH);
  }
};

// ---------------------------------------------------------------------------------------------- float16

inline float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = uint32_t(h & 0x7fff) << 13;
  float f;
  uint32_t u;
  if (magnitude >= 0x0f800000u) {  // inf, NaN
    u = sign | 0x70000000u | magnitude;
    std::memcpy(&f, &u, 4);
    return f;
  }
  std::memcpy(&f, &magnitude, 4);
  f *= 5.192296858534828e33f;  // 2^112: rebias the exponent; subnormals normalise themselves
  std::memcpy(&u, &f, 4);
  u |= sign;
  std::memcpy(&f, &u, 4);
  return f;
}

inline uint16_t float_to_half(float f) {  // round to nearest even
  uint32_t u;
  std::memcpy(&u, &f, 4);
  uint16_t sign = uint16_t(u >> 16 & 0x8000);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return sign | 0x7e00;
  if (u >= 0x477ff000u) return sign | 0x7c00;  // 65520 and above round to inf
  if (u < 0x38800000u) {                       // subnormal: let float addition round at the right bit
    float magnitude, magic = 0.5f;
    std::memcpy(&magnitude, &u, 4);
    magnitude += magic;
    std::memcpy(&u, &magnitude, 4);
    return sign | uint16_t(u - 0x3f000000u);
  }
  u += 0xc8000fffu + (u >> 13 & 1);
  return sign | uint16_t(u >> 13);
}

struct F16 {
  using T = uint16_t;
  static constexpr bool even_odd = false;
  LOWRANK_INLINE V load1(const T* p) {
#if LOWRANK_LANES == 16
    return (V)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif LOWRANK_LANES == 8
    return (V)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    V v;
    for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(p[i]);
    return v;
#endif
  }
  LOWRANK_INLINE void store1(T* p, V v) {
#if LOWRANK_LANES == 16
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif LOWRANK_LANES == 8
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(v[i]);
#endif
  }
  LOWRANK_INLINE void load2(const T* p, V& a, V& b) {
    a = load1(p);
    b = load1(p + kLanes);
  }
  template <int Half>
  LOWRANK_INLINE V load_half(const T* p) {
    return load1(p + Half * kLanes);
  }
  LOWRANK_INLINE void store2(T* p, V a, V b) {
    store1(p, a);
    store1(p + kLanes, b);
  }
};

// ---------------------------------------------------------------------------------------------- partial units

// The first n < kUnit elements of a unit, zeros behind them: never touches memory past the row.
template <class D>
static inline void load2_tail(const typename D::T* p, int64_t n, V& a, V& b) {
  typename D::T buffer[kUnit] = {};
  std::memcpy(buffer, p, n * sizeof(typename D::T));
  D::load2(buffer, a, b);
}

template <class D>
static inline void store2_tail(typename D::T* p, int64_t n, V a, V b) {
  typename D::T buffer[kUnit];
  D::store2(buffer, a, b);
  std::memcpy(p, buffer, n * sizeof(typename D::T));
}

// The first n elements of a register (all of them for n >= kLanes), zeros behind them.
template <class D>
LOWRANK_INLINE V load1_tail(const typename D::T* p, int64_t n) {
  if (n >= kLanes) return D::load1(p);
#if LOWRANK_LANES == 16
  const __mmask16 mask = __mmask16((1u << n) - 1);
  if constexpr (sizeof(typename D::T) == 4) {
    return (V)_mm512_maskz_loadu_ps(mask, p);
  } else {
    alignas(32) typename D::T buffer[kLanes];
    _mm256_store_si256(reinterpret_cast<__m256i*>(buffer), _mm256_maskz_loadu_epi16(mask, p));
    return D::load1(buffer);
  }
#else
  typename D::T buffer[kLanes] = {};
  std::memcpy(buffer, p, n * sizeof(typename D::T));
  return D::load1(buffer);
#endif
}

template <class D>
LOWRANK_INLINE void store1_tail(typename D::T* p, int64_t n, V v) {
  if (n >= kLanes) return D::store1(p, v);
#if LOWRANK_LANES == 16
  const __mmask16 mask = __mmask16((1u << n) - 1);
  if constexpr (sizeof(typename D::T) == 4) {
    _mm512_mask_storeu_ps(p, mask, (__m512)v);
  } else {
    alignas(32) typename D::T buffer[kLanes];
    D::store1(buffer, v);
    _mm256_mask_storeu_epi16(p, mask, _mm256_load_si256(reinterpret_cast<const __m256i*>(buffer)));
  }
#else
  typename D::T buffer[kLanes];
  D::store1(buffer, v);
  std::memcpy(p, buffer, n * sizeof(typename D::T));
#endif
}

// ---------------------------------------------------------------------------------------------- shuffles

LOWRANK_INLINE V shuffle(V a, V b, VI index) {  // lane i: element index[i] of (a, b)
#if defined(__clang__)
  float from[2 * kLanes];
  V v;
  store(from, a);
  store(from + kLanes, b);
  for (int i = 0; i < kLanes; ++i) v[i] = from[index[i]];
  return v;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

template <int Distance>
LOWRANK_INLINE VI low_blocks() {  // (a, b) -> blocks 0, 2, .. of a beside those of b
  VI index;
  for (int i = 0; i < kLanes; ++i) index[i] = (i & Distance) ? (i - Distance) + kLanes : i;
  return index;
}

// The sums of the lanes of kLanes registers, as one register. Each sum adds lanes in the same tree.
template <int Distance = kLanes / 2>
LOWRANK_INLINE V lane_sums(const V* v) {
  // after the stage at `Distance`, output lane bit log2(Distance) selects the input register
  if constexpr (Distance == 0) {
    return v[0];
  } else {
    V half[Distance];
    const VI low = low_blocks<Distance>();
    const VI high = low + Distance;
#pragma GCC unroll 16
    for (int i = 0; i < Distance; ++i)
      half[i] = shuffle(v[i], v[i + Distance], low) + shuffle(v[i], v[i + Distance], high);
    return lane_sums<Distance / 2>(half);
  }
}

template <int Distance = kLanes / 2>
LOWRANK_INLINE void transpose(V* v) {  // kLanes x kLanes in registers: swap off-diagonal blocks, halving their size
  if constexpr (Distance > 0) {
    const VI low = low_blocks<Distance>();
    const VI high = low + Distance;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if (!(i & Distance)) {
        V a = v[i], b = v[i + Distance];
        v[i] = shuffle(a, b, low);
        v[i + Distance] = shuffle(a, b, high);
      }
    transpose<Distance / 2>(v);
  }
}

// write(j, v): lane i of v is word j < 4 of the row at p + i * stride words. Loads fill a
// register with the same four words of every fourth row, so that the shuffles stay within quarters: half of what
// `transpose` takes. Not for four lanes.
#if LOWRANK_LANES > 4
LOWRANK_INLINE V every_fourth_row(const float* row, int64_t stride) {
#if LOWRANK_LANES == 16
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(row));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(row + 4 * stride), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(row + 8 * stride), 2);
  return (V)_mm512_insertf32x4(v, _mm_loadu_ps(row + 12 * stride), 3);
#else
  return (V)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row)), _mm_loadu_ps(row + 4 * stride), 1);
#endif
}

// The low or high two words of each quarter of a and of b, `Words` at a time in turn: unpcklps .. unpckhpd.
template <int Words, bool High>
LOWRANK_INLINE V zip_quarters(V a, V b) {
  VI index;
  for (int i = 0; i < kLanes; ++i) {
    const int quarter = i / 4 * 4, word = i % 4 / Words / 2 * Words + i % Words + (High ? 2 : 0);
    index[i] = quarter + word + (i % 4 / Words % 2 ? kLanes : 0);
  }
  return shuffle(a, b, index);
}

template <class Write>
LOWRANK_INLINE void load_transposed(const float* p, int64_t stride, const Write& write) {
  V a[4];
#pragma GCC unroll 4
  for (int m = 0; m < 4; ++m) a[m] = every_fourth_row(p + m * stride, stride);
  const V low = zip_quarters<1, false>(a[0], a[1]), high = zip_quarters<1, true>(a[0], a[1]);
  const V low2 = zip_quarters<1, false>(a[2], a[3]), high2 = zip_quarters<1, true>(a[2], a[3]);
  write(0, zip_quarters<2, false>(low, low2));
  write(1, zip_quarters<2, true>(low, low2));
  write(2, zip_quarters<2, false>(high, high2));
  write(3, zip_quarters<2, true>(high, high2));
}
#endif

LOWRANK_INLINE void deinterleave(V first, V second, V& even, V& odd) {
  VI index;
  for (int i = 0; i < kLanes; ++i) index[i] = 2 * i;
  even = shuffle(first, second, index);
  odd = shuffle(first, second, index + 1);
}

LOWRANK_INLINE void interleave(V even, V odd, V& first, V& second) {
  VI index;
  for (int i = 0; i < kLanes; ++i) index[i] = (i & 1) * kLanes + i / 2;
  first = shuffle(even, odd, index);
  second = shuffle(even, odd, index + kLanes / 2);
}

}  // namespace
