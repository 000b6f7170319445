// The block kernels, written once over the vector type of `simd.h` and compiled per instruction set.
//
//                                                        accumulators, d in the lanes, of   32 registers   16 registers
//   shrink   t[row, k]   = sum_d x[row, d] P[k, d]                    rows x ranks              4 x 4          3 x 4
//   expand   out[row, d] = y[row, d] + sum_k z[row, k] P[k, d]        rows x halves of a unit   8 x 2          6 x 2
//   outer    acc[k, d]  += sum_row z[row, k] x[row, d]                ranks x halves            8 x 2          4 x 2
//
// Every kernel walks d in chunks so that the panel's chunk (`kChunkBytes`) stays in the caches while the rows
// stream past it. One accumulator per (row, rank) runs over all of d whatever the block shape, and expand sums the
// ranks before it adds y: so a row's bits do not depend on the rows beside it.
//
// While a group of rows is multiplied, the rows that come next are fetched into the second-level cache: rows are too
// short for the hardware's prefetcher, which starts anew at every page. Addresses past the last row are fetched too;
// that is harmless, and cheaper than a branch.
#pragma once

#include "panels_impl.h"
#include "rows_impl.h"

namespace {

using namespace lowrank;

constexpr int64_t kChunkBytes = 64 * 1024;
constexpr int64_t kLightRows = kLanes == 16 ? 16 : 24, kMostRows = kLanes == 16 ? 64 : 60;  // multiples of the tiles'
constexpr int kShrinkRanks = kLanes == 4 ? 2 : 4;
constexpr int kShrinkRows = kLanes == 16 ? 4 : 3;  // 16 or 12 accumulators of the 32 or 16 registers
constexpr bool kSplitUnit = kLanes == 4;  // four lanes make long chains of sums: two per rank keep their error down
constexpr int64_t kChain = 128;           // ranks that expand adds up in one go
constexpr int kExpandRows = kLanes == 16 ? 8 : 6;
constexpr int kOuterRanks = kLanes == 16 ? 8 : 4;

// Columns per chunk: a multiple of 64 (the dropout block and every unit), from 128 to 1024.
LOWRANK_INLINE int64_t chunk_columns(int64_t k) {
  int64_t columns = kChunkBytes / (4 * k) / 64 * 64;
  return columns < 128 ? 128 : columns > 1024 ? 1024 : columns;
}

// ---------------------------------------------------------------------------------------------- shrink

template <class S>
struct Fetch {  // rows that are wanted in the second-level cache soon
  const S* at;
  int64_t stride, rows;
};

// acc[(row * k + rank) * kLanes ..] (+)= products of `columns` columns, for R rows and C ranks; fetches `Ahead` rows.
template <class D, class S, int R, int C, int Ahead, class Q = F32>
LOWRANK_INLINE void shrink_tile(const typename D::T* x, int64_t stride, const typename Q::T* P, int64_t ld,
                                int64_t columns, float* acc, int64_t k, bool accumulate, const S* ahead) {
  V sum[R][C], sum_b[R][C];  // sum_b: only where the unit is split
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) {
      sum[i][j] = accumulate ? load(acc + (i * k + j) * kLanes) : V{};
      sum_b[i][j] = V{};
    }
  // a half at a time: with both, the inputs and the sums would not fit in 16 registers
  auto half = [&](auto which, int64_t d, V(&sums)[R][C], const V(&a)[R]) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) {
      V factor = Q::template load_half<decltype(which)::value>(P + j * ld + d);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) sums[i][j] += a[i] * factor;
    }
  };
  constexpr std::integral_constant<int, 0> first;
  constexpr std::integral_constant<int, 1> second;
  int64_t d = 0;
  for (; d + kUnit <= columns; d += kUnit) {
    for (int i = 0; i < Ahead; ++i) prefetch_unit(ahead + i * stride + d);
    V a[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) a[i] = D::template load_half<0>(x + i * stride + d);
    half(first, d, sum, a);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) a[i] = D::template load_half<1>(x + i * stride + d);
    half(second, d, kSplitUnit ? sum_b : sum, a);
  }
  if (d < columns) {
    V a[R], b[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) load2_tail<D>(x + i * stride + d, columns - d, a[i], b[i]);
    half(first, d, sum, a);
    half(second, d, kSplitUnit ? sum_b : sum, b);
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) store(acc + (i * k + j) * kLanes, kSplitUnit ? sum[i][j] + sum_b[i][j] : sum[i][j]);
}

