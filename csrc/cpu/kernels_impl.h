// The block kernels, written once over the vector type of `simd.h` and compiled per instruction set.
//
//                                                        accumulators, d in the lanes, of   32 registers   16 registers
//   shrink   t[row, k]   = sum_d x[row, d] P[k, d]                    rows x ranks              4 x 4          3 x 4
//   expand   out[row, d] = y[row, d] + sum_k z[row, k] P[k, d]        rows x halves of a unit   8 x 2          6 x 2
//   outer    sums[k, d] += sum_row z[row, k] x[row, d]                ranks x registers         8 x 2          4 x 3
//
// Shrink and expand walk d in chunks, so that a chunk of the panel stays in the caches while the rows of a block pass
// it; outer walks d in tiles, whose sums stay there. One accumulator per (row, rank) runs over all of d whatever the
// block shape, and expand sums the ranks before it adds y: so a row's bits do not depend on the rows beside it.
//
// What comes next is fetched into the second-level cache: for shrink the next rows, for expand and outer the columns
// behind, for the hardware's prefetcher starts anew at every page. Addresses past the last row are fetched too; that is
// harmless, and cheaper than a branch.
//
// outer_direct has the ranks in the lanes: columns x registers, 8 x 2 or 16 x 1.
#pragma once

#include "expand_impl.h"
#include "shrink_impl.h"

namespace {

using namespace lowrank;

// Multiples of the tiles' rows. Panels are walked from end to end, so that their size does not decide.
constexpr int64_t kForwardRows = kLanes == 16 ? 64 : 36, kBackwardRows = kLanes == 16 ? 32 : 24;
constexpr int64_t kMostRows = kLanes == 16 ? 64 : 60;
constexpr int kOuterRanks = kLanes == 16 ? 8 : 4;

// ---------------------------------------------------------------------------------------------- outer

// sums (+)= the products of C ranks with N registers of each row at x, of the N * kLanes columns or the first of them;
// `fetch`: the columns behind them, which are wanted next. Copies the registers to `kept`, if there is one.
template <class D, int C, int N, bool kWhole, bool kKeep = false>
LOWRANK_INLINE void outer_tile(const typename D::T* x, int64_t stride, int64_t rows, int64_t columns, const float* z,
                               int64_t k, float* sums, int64_t step, int64_t group, bool accumulate, bool fetch,
                               float* kept = nullptr) {
  V sum[C][N];
  auto at = [&](int j, int i) { return sums + j / 4 * group + j % 4 * step + i * kLanes; };
#pragma GCC unroll 8
  for (int j = 0; j < C; ++j)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) sum[j][i] = accumulate ? load(at(j, i)) : V{};
  for (int64_t row = 0; row < rows; ++row, x += stride, z += k) {
    if (fetch)
      for (int i = 0; i < N * kLanes; i += 64 / sizeof(typename D::T)) __builtin_prefetch(x + N * kLanes + i, 0, 2);
    V a[N];
    if constexpr (N == 2) {
      kWhole ? D::load2(x, a[0], a[1]) : load2_tail<D>(x, columns, a[0], a[1]);
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) a[i] = kWhole ? D::load1(x + i * kLanes) : load1_tail<D>(x, columns);
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      LOWRANK_IN_REGISTER(a[i]);
      if constexpr (kKeep) store(kept + i * kLanes, a[i]);
    }
    if constexpr (kKeep) kept += N * kLanes;
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) {
      const V w = j < kFromMemory ? V{} : broadcast(z[j]);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i)
        j < kFromMemory ? add_product(sum[j][i], z + j, a[i]) : add_product(sum[j][i], w, a[i]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < C; ++j)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) store(at(j, i), sum[j][i]);
}

// Whether a tile of rows is read again from a copy: 16-bit numbers are then converted once, and rows that lie whole
// pages apart do not push each other out of the first-level cache.
template <class D>
LOWRANK_INLINE bool scattered(int64_t stride) {
  return sizeof(typename D::T) == 2 || pages_apart(stride);
}

