// Panels, over the vector type of `simd.h`: from parameters of any dtype and layout, and from sums back to gradients.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace {

using namespace lowrank;

LOWRANK_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

constexpr int64_t kChunkBytes = 64 * 1024;

// Columns of a panel per chunk: a multiple of 64 (the dropout block and every unit), from 128 to 1024.
LOWRANK_INLINE int64_t chunk_columns(int64_t k) {
  int64_t columns = kChunkBytes / (4 * k) / 64 * 64;
  return columns < 128 ? 128 : columns > 1024 ? 1024 : columns;
}

// f(tag, typed pointer) for the parameter's dtype.
template <class F>
LOWRANK_INLINE void with_dtype(const Factor& f, const F& body) {
  switch (f.dtype) {
    case Dtype::f32:
      return body(F32{}, static_cast<float*>(f.data));
    case Dtype::bf16:
      return body(BF16{}, static_cast<uint16_t*>(f.data));
    default:
      return body(F16{}, static_cast<uint16_t*>(f.data));
  }
}

LOWRANK_INLINE bool rank_fastest(const Factor& f) { return f.stride_k == 1 && f.stride_d != 1; }

// Where the lanes of a unit's two registers lie within it.
template <class D>
struct UnitOrder {
  static constexpr int step = D::even_odd ? 2 : 1, second = D::even_odd ? 1 : kLanes;
};

// Whether `transposed_ranks` reads this factor: `ranks` of it at a whole unit of columns from d.
template <class D, class S>
LOWRANK_INLINE bool transposable(const Factor& f, int64_t ranks, int64_t d) {
  constexpr int packed = 4 / sizeof(typename S::T);  // elements to a word
  return kLanes > 4 && !std::is_same_v<S, F16> && rank_fastest(f) && d + kUnit <= f.d && ranks % (4 * packed) == 0 &&
         UnitOrder<D>::step * f.stride_d % packed == 0;
}

template <class S>
constexpr int kTransposed = 16 / sizeof(typename S::T);  // ranks that `transposed_ranks` reads

// write(j, v): v holds rank `rank` + j of the columns in half `half` of the unit at d, for j < kTransposed<S>.
template <class D, class S, class F>
LOWRANK_INLINE void transposed_ranks(const typename S::T* data, const Factor& f, int64_t rank, int64_t d, int half,
                                     const F& write) {
#if LOWRANK_LANES > 4
  constexpr int packed = 4 / sizeof(typename S::T);
  const typename S::T* first = data + (d + half * UnitOrder<D>::second) * f.stride_d + rank;
  load_transposed(reinterpret_cast<const float*>(first), UnitOrder<D>::step * f.stride_d / packed, [&](int j, V v) {
    if constexpr (packed == 1) {
      write(j, v);
    } else {
      write(2 * j, (V)((VU)v << 16));
      write(2 * j + 1, (V)((VU)v & 0xffff0000u));
    }
  });
#endif
}

// The panel's rows [rank, rank + kLanes) at one unit of columns, from a factor of dtype S. Missing elements are zero.
template <class D, class S>
LOWRANK_INLINE void pack_unit(const typename S::T* data, const Factor& f, int64_t rank, int64_t d, int64_t rows,
                              float* panel, int64_t ld) {
  const int64_t columns = f.d - d, ranks = f.k - rank;
  if (rank_fastest(f)) {  // transpose in registers, one register of the unit at a time: two would not fit
    for (int half = 0; half < 2; ++half) {
      float* to = panel + half * kLanes;
      const int64_t there = ranks < rows ? ranks : rows;
      if (transposable<D, S>(f, there, d)) {
        for (int64_t j = 0; j < there; j += kTransposed<S>)
          transposed_ranks<D, S>(data, f, rank + j, d, half, [&](int i, V v) { store(to + (j + i) * ld, v); });
        for (int64_t j = there; j < rows; ++j) store(to + j * ld, V{});
        continue;
      }
      const int64_t first = d + half * UnitOrder<D>::second;
      V v[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const int64_t column = first + UnitOrder<D>::step * i;
        v[i] = column < f.d ? load1_tail<S>(data + column * f.stride_d + rank, ranks) : V{};
      }
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        if (i < rows) store(panel + i * ld + half * kLanes, v[i]);
    }
    return;
  }
  for (int j = 0; j < rows; ++j) {
    V a{}, b{};
    const typename S::T* p = data + (rank + j) * f.stride_k + d * f.stride_d;
    if (j < ranks && f.stride_d == 1) {
      if (std::is_same_v<D, S> && columns >= kUnit) {
        D::load2(reinterpret_cast<const typename D::T*>(p), a, b);
        store(panel + j * ld, a);
        store(panel + j * ld + kLanes, b);
        continue;
      }
      a = load1_tail<S>(p, columns);
      if (columns > kLanes) b = load1_tail<S>(p + kLanes, columns - kLanes);
    } else if (j < ranks) {
      for (int i = 0; i < kUnit && i < columns; ++i)
        (i < kLanes ? a : b)[i % kLanes] = load1_tail<S>(p + i * f.stride_d, 1)[0];
    }
    V even = a, odd = b;
    if (D::even_odd) deinterleave(a, b, even, odd);
    store(panel + j * ld, even);
    store(panel + j * ld + kLanes, odd);
  }
}