// R rows by all their ranks. The passes over the ranks share the fetching of the R rows at `ahead`.
template <class D, int R, int Ahead>
LOWRANK_INLINE void shrink_passes(const typename D::T* x, int64_t stride, const float* P, int64_t ld, int64_t columns,
                                  float* acc, int64_t k, bool accumulate, const typename D::T* ahead) {
  constexpr int C = R == 1 ? 2 * kShrinkRanks : kShrinkRanks;  // one row alone needs more chains to hide the latency
  const int64_t passes = k / C;
  int64_t rank = 0;
  for (int64_t pass = 0; pass < passes; ++pass, rank += C)
    shrink_tile<D, typename D::T, R, C, Ahead>(x, stride, P + rank * ld, ld, columns, acc + rank * kLanes, k,
                                               accumulate, ahead + pass * R / passes * stride);
  for (; rank < k; rank += kShrinkRanks)
    shrink_tile<D, typename D::T, R, kShrinkRanks, 0>(x, stride, P + rank * ld, ld, columns, acc + rank * kLanes, k,
                                                      accumulate, ahead);
}

template <class D>
static void shrink_chunk(const typename D::T* x, int64_t stride, int64_t rows, const float* P, int64_t ld,
                         int64_t columns, float* acc, int64_t k, bool accumulate, bool more) {
  constexpr int R = kShrinkRows;
  int64_t row = 0;
  for (; row + R <= rows; row += R) {
    const typename D::T* next = row + 2 * R > rows && more ? x + columns : x + (row + R) * stride;
    const typename D::T* from = x + row * stride;
    float* sums = acc + row * k * kLanes;
    if (k >= R * kShrinkRanks)
      shrink_passes<D, R, 1>(from, stride, P, ld, columns, sums, k, accumulate, next);
    else
      shrink_passes<D, R, (R + 1) / 2>(from, stride, P, ld, columns, sums, k, accumulate, next);
  }
  for (; R > 2 && row + 2 <= rows; row += 2)
    shrink_passes<D, 2, 0>(x + row * stride, stride, P, ld, columns, acc + row * k * kLanes, k, accumulate, x);
  for (; row < rows; ++row)
    shrink_passes<D, 1, 0>(x + row * stride, stride, P, ld, columns, acc + row * k * kLanes, k, accumulate, x);
}

// t[i] = the sum of the lanes of acc[i], for n (a multiple of 4) registers.
static void sum_lanes(const float* acc, int64_t n, float* t) {
  for (int64_t i = 0; i < n; i += kLanes) {
    V v[kLanes];
    int64_t count = n - i < kLanes ? n - i : kLanes;
    for (int j = 0; j < kLanes; ++j) v[j] = j < count ? load(acc + (i + j) * kLanes) : V{};
    V sums = lane_sums(v);
    if (count == kLanes)
      store(t + i, sums);
    else
      std::memcpy(t + i, &sums, count * sizeof(float));
  }
}

// Rows of x, times dropout's multipliers, as float32 [rows][ld] in panel order, zeros behind the last column.
template <class D>
static void stage_rows(const Matrix& x, int64_t rows, int64_t begin, int64_t columns, const Dropout& drop,
                       int64_t first_row, float* out, int64_t ld) {
  float* m = scratch().multipliers;
  for (int64_t row = 0; row < rows; ++row) {
    if (drop.on) dropout_row(drop, first_row + row, begin, columns, m);
    const typename D::T* p = row_of<D>(x, row, begin);
    float* to = out + row * ld;
    for (int64_t d = 0; d < columns; d += kUnit) {
      V a, b;
      columns - d >= kUnit ? D::load2(p + d, a, b) : load2_tail<D>(p + d, columns - d, a, b);
      if (drop.on) {
        V ma, mb;
        multipliers2<D>(m + d, ma, mb);
        a *= ma;
        b *= mb;
      }
      store(to + d, a);
      store(to + d + kLanes, b);
    }
  }
}

// Whether pieces of rows are worth a copy in the first-level cache before many ranks read them: 16-bit numbers are then
// converted once, and rows that lie whole pages apart (`again`: to be read by shrink and outer) do not push each other
// out.
template <class D>
LOWRANK_INLINE bool staged(const Matrix& x, int64_t rows, int64_t k, const Dropout& drop, bool again) {
  if (drop.on) return true;
  if (kLanes == 16 || rows < kShrinkRows || k < 16) return false;
  return sizeof(typename D::T) == 2 || (again && x.stride % 512 == 0);
}