// The same for all ranks, of columns [column, column + columns), which begin at x.
template <class D, int N, bool kWhole, int Columns>
static void outer_ranks(const typename D::T* x, int64_t stride, int64_t rows, int64_t column, int64_t columns,
                        const float* z, int64_t k, const Sums& sums, bool accumulate) {
  float* to = sums_at<Columns>(sums, 0, column);
  int64_t rank = 0;
  if (kWhole && k >= 2 * kOuterRanks && scattered<D>(stride)) {
    float* kept = scratch().rows;
    outer_tile<D, kOuterRanks, N, kWhole, true>(x, stride, rows, columns, z, k, to, sums.step, sums.group, accumulate,
                                                true, kept);
    for (rank = kOuterRanks; rank + kOuterRanks <= k; rank += kOuterRanks)
      outer_tile<F32, kOuterRanks, N, kWhole>(kept, N * kLanes, rows, columns, z + rank, k, to + rank / 4 * sums.group,
                                              sums.step, sums.group, accumulate, false);
  }
  for (; rank + kOuterRanks <= k; rank += kOuterRanks)
    outer_tile<D, kOuterRanks, N, kWhole>(x, stride, rows, columns, z + rank, k, to + rank / 4 * sums.group, sums.step,
                                          sums.group, accumulate, rank == 0);
  for (; rank < k; rank += 4)
    outer_tile<D, 4, N, kWhole>(x, stride, rows, columns, z + rank, k, to + rank / 4 * sums.group, sums.step,
                                sums.group, accumulate, rank == 0);
}

// Tile by tile, so that a tile's rows are read from the first-level cache for every rank but the first.
template <class D, int Columns = kSumColumns<D>>
static void outer_chunk(const typename D::T* x, int64_t stride, int64_t rows, int64_t column, int64_t columns,
                        const float* z, int64_t k, const Sums& sums, bool accumulate) {
  int64_t d = 0;
  auto ranks = [&](auto registers, auto whole, int64_t n) {
    outer_ranks<D, decltype(registers)::value, decltype(whole)::value, Columns>(x + d, stride, rows, column + d, n, z,
                                                                                k, sums, accumulate);
    d += n;
  };
  constexpr std::integral_constant<int, 1> one{};
  constexpr std::integral_constant<int, 2> two{};
  constexpr std::true_type whole{};
  constexpr std::false_type part{};
  if constexpr (Columns == 3 * kLanes) {
    while (d + Columns <= columns) ranks(std::integral_constant<int, 3>{}, whole, Columns);
    if (d + kUnit <= columns) ranks(two, whole, kUnit);
    if (d + kLanes <= columns) ranks(one, whole, kLanes);
    if (d < columns) ranks(one, part, columns - d);
  } else {
    while (d + kUnit <= columns) ranks(two, whole, kUnit);
    if (d < columns) ranks(two, part, columns - d);
  }
}

template <class D>
static void outer(const Matrix& x, int64_t rows, const float* z, int64_t k, const Sums& sums, bool accumulate,
                  int64_t begin, int64_t end, const Dropout& drop, int64_t first_row) {
  Scratch& s = scratch();
  if (staged<D>(x, rows, k, drop, false)) {
    staged_pieces<D>(x, rows, begin, end, drop, first_row,
                     [&](int64_t row, int64_t count, int64_t from, int64_t columns, auto) {
                       outer_chunk<F32, kSumColumns<D>>(s.rows, kStagedLd, count, from, columns, z + row * k, k, sums,
                                                        accumulate || row > 0);
                     });
    return;
  }
  outer_chunk<D>(row_of<D>(x, 0, begin), x.stride, rows, begin, end - begin, z, k, sums, accumulate);
}

// sums over all rows of the products of C columns with N registers of ranks, in the order in which `outer` adds them
template <int C, int N>
LOWRANK_INLINE void outer_direct_tile(const float* x, int64_t stride, int64_t rows, const float* z, int64_t k,
                                      float* to, int64_t ld) {
  V sum[C][N] = {};
  for (int64_t row = 0; row < rows; ++row, x += stride, z += k) {
    __builtin_prefetch(x + kUnit, 0, 2);
    V w[N];
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) w[i] = load(z + i * kLanes);
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      const V a = broadcast(x[c]);
#pragma GCC unroll 2
      for (int i = 0; i < N; ++i) add_product(sum[c][i], a, w[i]);
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c, to += ld)
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) store(to + i * kLanes, sum[c][i]);
}

