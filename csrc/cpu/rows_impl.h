// What the kernels do to single rows, over the vector type of `simd.h`: dropout's multipliers and the softmax.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using namespace lowrank;

template <class D>
LOWRANK_INLINE typename D::T* row_of(const Matrix& m, int64_t row, int64_t column) {
  return static_cast<typename D::T*>(m.data) + row * m.stride + column;
}

// ---------------------------------------------------------------------------------------------- dropout

LOWRANK_INLINE void multiply_high_low(VU a, uint32_t b, VU& high, VU& low) {
#if LOWRANK_LANES == 16
  __m512i m = _mm512_set1_epi32(int(b));
  __m512i even = _mm512_mul_epu32((__m512i)a, m), odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), m);
  high = (VU)_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
  low = (VU)_mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
#else
  for (int i = 0; i < kLanes; ++i) {
    uint64_t product = uint64_t(a[i]) * b;
    high[i] = uint32_t(product >> 32);
    low[i] = uint32_t(product);
  }
#endif
}

// Multipliers (0 or 1 / (1 - p)) for columns [begin, begin + columns) of a row, begin a multiple of 64; `out` has room
// for columns rounded up to 64. The counter layout is reference.dropout_mask's.
static void dropout_row(const Dropout& drop, int64_t row, int64_t begin, int64_t columns, float* out) {
  for (int64_t q = 0; q < (columns + 63) / 64; ++q)
    for (int lane = 0; lane < 16; lane += kLanes) {
      VU c0 = VU{} + uint32_t(16 * (begin / 64 + q) + lane), c1 = VU{} + uint32_t(row), c2 = VU{} + uint32_t(row >> 32);
      for (int i = 0; i < kLanes; ++i) c0[i] += i;
      VU c3 = VU{} + drop.stream;
      uint32_t k0 = uint32_t(drop.key), k1 = uint32_t(drop.key >> 32);
      for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        VU high0, low0, high1, low1;
        multiply_high_low(c0, 0xD2511F53u, high0, low0);
        multiply_high_low(c2, 0xCD9E8D57u, high1, low1);
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
      }
      const VU words[4] = {c0, c1, c2, c3};
      for (int w = 0; w < 4; ++w)
        store(out + 64 * q + 16 * w + lane, select((VI)(words[w] >= drop.threshold), broadcast(drop.keep_scale), V{}));
    }
}

template <class D>
LOWRANK_INLINE void multipliers2(const float* natural, V& a, V& b) {  // in the order of the unit's registers
  a = load(natural);
  b = load(natural + kLanes);
  if (D::even_odd) {
    V first = a, second = b;
    deinterleave(first, second, a, b);
  }
}

// ---------------------------------------------------------------------------------------------- softmax

// exp(x) for x <= 0: 2^n times a polynomial on [-ln2/2, ln2/2]; relative error under 2e-7, exact 0 below -104.
LOWRANK_INLINE V exp_negative(V x) {
  const V clamped = select(x < -104.0f, broadcast(-104.0f), x);
  V n = clamped * 1.44269504f;
  const V magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  n = (n + magic) - magic;
  V r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  V p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  VI e = __builtin_convertvector(n, VI);
  const VI half = e >> 1;  // two steps keep subnormal results
  V result = p * (V)((half + 127) << 23) * (V)((e - half + 127) << 23);
  return select(x < -104.0f, V{}, select(x == x, result, x));
}

static void softmax(float* logits, int64_t rows, int64_t experts, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) {
    float* p = logits + row * stride;
    float top = p[0];
    bool nan = false;
    for (int64_t e = 0; e < experts; ++e) {
      nan |= p[e] != p[e];
      top = p[e] > top ? p[e] : top;
    }
    if (nan) top = __builtin_nanf("");
    float sum = 0.0f;
    for (int64_t e = 0; e < experts; e += kLanes) {
      V v{};
      const int64_t n = experts - e < kLanes ? experts - e : kLanes;
      for (int64_t i = 0; i < n; ++i) v[i] = p[e + i] - top;
      v = exp_negative(v);
      for (int64_t i = 0; i < n; ++i) sum += p[e + i] = v[i];
    }
    const float inverse = 1.0f / sum;
    for (int64_t e = 0; e < experts; ++e) p[e] *= inverse;
  }
}

}  // namespace