constexpr int64_t kStagedRows = 12, kStagedColumns = 256, kStagedLd = kStagedColumns + 16;

// f(row, count, begin, columns, next) for each piece of [0, rows) x [from, to), staged at `scratch().rows`; `next`: the
// rows of the piece that follows.
template <class D, class F>
LOWRANK_INLINE void staged_pieces(const Matrix& x, int64_t rows, int64_t from, int64_t to, const Dropout& drop,
                                  int64_t first_row, const F& f) {
  float* memory = scratch().rows;
  for (int64_t begin = from; begin < to; begin += kStagedColumns) {
    const int64_t columns = to - begin < kStagedColumns ? to - begin : kStagedColumns;
    for (int64_t row = 0; row < rows; row += kStagedRows) {
      const int64_t count = rows - row < kStagedRows ? rows - row : kStagedRows;
      const Matrix piece{row_of<D>(x, row, 0), x.stride, x.cols};
      stage_rows<D>(piece, count, begin, columns, drop, first_row + row, memory, kStagedLd);
      const bool last = row + count >= rows;
      Fetch<typename D::T> next{
          last && begin + columns < to ? row_of<D>(x, 0, begin + columns) : row_of<D>(x, row + count, begin), x.stride,
          count};
      f(row, count, begin, round_up(columns, kUnit), next);
    }
  }
}

// Staged rows by all their ranks, four at a time; each tile fetches a row of what comes next.
template <class D>
static void shrink_staged(int64_t rows, const float* P, int64_t ld, int64_t columns, float* acc, int64_t k,
                          bool accumulate, Fetch<typename D::T> next) {
  constexpr int R = kShrinkRows, C = kShrinkRanks;
  const float* x = scratch().rows;
  for (int64_t rank = 0; rank < k; rank += C) {
    const float* factors = P + rank * ld;
    float* sums = acc + rank * kLanes;
    int64_t row = 0;
    for (; row + R <= rows; row += R) {
      const float* from = x + row * kStagedLd;
      float* to = sums + row * k * kLanes;
      if (next.rows > 0) {
        shrink_tile<F32, typename D::T, R, C, 1>(from, kStagedLd, factors, ld, columns, to, k, accumulate, next.at);
        next.at += next.stride;
        --next.rows;
      } else {
        shrink_tile<F32, float, R, C, 0>(from, kStagedLd, factors, ld, columns, to, k, accumulate, from);
      }
    }
    for (; row < rows; ++row)
      shrink_tile<F32, float, 1, C, 0>(x + row * kStagedLd, kStagedLd, factors, ld, columns, sums + row * k * kLanes, k,
                                       accumulate, x);
  }
}

// Ranks are taken kRankBlock at a time, which bounds the scratch.
template <class D>
static void shrink(const Matrix& x, int64_t rows, Panel P, int64_t k, float* t, const Dropout& drop, int64_t first_row,
                   int64_t from, int64_t to) {
  Scratch& s = scratch();
  const int64_t chunk = chunk_columns(k < kRankBlock ? k : kRankBlock);
  for (int64_t rank = 0; rank < k; rank += kRankBlock) {
    const int64_t ranks = k - rank < kRankBlock ? k - rank : kRankBlock;
    const float* panel = P.data + rank * P.ld;
    if (staged<D>(x, rows, k, drop, false)) {
      staged_pieces<D>(x, rows, from, to, drop, first_row,
                       [&](int64_t row, int64_t count, int64_t begin, int64_t columns, auto next) {
                         shrink_staged<D>(count, panel + begin, P.ld, columns, s.lanes + row * ranks * kLanes, ranks,
                                          begin > 0, next);
                       });
    } else {
      for (int64_t begin = from; begin < to; begin += chunk) {
        const int64_t columns = to - begin < chunk ? to - begin : chunk;
        shrink_chunk<D>(row_of<D>(x, 0, begin), x.stride, rows, panel + begin, P.ld, columns, s.lanes, ranks, begin > 0,
                        begin + columns < to);
      }
    }
    if (to < x.cols) continue;
    if (ranks == k) {
      sum_lanes(s.lanes, rows * k, t);
    } else {
      for (int64_t row = 0; row < rows; ++row) sum_lanes(s.lanes + row * ranks * kLanes, ranks, t + row * k + rank);
    }
  }
}

