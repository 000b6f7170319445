// shrink and what it shares with outer: t = x P^T in tiles of rows by ranks, from rows as they are or staged.
#pragma once

#include "panels_impl.h"
#include "rows_impl.h"

namespace {

using namespace lowrank;

constexpr int kShrinkRanks = kLanes == 4 ? 2 : 4;
constexpr int kShrinkRows = kLanes == 16 ? 4 : 3;
constexpr bool kSplitUnit = kLanes == 4;  // four lanes make long chains of sums: two per rank keep their error down
constexpr int kSum = kSplitUnit ? kUnit : kLanes;  // floats of the unfinished sum of a row and a rank

template <class S>
struct Fetch {  // rows that are wanted in the second-level cache soon
  const S* at;
  int64_t stride, rows;
};

constexpr int kPartOfRow = -1;

// acc[(row * k + rank) * kSum ..] (+)= products of `columns` columns, for R rows and C ranks. Fetches `Ahead` rows,
// or part of one: `step` elements for each unit.
template <class D, class S, int R, int C, int Ahead, class Q = F32>
LOWRANK_INLINE void shrink_tile(const typename D::T* x, int64_t stride, PanelOf<typename Q::T> P, int64_t columns,
                                float* acc, int64_t k, bool accumulate, const S* ahead, int64_t step = 0) {
  V sum[R][C], sum_b[R][C];  // sum_b: only where the unit is split
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) {
      sum[i][j] = accumulate ? load(acc + (i * k + j) * kSum) : V{};
      sum_b[i][j] = kSplitUnit && accumulate ? load(acc + (i * k + j) * kSum + kLanes) : V{};
    }
  // a half at a time: with both, the inputs and the sums would not fit in 16 registers
  auto half = [&](auto which, V(&sums)[R][C], const V(&a)[R]) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) {
      V factor = Q::template load_half<decltype(which)::value>(P.data + j / 4 * P.group + j % 4 * P.step);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) add_product(sums[i][j], a[i], factor);
    }
  };
  constexpr std::integral_constant<int, 0> first;
  constexpr std::integral_constant<int, 1> second;
  int64_t d = 0;
  for (; d + kUnit <= columns; d += kUnit, P.data += P.unit) {
    for (int i = 0; i < Ahead; ++i) prefetch_unit(ahead + i * stride + d);
    if constexpr (Ahead == kPartOfRow) {
      __builtin_prefetch(ahead, 0, 2);
      ahead += step;
    }
    V a[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) a[i] = D::template load_half<0>(x + i * stride + d);
    half(first, sum, a);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) a[i] = D::template load_half<1>(x + i * stride + d);
    half(second, kSplitUnit ? sum_b : sum, a);
  }
  if (d < columns) {
    V a[R], b[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) load2_tail<D>(x + i * stride + d, columns - d, a[i], b[i]);
    half(first, sum, a);
    half(second, kSplitUnit ? sum_b : sum, b);
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) {
      store(acc + (i * k + j) * kSum, sum[i][j]);
      if (kSplitUnit) store(acc + (i * k + j) * kSum + kLanes, sum_b[i][j]);
    }
}

// R rows by all their ranks. The passes over the ranks share the fetching of the R rows at `ahead`.
template <class D, int R, int Ahead>
LOWRANK_INLINE void shrink_passes(const typename D::T* x, int64_t stride, const Panel& P, int64_t column,
                                  int64_t columns, float* acc, int64_t k, bool accumulate, const typename D::T* ahead) {
  constexpr int C = R == 1 ? 2 * kShrinkRanks : kShrinkRanks;  // one row alone needs more chains to hide the latency
  const int64_t passes = k / C;
  int64_t rank = 0;
  for (int64_t pass = 0; pass < passes; ++pass, rank += C) {
    const typename D::T* share = ahead + pass * R / passes * stride;
    if (Ahead == kPartOfRow) share += pass * R % passes * columns / passes;
    shrink_tile<D, typename D::T, R, C, Ahead>(x, stride, panel_from(P, rank, column), columns, acc + rank * kSum, k,
                                               accumulate, share, kUnit * R / passes);
  }
  for (; rank < k; rank += kShrinkRanks)
    shrink_tile<D, typename D::T, R, kShrinkRanks, 0>(x, stride, panel_from(P, rank, column), columns,
                                                      acc + rank * kSum, k, accumulate, ahead);
}

