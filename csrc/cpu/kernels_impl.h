// The block kernels, written once over the vector type of `simd.h` and compiled per instruction set.
//
//                                                        accumulators, d in the lanes, of   32 registers   16 registers
//   shrink   t[row, k]   = sum_d x[row, d] P[k, d]                    rows x ranks              4 x 4          3 x 4
//   expand   out[row, d] = y[row, d] + sum_k z[row, k] P[k, d]        rows x halves of a unit   8 x 2          6 x 2
//   outer    acc[k, d]  += sum_row z[row, k] x[row, d]                ranks x registers         8 x 2          4 x 3
//
// Every kernel walks d in chunks so that the panel's chunk (`kChunkBytes`) stays in the caches while the rows
// stream past it. One accumulator per (row, rank) runs over all of d whatever the block shape, and expand sums the
// ranks before it adds y: so a row's bits do not depend on the rows beside it.
//
// While a group of rows is multiplied, the rows that come next are fetched into the second-level cache: rows are too
// short for the hardware's prefetcher, which starts anew at every page. Addresses past the last row are fetched too;
// that is harmless, and cheaper than a branch.
#pragma once

#include "expand_impl.h"
#include "shrink_impl.h"

namespace {

using namespace lowrank;

constexpr int64_t kLightRows = kLanes == 16 ? 16 : 24, kMostRows = kLanes == 16 ? 64 : 60;  // multiples of the tiles'
constexpr int kOuterRanks = kLanes == 16 ? 8 : 4;
constexpr bool kOuterWide = kLanes == 8;  // three registers of float32 rows: 4 x 3 chains for 7 loads, not 4 x 2 for 6

// ---------------------------------------------------------------------------------------------- outer

// acc[j * ld + i * kLanes ..] (+)= the products of C ranks with the N registers of each row that load_row gives
template <int C, int N, class Load>
LOWRANK_INLINE void outer_tile(const Load& load_row, int64_t rows, const float* z, int64_t k, float* acc, int64_t ld,
                               bool accumulate) {
  V sum[C][N];
#pragma GCC unroll 8
  for (int j = 0; j < C; ++j)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) sum[j][i] = accumulate ? load(acc + j * ld + i * kLanes) : V{};
  for (int64_t row = 0; row < rows; ++row) {
    V x[N];
    load_row(row, x);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) LOWRANK_IN_REGISTER(x[i]);
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) {
      const V w = broadcast(z[row * k + j]);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) add_product(sum[j][i], w, x[i]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < C; ++j)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) store(acc + j * ld + i * kLanes, sum[j][i]);
}

template <class D, int C>
LOWRANK_INLINE void outer_ranks(const typename D::T* x, int64_t stride, int64_t rows, const float* z, int64_t k,
                                float* acc, int64_t ld, bool accumulate, int64_t columns) {
  int64_t d = 0;
  if constexpr (kOuterWide && std::is_same_v<D, F32>)
    for (const int64_t pairs = columns / (6 * kLanes) * 6 * kLanes; d < pairs; d += 3 * kLanes)
      outer_tile<C, 3>(
          [&](int64_t row, V(&v)[3]) __attribute__((always_inline)) {
            for (int i = 0; i < 3; ++i) v[i] = load(x + row * stride + d + i * kLanes);
          },
          rows, z, k, acc + d, ld, accumulate);
  for (; d + kUnit <= columns; d += kUnit)
    outer_tile<C, 2>([&](int64_t row, V(&v)[2])
                         __attribute__((always_inline)) { D::load2(x + row * stride + d, v[0], v[1]); },
                     rows, z, k, acc + d, ld, accumulate);
  if (d < columns)
    outer_tile<C, 2>(
        [&](int64_t row, V(&v)[2])
            __attribute__((always_inline)) { load2_tail<D>(x + row * stride + d, columns - d, v[0], v[1]); },
        rows, z, k, acc + d, ld, accumulate);
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
          shrink_staged<D>(count, P, begin, columns, s.lanes + row * k * kLanes, k, begin > 0, next);
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
    shrink_chunk<D>(p, g.stride, rows, P, begin, columns, s.lanes, k, begin > 0, begin + columns < g.cols);
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
  constexpr PanelFormat groups = {panel_floats<Layout::groups>, pack<D, Layout::groups>, !D::even_odd};
  constexpr PanelFormat tiles = {panel_floats<Layout::tiles>, pack<D, Layout::tiles>, !D::even_odd};
  return {kUnit,           kLightRows,      kMostRows,     groups,      tiles,         panel_ld,
          unpack<D>,       shrink<D>,       shrink_row<D>, expand<D>,   expand_row<D>, outer<D>,
          shrink_outer<D>, expand_outer<D>, softmax,       multiply_add};
}

}  // namespace