// With activations and factors of one 16-bit dtype the units of both lie in the same order.
template <class D>
static bool shrink_row(const Matrix& x, const Factor* stack, int64_t count, float* t) {
  int64_t ranks = 0;
  for (int64_t i = 0; i < count; ++i) {
    bool direct = false;
    with_dtype(stack[i], [&](auto dtype, const auto*) { direct = std::is_same_v<decltype(dtype), D>; });
    if (!direct || stack[i].stride_d != 1 || stack[i].k % 4 || x.cols % kUnit) return false;
    ranks += stack[i].k;
  }
  if (ranks > kRankBlock) return false;
  float* sums = scratch().lanes;
  const typename D::T* row = row_of<D>(x, 0, 0);
  for (int64_t i = 0; i < count; ++i) {
    const auto* factors = static_cast<const typename D::T*>(stack[i].data);
    int64_t rank = 0;
    auto tile = [&](auto ranks_at_once) __attribute__((always_inline)) {
      constexpr int C = decltype(ranks_at_once)::value;
      for (; rank + C <= stack[i].k; rank += C)
        shrink_tile<D, float, 1, C, 0, D>(row, 0, factors + rank * stack[i].stride_k, stack[i].stride_k, x.cols,
                                          sums + rank * kLanes, 1, false, sums);
    };
    tile(std::integral_constant<int, 2 * kShrinkRanks>{});
    tile(std::integral_constant<int, kShrinkRanks>{});
    sums += stack[i].k * kLanes;
  }
  sum_lanes(scratch().lanes, ranks, t);
  return true;
}

// ---------------------------------------------------------------------------------------------- expand

template <int R, class T>
LOWRANK_INLINE void prefetch_rows(const T* p, int64_t stride) {
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    prefetch_unit(p);
    p += stride;
    LOWRANK_OPAQUE(p);
  }
}

// kLong: more than kChain ranks (the experts of token routing), added up kChain at a time: one sum over all of them
// would have twice the error of the experts' own sums.
template <class D, int R, bool kLong>
LOWRANK_INLINE void expand_rows(const typename D::T* y, int64_t y_stride, typename D::T* out, int64_t out_stride,
                                const float* z, const float* P, int64_t ld, int64_t k, int64_t columns) {
  auto step = [&](int64_t d, auto load_unit, auto store_unit) __attribute__((always_inline)) {
    V a[R], b[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) a[i] = b[i] = V{};
    if constexpr (R == kExpandRows) {
      if (y && y != out) prefetch_rows<R>(y + R * y_stride + d, y_stride);
      prefetch_rows<R>(out + R * out_stride + d, out_stride);
    }
    V earlier_a[R], earlier_b[R];
    if constexpr (kLong)
      for (int i = 0; i < R; ++i) earlier_a[i] = earlier_b[i] = V{};
    const float* p = P + d;
    for (int64_t rank = 0; rank < k; ++rank, p += ld) {
      if constexpr (kLong)
        if (rank % kChain == 0)
          for (int i = 0; i < R; ++i) {
            earlier_a[i] += a[i];
            earlier_b[i] += b[i];
            a[i] = b[i] = V{};
          }
      V pa = load(p), pb = load(p + kLanes);
      LOWRANK_IN_REGISTER(pa);
      LOWRANK_IN_REGISTER(pb);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        V w = broadcast(z[rank * R + i]);
        a[i] += w * pa;
        b[i] += w * pb;
      }
    }
    if constexpr (kLong)
      for (int i = 0; i < R; ++i) {
        a[i] += earlier_a[i];
        b[i] += earlier_b[i];
      }
    // All of y is read before anything is written: where the rows of y and out lie whole pages apart, a load behind a
    // store to the same place in another page waits for it.
    const typename D::T* from = y + d;  // walked, not indexed: sixteen row pointers would push vectors out of registers
    typename D::T* to = out + d;
    if (y) {
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        V ya, yb;
        load_unit(from, ya, yb);
        a[i] = ya + a[i];
        b[i] = yb + b[i];
        from += y_stride;
        LOWRANK_OPAQUE(from);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      store_unit(to, a[i], b[i]);
      to += out_stride;
      LOWRANK_OPAQUE(to);
    }
  };
  int64_t d = 0;
  for (; d + kUnit <= columns; d += kUnit) step(d, D::load2, D::store2);
  if (d < columns)
    step(
        d, [&](const typename D::T* p, V& ya, V& yb) { load2_tail<D>(p, columns - d, ya, yb); },
        [&](typename D::T* p, V va, V vb) { store2_tail<D>(p, columns - d, va, vb); });
}