// Columns [column, column + columns) of the rows at x, which begin there; `more`: of columns that follow.
template <class D>
static void shrink_chunk(const typename D::T* x, int64_t stride, int64_t rows, const Panel& P, int64_t column,
                         int64_t columns, float* acc, int64_t k, bool accumulate, bool more) {
  constexpr int R = kShrinkRows;
  int64_t row = 0;
  for (; row + R <= rows; row += R) {
    const typename D::T* next = row + 2 * R > rows && more ? x + columns : x + (row + R) * stride;
    const typename D::T* from = x + row * stride;
    float* sums = acc + row * k * kSum;
    if (k >= 2 * R * kShrinkRanks)
      shrink_passes<D, R, kPartOfRow>(from, stride, P, column, columns, sums, k, accumulate, next);
    else if (k >= R * kShrinkRanks)
      shrink_passes<D, R, 1>(from, stride, P, column, columns, sums, k, accumulate, next);
    else
      shrink_passes<D, R, (R + 1) / 2>(from, stride, P, column, columns, sums, k, accumulate, next);
  }
  for (; R > 2 && row + 2 <= rows; row += 2)
    shrink_passes<D, 2, 0>(x + row * stride, stride, P, column, columns, acc + row * k * kSum, k, accumulate, x);
  for (; row < rows; ++row)
    shrink_passes<D, 1, 0>(x + row * stride, stride, P, column, columns, acc + row * k * kSum, k, accumulate, x);
}

// t[i] = the sum of the lanes of acc[i], for n (a multiple of 4) unfinished sums.
static void sum_lanes(const float* acc, int64_t n, float* t) {
  for (int64_t i = 0; i < n; i += kLanes) {
    V v[kLanes];
    int64_t count = n - i < kLanes ? n - i : kLanes;
    for (int j = 0; j < kLanes; ++j) {
      v[j] = j < count ? load(acc + (i + j) * kSum) : V{};
      if (kSplitUnit && j < count) v[j] += load(acc + (i + j) * kSum + kLanes);
    }
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

constexpr int64_t kStagedRows = 12, kStagedColumns = 256 / kSumStep * kSumStep, kStagedLd = kStagedColumns + 16;

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
static void shrink_staged(int64_t rows, const Panel& P, int64_t column, int64_t columns, float* acc, int64_t k,
                          bool accumulate, Fetch<typename D::T> next) {
  constexpr int R = kShrinkRows, C = kShrinkRanks;
  const float* x = scratch().rows;
  for (int64_t rank = 0; rank < k; rank += C) {
    const Panel factors = panel_from(P, rank, column);
    float* sums = acc + rank * kSum;
    int64_t row = 0;
    for (; row + R <= rows; row += R) {
      const float* from = x + row * kStagedLd;
      float* to = sums + row * k * kSum;
      if (next.rows > 0) {
        shrink_tile<F32, typename D::T, R, C, 1>(from, kStagedLd, factors, columns, to, k, accumulate, next.at);
        next.at += next.stride;
        --next.rows;
      } else {
        shrink_tile<F32, float, R, C, 0>(from, kStagedLd, factors, columns, to, k, accumulate, from);
      }
    }
    for (; row < rows; ++row)
      shrink_tile<F32, float, 1, C, 0>(x + row * kStagedLd, kStagedLd, factors, columns, sums + row * k * kSum, k,
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
    const Panel panel = panel_from(P, rank, 0);
    if (staged<D>(x, rows, k, drop, false)) {
      staged_pieces<D>(x, rows, from, to, drop, first_row,
                       [&](int64_t row, int64_t count, int64_t begin, int64_t columns, auto next) {
                         shrink_staged<D>(count, panel, begin, columns, s.lanes + row * ranks * kSum, ranks, begin > 0,
                                          next);
                       });
    } else {
      for (int64_t begin = from; begin < to; begin += chunk) {
        const int64_t columns = to - begin < chunk ? to - begin : chunk;
        shrink_chunk<D>(row_of<D>(x, 0, begin), x.stride, rows, panel, begin, columns, s.lanes, ranks, begin > 0,
                        begin + columns < to);
      }
    }
    if (to < x.cols) continue;
    if (ranks == k) {
      sum_lanes(s.lanes, rows * k, t);
    } else {
      for (int64_t row = 0; row < rows; ++row) sum_lanes(s.lanes + row * ranks * kSum, ranks, t + row * k + rank);
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
        shrink_tile<D, float, 1, C, 0, D>(row, 0,
                                          rows_of_ranks(factors + rank * stack[i].stride_k, stack[i].stride_k, kUnit),
                                          x.cols, sums + rank * kSum, 1, false, sums);
    };
    tile(std::integral_constant<int, 2 * kShrinkRanks>{});
    tile(std::integral_constant<int, kShrinkRanks>{});
    sums += stack[i].k * kSum;
  }
  sum_lanes(scratch().lanes, ranks, t);
  return true;
}

}  // namespace