// With the ranks in the lanes, as such a gradient holds them: no sums to transpose at the end. Float32 on AVX-512
// alone, where it was measured.
template <class D>
static bool outer_direct(const Matrix& x, int64_t rows, const float* z, const Factor& f, int64_t begin, int64_t end) {
  if constexpr (kLanes == 16 && std::is_same_v<D, F32>) {
    if (f.dtype != Dtype::f32 || !rank_fastest(f) || f.k % kLanes) return false;
    auto walk = [&](auto columns, auto registers, int64_t rank) __attribute__((always_inline)) {
      constexpr int C = decltype(columns)::value, N = decltype(registers)::value;
      float* to = static_cast<float*>(f.data) + rank;
      int64_t d = begin;
      for (; d + C <= end; d += C)
        outer_direct_tile<C, N>(row_of<D>(x, 0, d), x.stride, rows, z + rank, f.k, to + d * f.stride_d, f.stride_d);
      for (; d < end; ++d)
        outer_direct_tile<1, N>(row_of<D>(x, 0, d), x.stride, rows, z + rank, f.k, to + d * f.stride_d, f.stride_d);
    };
    int64_t rank = 0;
    for (; rank + 2 * kLanes <= f.k; rank += 2 * kLanes)
      walk(std::integral_constant<int, 8>{}, std::integral_constant<int, 2>{}, rank);
    if (rank < f.k) walk(std::integral_constant<int, 16>{}, std::integral_constant<int, 1>{}, rank);
    return true;
  }
  return false;
}

// ---------------------------------------------------------------------------------------------- the backward pairs

template <class D>
static void shrink_outer(const Matrix& g, int64_t rows, Panel P, int64_t k, float* u, const float* z, int64_t z_k,
                         const Sums& sums, bool accumulate) {
  const Dropout none{};
  const bool summed = sums.data != nullptr;
  if (!u || k > kRankBlock) {  // nothing to fuse, or more ranks than the scratch holds
    if (u) shrink<D>(g, rows, P, k, u, none, 0, 0, g.cols);
    if (summed) outer<D>(g, rows, z, z_k, sums, accumulate, 0, g.cols, none, 0);
    return;
  }
  Scratch& s = scratch();
  if (staged<D>(g, rows, k, none, summed)) {
    staged_pieces<D>(g, rows, 0, g.cols, none, 0,
                     [&](int64_t row, int64_t count, int64_t begin, int64_t columns, auto next) {
                       shrink_staged<D>(count, P, begin, columns, s.lanes + row * k * kSum, k, begin > 0, next);
                       if (summed)
                         outer_chunk<F32, kSumColumns<D>>(s.rows, kStagedLd, count, begin, columns, z + row * z_k, z_k,
                                                          sums, accumulate || row > 0);
                     });
    sum_lanes(s.lanes, rows * k, u);
    return;
  }
  const int64_t chunk = sum_chunk(k);
  for (int64_t begin = 0; begin < g.cols; begin += chunk) {
    const int64_t columns = g.cols - begin < chunk ? g.cols - begin : chunk;
    const typename D::T* p = row_of<D>(g, 0, begin);
    shrink_chunk<D>(p, g.stride, rows, P, begin, columns, s.lanes, k, begin > 0, begin + columns < g.cols);
    if (summed) outer_chunk<D>(p, g.stride, rows, begin, columns, z, z_k, sums, accumulate);
  }
  sum_lanes(s.lanes, rows * k, u);
}

template <class D>
static void expand_outer(const float* z, Panel P, int64_t k, const Matrix* dx, const Matrix* x, int64_t rows,
                         const Sums& sums, bool accumulate, const Dropout& drop, int64_t first_row) {
  if (dx) expand<D>(nullptr, *dx, rows, z, P, k, 0, dx->cols, drop, first_row);
  if (sums.data) outer<D>(*x, rows, z, k, sums, accumulate, 0, x->cols, drop, first_row);
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
  return {kUnit,         kForwardRows,    kBackwardRows,   kMostRows,       groups,        tiles,       kSumColumns<D>,
          sum_floats<D>, sums_in<D>,      unpack<D>,       shrink<D>,       shrink_row<D>, expand<D>,   expand_row<D>,
          outer<D>,      outer_direct<D>, shrink_outer<D>, expand_outer<D>, softmax,       multiply_add};
}

}  // namespace