// z [rows][k] -> groups of kExpandRows, then 2, then 1 rows, each [k][rows of the group]: one pointer reads a group.
static void group_rows(const float* z, int64_t rows, int64_t k, float* grouped) {
  for (int64_t row = 0; row < rows;) {
    const int64_t R = rows - row >= kExpandRows ? kExpandRows : rows - row >= 2 ? 2 : 1;
    for (int64_t i = 0; i < R; ++i)
      for (int64_t rank = 0; rank < k; ++rank) grouped[rank * R + i] = z[(row + i) * k + rank];
    grouped += R * k;
    row += R;
  }
}

template <class D, bool kLong>
static void expand_groups(const typename D::T* y, int64_t y_stride, typename D::T* out, int64_t out_stride,
                          int64_t rows, const float* grouped, const float* P, int64_t ld, int64_t k, int64_t columns) {
  int64_t row = 0;
  auto at = [&](int64_t r) { return y ? y + r * y_stride : nullptr; };
  for (; row + kExpandRows <= rows; row += kExpandRows)
    expand_rows<D, kExpandRows, kLong>(at(row), y_stride, out + row * out_stride, out_stride, grouped + row * k, P, ld,
                                       k, columns);
  for (; row + 2 <= rows; row += 2)
    expand_rows<D, 2, kLong>(at(row), y_stride, out + row * out_stride, out_stride, grouped + row * k, P, ld, k,
                             columns);
  for (; row < rows; ++row)
    expand_rows<D, 1, kLong>(at(row), y_stride, out + row * out_stride, out_stride, grouped + row * k, P, ld, k,
                             columns);
}

template <class D>
static void expand_chunk(const typename D::T* y, int64_t y_stride, typename D::T* out, int64_t out_stride, int64_t rows,
                         const float* grouped, const float* P, int64_t ld, int64_t k, int64_t columns) {
  const auto run = k > kChain ? expand_groups<D, true> : expand_groups<D, false>;
  run(y, y_stride, out, out_stride, rows, grouped, P, ld, k, columns);
}

// out = (z P) * multipliers: the gradient through dropout
template <class D>
static void expand_dropped(const Matrix& out, int64_t rows, const float* z, const float* P, int64_t ld, int64_t k,
                           int64_t begin, int64_t columns, const Dropout& drop, int64_t first_row) {
  Scratch& s = scratch();
  const int64_t width = round_up(columns, kUnit);
  expand_chunk<F32>(nullptr, 0, s.rows, width, rows, z, P, ld, k, width);
  for (int64_t row = 0; row < rows; ++row) {
    dropout_row(drop, first_row + row, begin, columns, s.multipliers);
    typename D::T* o = row_of<D>(out, row, begin);
    for (int64_t d = 0; d < columns; d += kUnit) {
      V ma, mb;
      multipliers2<D>(s.multipliers + d, ma, mb);
      V a = load(s.rows + row * width + d) * ma, b = load(s.rows + row * width + d + kLanes) * mb;
      columns - d >= kUnit ? D::store2(o + d, a, b) : store2_tail<D>(o + d, columns - d, a, b);
    }
  }
}

template <class D>
static void expand(const Matrix* y, const Matrix& out, int64_t rows, const float* z, Panel P, int64_t k, int64_t begin,
                   int64_t end, const Dropout& drop, int64_t first_row) {
  float* grouped = grouped_scratch(rows * k);
  const int64_t chunk = chunk_columns(k);
  group_rows(z, rows, k, grouped);
  for (; begin < end; begin += chunk) {
    const int64_t columns = end - begin < chunk ? end - begin : chunk;
    if (drop.on)
      expand_dropped<D>(out, rows, grouped, P.data + begin, P.ld, k, begin, columns, drop, first_row);
    else
      expand_chunk<D>(y ? row_of<D>(*y, 0, begin) : nullptr, y ? y->stride : 0, row_of<D>(out, 0, begin), out.stride,
                      rows, grouped, P.data + begin, P.ld, k, columns);
  }
}

