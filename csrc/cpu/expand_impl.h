// expand: out = y + z P in tiles of rows by halves of a unit; one row reads its factors where they are.
#pragma once

#include <type_traits>

#include "panels_impl.h"
#include "rows_impl.h"

namespace {

using namespace lowrank;

constexpr int64_t kChain = 128;  // ranks that expand adds up in one go
constexpr int kExpandRows = kLanes == 16 ? 8 : 6;

template <int R, class T>
LOWRANK_INLINE void prefetch_rows(const T* p, int64_t stride) {
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    prefetch_unit(p);
    p += stride;
    LOWRANK_OPAQUE(p);
  }
}

// One unit of columns, or the first `columns` of one, for R rows. kLong: more than kChain ranks (the experts of token
// routing), added up kChain at a time: one sum over all of them would have twice the error of the experts' own sums.
// A function of its own: inlined into the loop over units, the sums would not stay in registers.
template <class D, int R, bool kLong, bool kWhole>
__attribute__((noinline)) static void expand_tile(const typename D::T* y, int64_t y_stride, typename D::T* out,
                                                  int64_t out_stride, const float* z, Panel P, int64_t k,
                                                  int64_t columns) {
  V a[R], b[R], earlier_a[R], earlier_b[R];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) a[i] = b[i] = earlier_a[i] = earlier_b[i] = V{};
  for (int64_t rank = 0; rank < k; rank += 4, P.data += P.group) {
    if constexpr (kLong)
      if (rank % kChain == 0)
        for (int i = 0; i < R; ++i) {
          earlier_a[i] += a[i];
          earlier_b[i] += b[i];
          a[i] = b[i] = V{};
        }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j, z += R) {
      V pa = load(P.data + j * P.step), pb = load(P.data + j * P.step + kLanes);
      LOWRANK_IN_REGISTER(pa);
      LOWRANK_IN_REGISTER(pb);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        if (i < kFromMemory) {
          add_product(a[i], z + i, pa);
          add_product(b[i], z + i, pb);
        } else {
          const V weight = broadcast(z[i]);
          add_product(a[i], weight, pa);
          add_product(b[i], weight, pb);
        }
      }
    }
  }
  if constexpr (kLong)
    for (int i = 0; i < R; ++i) {
      a[i] += earlier_a[i];
      b[i] += earlier_b[i];
    }
  // All of y is read before anything is written: where the rows of y and out lie whole pages apart, a load behind a
  // store to the same place in another page waits for it. Rows are walked, not indexed: sixteen pointers would push
  // vectors out of registers.
  if (y) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      V ya, yb;
      kWhole ? D::load2(y, ya, yb) : load2_tail<D>(y, columns, ya, yb);
      a[i] = ya + a[i];
      b[i] = yb + b[i];
      y += y_stride;
      LOWRANK_OPAQUE(y);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    kWhole ? D::store2(out, a[i], b[i]) : store2_tail<D>(out, columns, a[i], b[i]);
    out += out_stride;
    LOWRANK_OPAQUE(out);
  }
}

template <class D, int R, bool kLong>
LOWRANK_INLINE void expand_rows(const typename D::T* y, int64_t y_stride, typename D::T* out, int64_t out_stride,
                                const float* z, const Panel& P, int64_t k, int64_t columns) {
  constexpr int64_t ahead = 256 / sizeof(typename D::T);  // columns in four lines
  Panel unit = P;
  auto at = [&](int64_t d) { return y ? y + d : nullptr; };
  int64_t d = 0;
  for (; d + kUnit <= columns; d += kUnit, unit.data += P.unit) {
    if constexpr (R == kExpandRows) {  // the columns that come next, at the end the next rows' first
      const bool wraps = d + ahead >= columns;
      const int64_t column = wraps ? d + ahead - columns : d + ahead;
      if (y && y != out) prefetch_rows<R>(y + (wraps ? R * y_stride : 0) + column, y_stride);
      prefetch_rows<R>(out + (wraps ? R * out_stride : 0) + column, out_stride);
    }
    expand_tile<D, R, kLong, true>(at(d), y_stride, out + d, out_stride, z, unit, k, kUnit);
  }
  if (d < columns) expand_tile<D, R, kLong, false>(at(d), y_stride, out + d, out_stride, z, unit, k, columns - d);
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
                          int64_t rows, const float* grouped, const Panel& P, int64_t k, int64_t columns) {
  int64_t row = 0;
  auto at = [&](int64_t r) { return y ? y + r * y_stride : nullptr; };
  for (; row + kExpandRows <= rows; row += kExpandRows)
    expand_rows<D, kExpandRows, kLong>(at(row), y_stride, out + row * out_stride, out_stride, grouped + row * k, P, k,
                                       columns);
  for (; row + 2 <= rows; row += 2)
    expand_rows<D, 2, kLong>(at(row), y_stride, out + row * out_stride, out_stride, grouped + row * k, P, k, columns);
  for (; row < rows; ++row)
    expand_rows<D, 1, kLong>(at(row), y_stride, out + row * out_stride, out_stride, grouped + row * k, P, k, columns);
}

template <class D>
static void expand_chunk(const typename D::T* y, int64_t y_stride, typename D::T* out, int64_t out_stride, int64_t rows,
                         const float* grouped, const Panel& P, int64_t k, int64_t columns) {
  const auto run = k > kChain ? expand_groups<D, true> : expand_groups<D, false>;
  run(y, y_stride, out, out_stride, rows, grouped, P, k, columns);
}

// out = (z P) * multipliers: the gradient through dropout
template <class D>
static void expand_dropped(const Matrix& out, int64_t rows, const float* z, const Panel& P, int64_t k, int64_t begin,
                           int64_t columns, const Dropout& drop, int64_t first_row) {
  Scratch& s = scratch();
  const int64_t width = round_up(columns, kUnit);
  expand_chunk<F32>(nullptr, 0, s.rows, width, rows, z, P, k, width);
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
  const bool packed = P.step == kUnit;  // walked from end to end, whatever the columns of a chunk
  const int64_t chunk = chunk_columns(k, packed ? 2 * kChunkBytes : kChunkBytes);
  group_rows(z, rows, k, grouped);
  for (; begin < end; begin += chunk) {
    const int64_t columns = end - begin < chunk ? end - begin : chunk;
    const Panel part = panel_from(P, 0, begin);
    if (drop.on)
      expand_dropped<D>(out, rows, grouped, part, k, begin, columns, drop, first_row);
    else
      expand_chunk<D>(y ? row_of<D>(*y, 0, begin) : nullptr, y ? y->stride : 0, row_of<D>(out, 0, begin), out.stride,
                      rows, grouped, part, k, columns);
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

}  // namespace