template <class D, class S>
LOWRANK_INLINE void store_block(typename S::T* data, const Factor& f, int64_t rank, int64_t d, V* a, V* b) {
  const int64_t columns = f.d - d, ranks = f.k - rank;
  if (rank_fastest(f)) {
    using Order = UnitOrder<D>;
    transpose(a);
    transpose(b);
    for (int i = 0; i < kLanes; ++i) {
      const int64_t da = Order::step * i, db = Order::second + Order::step * i;
      if (da < columns) store1_tail<S>(data + (d + da) * f.stride_d + rank, ranks, a[i]);
      if (db < columns) store1_tail<S>(data + (d + db) * f.stride_d + rank, ranks, b[i]);
    }
    return;
  }
  for (int64_t j = 0; j < kLanes && j < ranks; ++j) {
    V first = a[j], second = b[j];
    if (D::even_odd) interleave(a[j], b[j], first, second);
    typename S::T* p = data + (rank + j) * f.stride_k + d * f.stride_d;
    if (f.stride_d == 1) {
      store1_tail<S>(p, columns, first);
      if (columns > kLanes) store1_tail<S>(p + kLanes, columns - kLanes, second);
    } else {
      for (int i = 0; i < kUnit && i < columns; ++i)
        store1_tail<S>(p + i * f.stride_d, 1, broadcast((i < kLanes ? first : second)[i % kLanes]));
    }
  }
}

template <class D>
static void pack_factor(const Factor& f, int64_t begin, int64_t end, float* panel, int64_t ld) {
  const int64_t padded = pad_rank(f.k);
  with_dtype(f, [&](auto dtype, const auto* data) {
    for (int64_t d = begin; d < end; d += kUnit)
      for (int64_t rank = 0; rank < padded; rank += kLanes)
        pack_unit<D, decltype(dtype)>(data, f, rank, d, padded - rank < kLanes ? padded - rank : kLanes,
                                      panel + rank * ld + d, ld);
  });
}

// One line more than the columns need: at a power of two, the ranks of a column would all fall into one set of the
// first-level cache.
static int64_t panel_ld(int64_t columns) { return round_up(columns, kUnit) + 16; }

static int64_t panel_floats(int64_t k, int64_t columns) { return (pad_rank(k) + 4) * panel_ld(columns); }

template <class D>
static Panel pack(const Factor* stack, int64_t count, int64_t begin, int64_t end, float* memory) {
  const int64_t ld = panel_ld(end - begin);
  int64_t k = 0, written = 0;
  for (int64_t i = 0; i < count; ++i) {  // each factor's zero rows are overwritten by the factor that follows
    pack_factor<D>(stack[i], begin, end, memory + k * ld - begin, ld);
    written = k + pad_rank(stack[i].k);
    k += stack[i].k;
  }
  for (; written < pad_rank(k); ++written) std::memset(memory + written * ld, 0, ld * sizeof(float));
  return {memory - begin, ld};
}

template <class D>
static void unpack(const float* panels, int64_t count, int64_t step, int64_t ld, const Factor& f, int64_t begin,
                   int64_t end) {
  with_dtype(f, [&](auto dtype, auto* data) {
    for (int64_t d = begin; d < end; d += kUnit)
      for (int64_t rank = 0; rank < f.k; rank += kLanes) {
        V a[kLanes] = {}, b[kLanes] = {};
        for (int64_t j = 0; j < kLanes && rank + j < f.k; ++j) {
          const float* p = panels + (rank + j) * ld + d;
          a[j] = load(p);
          b[j] = load(p + kLanes);
          for (int64_t i = 1; i < count; ++i) {
            a[j] += load(p + i * step);
            b[j] += load(p + i * step + kLanes);
          }
        }
        store_block<D, decltype(dtype)>(data, f, rank, d, a, b);
      }
  });
}

}  // namespace