// sums[2 * i + half] (+)= the ranks of one factor at the units d, d + kUnit ..: chains enough to hide the latency
template <class D, int Units>
LOWRANK_INLINE void expand_row_units(const Factor& f, const float* z, int64_t d, V (&sums)[2 * Units]) {
  with_dtype(f, [&](auto dtype, const auto* data) {
    using S = decltype(dtype);
    for (int64_t rank = 0; rank < f.k; rank += kTransposed<S>)
#pragma GCC unroll 4
      for (int i = 0; i < 2 * Units; ++i)
        transposed_ranks<D, S>(data, f, rank, d + i / 2 * kUnit, i % 2,
                               [&](int j, V v) { sums[i] += broadcast(z[rank + j]) * v; });
  });
}

template <class D>
static bool expand_row(const Matrix* y, const Matrix& out, const float* z, const Factor* stack, int64_t count,
                       int64_t begin, int64_t end) {
  int64_t ranks = 0;
  for (int64_t i = 0; i < count; ++i) {
    bool whole = (end - begin) % kUnit == 0;
    with_dtype(stack[i], [&](auto dtype, const auto*) {
      whole = whole && transposable<D, decltype(dtype)>(stack[i], stack[i].k, end - kUnit);
    });
    if (!whole) return false;
    ranks += stack[i].k;
  }
  if (ranks > kChain) return false;
  auto units = [&](int64_t d, auto how_many) __attribute__((always_inline)) {
    constexpr int Units = decltype(how_many)::value;
    V sums[2 * Units] = {};
    const float* w = z;
    for (int64_t i = 0; i < count; w += stack[i++].k) expand_row_units<D, Units>(stack[i], w, d, sums);
    for (int i = 0; i < Units; ++i, d += kUnit) {
      V a{}, b{};
      if (y) D::load2(row_of<D>(*y, 0, d), a, b);
      D::store2(row_of<D>(out, 0, d), a + sums[2 * i], b + sums[2 * i + 1]);
    }
  };
  int64_t d = begin;
  for (; d + 2 * kUnit <= end; d += 2 * kUnit) units(d, std::integral_constant<int, 2>{});
  if (d < end) units(d, std::integral_constant<int, 1>{});
  return true;
}

// ---------------------------------------------------------------------------------------------- outer

template <class D, int C>
LOWRANK_INLINE void outer_ranks(const typename D::T* x, int64_t stride, int64_t rows, const float* z, int64_t k,
                                float* acc, int64_t ld, bool accumulate, int64_t columns) {
  for (int64_t d = 0; d < columns; d += kUnit) {
    V a[C], b[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) {
      a[j] = accumulate ? load(acc + j * ld + d) : V{};
      b[j] = accumulate ? load(acc + j * ld + d + kLanes) : V{};
    }
    auto rows_of = [&](auto load_unit) __attribute__((always_inline)) {
      for (int64_t row = 0; row < rows; ++row) {
        V xa, xb;
        load_unit(x + row * stride + d, xa, xb);
        LOWRANK_IN_REGISTER(xa);
        LOWRANK_IN_REGISTER(xb);
#pragma GCC unroll 8
        for (int j = 0; j < C; ++j) {
          V w = broadcast(z[row * k + j]);
          a[j] += w * xa;
          b[j] += w * xb;
        }
      }
    };
    if (columns - d >= kUnit)
      rows_of(D::load2);
    else
      rows_of([&](const typename D::T* p, V& a2, V& b2) { load2_tail<D>(p, columns - d, a2, b2); });
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) {
      store(acc + j * ld + d, a[j]);
      store(acc + j * ld + d + kLanes, b[j]);
    }
  }
}

template <class D>
static void outer_chunk(const typename D::T* x, int64_t stride, int64_t rows, const float* z, int64_t k, float* acc,
                        int64_t ld, bool accumulate, int64_t columns) {
  int64_t rank = 0;
  for (; rank + kOuterRanks <= k; rank += kOuterRanks)
    outer_ranks<D, kOuterRanks>(x, stride, rows, z + rank, k, acc + rank * ld, ld, accumulate, columns);
  for (; rank < k; rank += 4) outer_ranks<D, 4>(x, stride, rows, z + rank, k, acc + rank * ld, ld, accumulate, columns);
}

