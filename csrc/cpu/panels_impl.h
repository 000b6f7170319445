// Panels, over the vector type of `simd.h`: from parameters of any dtype and layout, and from sums back to gradients.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace {

using namespace lowrank;

LOWRANK_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

constexpr int64_t kChunkBytes = kLanes == 16 ? 128 * 1024 : 64 * 1024;  // of a panel: part of the second-level cache

// Columns of a panel per chunk: a multiple of 64 (the dropout block and every unit), from 128 to 1024.
LOWRANK_INLINE int64_t chunk_columns(int64_t k, int64_t bytes = kChunkBytes) {
  int64_t columns = bytes / (4 * k) / 64 * 64;
  return columns < 128 ? 128 : columns > 1024 ? 1024 : columns;
}

// Columns of which sums are taken at a time: a multiple of 64 and of the tiles of sums, whatever the dtype.
constexpr int64_t kSumStep = kLanes == 8 ? 192 : 64;
LOWRANK_INLINE int64_t sum_chunk(int64_t k) {
  const int64_t columns = chunk_columns(k) / kSumStep * kSumStep;
  return columns < kSumStep ? kSumStep : columns;
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

// Ranks [rank, rank + rows) at one unit of columns, rows <= kLanes, from a factor of dtype S to `to(0)`, `to(1)` ...
// Missing elements are zero.
template <class D, class S, class To>
LOWRANK_INLINE void pack_unit(const typename S::T* data, const Factor& f, int64_t rank, int64_t d, int64_t rows,
                              const To& to) {
  const int64_t columns = f.d - d, ranks = f.k > rank ? f.k - rank : 0;
  if (rank_fastest(f)) {  // transpose in registers, one register of the unit at a time: two would not fit
    for (int half = 0; half < 2; ++half) {
      const int64_t at = half * kLanes;
      const int64_t there = ranks < rows ? ranks : rows;
      if (transposable<D, S>(f, there, d)) {
        for (int64_t j = 0; j < there; j += kTransposed<S>)
          transposed_ranks<D, S>(data, f, rank + j, d, half, [&](int i, V v) { store(to(j + i) + at, v); });
        for (int64_t j = there; j < rows; ++j) store(to(j) + at, V{});
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
        if (i < rows) store(to(i) + at, v[i]);
    }
    return;
  }
  for (int j = 0; j < rows; ++j) {
    V a{}, b{};
    const typename S::T* p = data + (rank + j) * f.stride_k + d * f.stride_d;
    if (j < ranks && f.stride_d == 1) {
      if (std::is_same_v<D, S> && columns >= kUnit) {
        D::load2(reinterpret_cast<const typename D::T*>(p), a, b);
        store(to(j), a);
        store(to(j) + kLanes, b);
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
    store(to(j), even);
    store(to(j) + kLanes, odd);
  }
}

// Where a rank begins at a unit of columns.
LOWRANK_INLINE const float* panel_at(const Panel& P, int64_t rank, int64_t column) {
  return P.data + rank / 4 * P.group + rank % 4 * P.step + column / kUnit * P.unit;
}

// to(j): where rank `rank` + j begins at a unit of columns.
LOWRANK_INLINE auto ranks_at(const Panel& P, int64_t rank, int64_t column) {
  float* group = const_cast<float*>(panel_at(P, rank / 4 * 4, column));
  return [=, first = uint32_t(rank % 4)](int64_t j) __attribute__((always_inline)) {
    const uint32_t r = first + uint32_t(j);
    return group + (r >> 2) * P.group + (r & 3) * P.step;
  };
}

// The panel from a rank and a unit of columns on.
LOWRANK_INLINE Panel panel_from(const Panel& P, int64_t rank, int64_t column) {
  return {panel_at(P, rank, column), P.step, P.group, P.unit};
}

// rows: each rank in turn, one line more than its columns need: at a power of two, the ranks of a column would all fall
// into one set of the first-level cache. groups: four ranks, unit by unit, and then the next four, as shrink reads
// them. tiles: all ranks of a unit, and then the next unit, as expand reads them.
enum class Layout { rows, groups, tiles };
constexpr int64_t kBetweenGroups = 2048 + 16;  // so that the groups of a chunk lie in different sets of the caches

static int64_t panel_ld(int64_t columns) { return round_up(columns, kUnit) + 16; }

template <Layout L>
static int64_t panel_floats(int64_t k, int64_t columns) {
  const int64_t padded = pad_rank(k), width = round_up(columns, kUnit);
  if (L == Layout::rows) return padded * panel_ld(columns);
  return padded * width + (L == Layout::groups ? padded / 4 * kBetweenGroups : 0);
}

template <Layout L>
static Panel panel_in(const float* memory, int64_t k, int64_t columns) {
  if (L == Layout::rows) return rows_of_ranks(memory, panel_ld(columns), kUnit);
  if (L == Layout::groups) return {memory, kUnit, 4 * round_up(columns, kUnit) + kBetweenGroups, 4 * kUnit};
  return {memory, kUnit, 4 * kUnit, pad_rank(k) * kUnit};
}

template <class D, Layout L>
static Panel pack(const Factor* stack, int64_t count, int64_t begin, int64_t end, float* memory) {
  int64_t k = 0, offset = 0;
  for (int64_t i = 0; i < count; ++i) k += stack[i].k;
  Panel panel = panel_in<L>(memory, k, end - begin);
  panel.data -= begin / kUnit * panel.unit;
  for (int64_t i = 0; i < count; offset += stack[i++].k) {  // the zeros behind the last factor are the padding
    const Factor& f = stack[i];
    const int64_t ranks = i + 1 < count ? f.k : pad_rank(k) - offset;
    with_dtype(f, [&](auto dtype, const auto* data) {
      for (int64_t d = begin; d < end; d += kUnit)
        for (int64_t rank = 0; rank < ranks; rank += kLanes)
          pack_unit<D, decltype(dtype)>(data, f, rank, d, ranks - rank < kLanes ? ranks - rank : kLanes,
                                        ranks_at(panel, offset + rank, d));
    });
  }
  return panel;
}

// Columns of a tile of sums. Three registers of float32 rows: 4 x 3 chains for 7 loads, not 4 x 2 for 6.
template <class D>
constexpr int kSumColumns = kLanes == 8 && std::is_same_v<D, F32> ? 3 * kLanes : kUnit;

template <int Columns>
LOWRANK_INLINE float* sums_at(const Sums& sums, int64_t rank, int64_t column) {
  return sums.data + rank / 4 * sums.group + rank % 4 * sums.step + column / Columns * sums.tile + column % Columns;
}

template <class D>
static int64_t sum_floats(int64_t k, int64_t d) {
  return pad_rank(k) * round_up(round_up(d, kUnit), kSumColumns<D>);  // staged rows end with a whole unit
}

template <class D>
static Sums sums_in(float* memory, int64_t k, int64_t) {
  return {memory, kSumColumns<D>, 4 * kSumColumns<D>, pad_rank(k) * kSumColumns<D>};
}

// add(j, half): the total of rank `rank` + j in one half of the unit at d -> the factor.
template <class D, class S, class Add>
LOWRANK_INLINE void unpack_unit(typename S::T* data, const Factor& f, int64_t rank, int64_t d, const Add& add) {
  const int64_t columns = f.d - d, ranks = f.k - rank < kLanes ? f.k - rank : kLanes;
  if (rank_fastest(f)) {  // one register of the unit at a time, as in pack_unit
    using Order = UnitOrder<D>;
    for (int half = 0; half < 2; ++half) {
      V v[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) v[j] = j < ranks ? add(j, half) : V{};
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const int64_t column = half * Order::second + Order::step * i;
        if (column < columns) store1_tail<S>(data + (d + column) * f.stride_d + rank, ranks, v[i]);
      }
    }
    return;
  }
  for (int64_t j = 0; j < ranks; ++j) {
    V first = add(j, 0), second = add(j, 1);
    if (D::even_odd) {
      const V even = first, odd = second;
      interleave(even, odd, first, second);
    }
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
static void unpack(const Sums& sums, int64_t first_rank, int64_t count, int64_t distance, const Factor& f,
                   int64_t begin, int64_t end) {
  with_dtype(f, [&](auto dtype, auto* data) {
    for (int64_t d = begin; d < end; d += kUnit)
      for (int64_t rank = 0; rank < f.k; rank += kLanes)
        unpack_unit<D, decltype(dtype)>(data, f, rank, d, [&](int64_t j, int half) __attribute__((always_inline)) {
          const float* p = sums_at<kSumColumns<D>>(sums, first_rank + rank + j, d + half * kLanes);
          V sum = load(p);
          for (int64_t i = 1; i < count; ++i) sum += load(p + i * distance);
          return sum;
        });
  });
}

}  // namespace