template <class D>
static void outer(const Matrix& x, int64_t rows, const float* z, int64_t k, float* acc, int64_t ld, bool accumulate,
                  int64_t begin, int64_t end, const Dropout& drop, int64_t first_row) {
  Scratch& s = scratch();
  if (staged<D>(x, rows, k, drop, true)) {
    staged_pieces<D>(
        x, rows, begin, end, drop, first_row, [&](int64_t row, int64_t count, int64_t from, int64_t columns, auto) {
          outer_chunk<F32>(s.rows, kStagedLd, count, z + row * k, k, acc + from, ld, accumulate || row > 0, columns);
        });
    return;
  }
  const int64_t chunk = chunk_columns(k);
  for (; begin < end; begin += chunk) {
    const int64_t columns = end - begin < chunk ? end - begin : chunk;
    outer_chunk<D>(row_of<D>(x, 0, begin), x.stride, rows, z, k, acc + begin, ld, accumulate, columns);
  }
}

// ---------------------------------------------------------------------------------------------- the backward pairs

template <class D>
static void shrink_outer(const Matrix& g, int64_t rows, Panel P, int64_t k, float* u, const float* z, int64_t z_k,
                         float* acc, int64_t ld, bool accumulate) {
  const Dropout none{};
  if (!u || k > kRankBlock) {  // nothing to fuse, or more ranks than the scratch holds
    if (u) shrink<D>(g, rows, P, k, u, none, 0, 0, g.cols);
    if (acc) outer<D>(g, rows, z, z_k, acc, ld, accumulate, 0, g.cols, none, 0);
    return;
  }
  Scratch& s = scratch();
  if (staged<D>(g, rows, k, none, acc != nullptr)) {
    staged_pieces<D>(
        g, rows, 0, g.cols, none, 0, [&](int64_t row, int64_t count, int64_t begin, int64_t columns, auto next) {
          shrink_staged<D>(count, P.data + begin, P.ld, columns, s.lanes + row * k * kLanes, k, begin > 0, next);
          if (acc)
            outer_chunk<F32>(s.rows, kStagedLd, count, z + row * z_k, z_k, acc + begin, ld, accumulate || row > 0,
                             columns);
        });
    sum_lanes(s.lanes, rows * k, u);
    return;
  }
  const int64_t chunk = chunk_columns(k);
  for (int64_t begin = 0; begin < g.cols; begin += chunk) {
    const int64_t columns = g.cols - begin < chunk ? g.cols - begin : chunk;
    const typename D::T* p = row_of<D>(g, 0, begin);
    shrink_chunk<D>(p, g.stride, rows, P.data + begin, P.ld, columns, s.lanes, k, begin > 0, begin + columns < g.cols);
    if (acc) outer_chunk<D>(p, g.stride, rows, z, z_k, acc + begin, ld, accumulate, columns);
  }
  sum_lanes(s.lanes, rows * k, u);
}

template <class D>
static void expand_outer(const float* z, Panel P, int64_t k, const Matrix* dx, const Matrix* x, int64_t rows,
                         float* acc, int64_t ld, bool accumulate, const Dropout& drop, int64_t first_row) {
  const int64_t cols = dx ? dx->cols : x->cols;
  const int64_t chunk = chunk_columns(k);
  for (int64_t begin = 0; begin < cols; begin += chunk) {
    const int64_t end = begin + chunk < cols ? begin + chunk : cols;
    if (dx) expand<D>(nullptr, *dx, rows, z, P, k, begin, end, drop, first_row);
    if (acc) outer<D>(*x, rows, z, k, acc, ld, accumulate, begin, end, drop, first_row);
  }
}

// ---------------------------------------------------------------------------------------------- the bound

static void multiply_add(int64_t count) {
  constexpr int chains = 12;  // more than latency times ports, and no more than the registers of any instruction set
  V sum[chains], factor = broadcast(0.5f);
  for (V& v : sum) v = factor;
  for (int64_t done = 0; done < count; done += chains * kLanes)
#pragma GCC unroll 12
    for (int i = 0; i < chains; ++i) sum[i] = sum[i] * factor + factor;
  volatile float sink = 0.0f;
  for (V& v : sum) sink = sink + v[0];
}

// ---------------------------------------------------------------------------------------------- the table

template <class D>
constexpr Kernels table() {
  constexpr PanelFormat panel = {panel_floats, pack<D>, !D::even_odd};
  return {kUnit,           kLightRows,      kMostRows,     panel,       panel,         panel_ld,
          unpack<D>,       shrink<D>,       shrink_row<D>, expand<D>,   expand_row<D>, outer<D>,
          shrink_outer<D>, expand_outer<D>, softmax,       multiply_add};
}

}  // namespace
