// The bfloat16 kernels for the instruction set `amx`: the three products of kernels_impl.h on the tile units, by way of
// oneDNN's brgemm. float32 and float16 run the kernels of `avx512_bf16`.
//
//   shrink   t [rows, k]    (+)= x [rows, 256] P        P: pairs of columns, [d / 2][k padded to 16][2]
//   expand   C [rows, 256]    = (hi, lo)(z) (Q, Q)      Q: every element twice, [k][columns][2]; then out = y + C
//   outer    sums [k, 256]  (+)= hi(z)^T x, += lo(z)^T x      x: repacked as pairs of rows, [16][256][2]
//
// A 32-bit word holds two bfloat16 that are multiplied and added together. z, float32, becomes hi + lo, which
// keeps 16 of its bits. Expand spends the pair on the two halves: at 16 ranks and less it is free, since the tile steps
// along k by 32. Outer takes a product for each over one repacking of x.
// Parameters are rounded to bfloat16 as they are packed, which float32 parameters notice: so `amx` is used on request
// only (LOWRANK_FAST_CPU_ISA).
//
// Rows are padded with zeros to 16 or 32 and columns to a multiple of 32, in scratch and never by reading past a row.
// Each element of a product is one sum along its row in a fixed order, so a row's bits do not depend on the rows beside
// it.
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
#include "brgemm.h"
#include "panels_impl.h"
#include "rows_impl.h"

namespace {

constexpr int kTileRows = 32;      // rows of a block: two tiles
constexpr int64_t kColumns = 256;  // columns of one product: its float32 result, 32 KB, stays in the first-level cache
constexpr int64_t kRanks = 64;     // ranks of one shrink product
constexpr int64_t kSumRanks = int64_t{kRankBlock} * kMaxLanes;  // ranks whose sums `Scratch::lanes` holds

using Words = uint32_t;  // pairs of bfloat16

LOWRANK_INLINE int64_t padded_rows(int64_t rows) { return rows <= 16 ? 16 : 32; }
LOWRANK_INLINE VU high_half(V v) { return bf16_bits(v) & 0xffff0000u; }
LOWRANK_INLINE VU pair_words(V first, V second) { return (bf16_bits(first) >> 16) | high_half(second); }

struct Buffers {   // of one thread, in Scratch::rows
  float* product;  // [32][kColumns] float32
  Words* x;        // [32][kColumns / 2], rows as they are
  Words* pairs;    // [16][kColumns], pairs of rows
};

static Buffers buffers() {
  float* rows = scratch().rows;
  Words* words = reinterpret_cast<Words*>(rows + kTileRows * kColumns);
  return {rows, words, words + kTileRows * kColumns / 2};
}

// ---------------------------------------------------------------------------------------------- panels

static int64_t pairs_ld(int64_t k) { return round_up(k, 16); }
static int64_t pairs_floats(int64_t k, int64_t columns) { return round_up(columns, kUnit) / 2 * pairs_ld(k); }

// One factor into ranks [offset, ld) of the words [columns / 2][ld]; what lies behind its ranks becomes zero or is
// left.
static void pack_pairs_of(const Factor& f, int64_t begin, int64_t end, float* words, int64_t offset, int64_t ld) {
  with_dtype(f, [&](auto dtype, const auto* data) {
    for (int64_t rank = 0; rank < f.k; rank += kLanes)
      for (int64_t d = begin; d < end; d += kUnit) {
        alignas(64) float tile[kLanes * kUnit];  // rank by rank, even columns before odd ones
        V w[kLanes];
        pack_unit<BF16, decltype(dtype)>(data, f, rank, d, kLanes, [&](int64_t j) { return tile + j * kUnit; });
        for (int i = 0; i < kLanes; ++i) w[i] = (V)pair_words(load(tile + i * kUnit), load(tile + i * kUnit + kLanes));
        transpose(w);
        float* to = words + (d - begin) / 2 * ld + offset + rank;
        for (int i = 0; i < kLanes; ++i) store1_tail<F32>(to + i * ld, ld - offset - rank, w[i]);
      }
  });
}

static Panel pack_pairs(const Factor* stack, int64_t count, int64_t begin, int64_t end, float* memory) {
  int64_t k = 0, offset = 0, written = 0;
  for (int64_t i = 0; i < count; ++i) k += stack[i].k;
  const int64_t ld = pairs_ld(k), lines = round_up(end - begin, kUnit) / 2;
  for (int64_t i = 0; i < count; ++i) {
    pack_pairs_of(stack[i], begin, end, memory, offset, ld);
    written = offset + round_up(stack[i].k, kLanes);
    offset += stack[i].k;
  }
  if (written < ld)
    for (int64_t i = 0; i < lines; ++i) std::memset(memory + i * ld + written, 0, (ld - written) * sizeof(float));
  return rows_of_ranks<float>(memory - begin / 2 * ld, ld, kUnit);
}

static Panel pack_twice(const Factor* stack, int64_t count, int64_t begin, int64_t end, float* memory) {
  const Panel panel = pack<F32, Layout::rows>(stack, count, begin, end, memory);
  int64_t k = 0;
  for (int64_t i = 0; i < count; ++i) k += stack[i].k;
  for (int64_t rank = 0; rank < pad_rank(k); ++rank)
    for (int64_t d = 0; d < end - begin; d += kLanes) {
      float* p = memory + rank * panel.step + d;
      const VU high = high_half(load(p));
      store(p, (V)(high | (high >> 16)));
    }
  return panel;
}

// ---------------------------------------------------------------------------------------------- activations

struct Chunk {  // up to kColumns columns of up to kTileRows rows
  int64_t rows, begin, columns;
  __mmask32 keep[kTileRows][kColumns / 32];  // the elements that exist and that dropout keeps
  int64_t width() const { return round_up(columns, 32); }
};

static Chunk chunk_of(int64_t rows, int64_t begin, int64_t columns, const Dropout& drop, int64_t first_row) {
  Chunk c{rows, begin, columns, {}};
  float* m = scratch().multipliers;
  for (int64_t row = 0; row < rows; ++row) {
    if (drop.on) dropout_row(drop, first_row + row, begin, columns, m);
    for (int64_t d = 0; d < columns; d += 32) {
      __mmask32 exist = columns - d < 32 ? (1u << (columns - d)) - 1 : ~0u;
      if (drop.on) {
        const __mmask16 low = _mm512_cmp_ps_mask((__m512)load(m + d), _mm512_setzero_ps(), _CMP_NEQ_OQ);
        const __mmask16 high = _mm512_cmp_ps_mask((__m512)load(m + d + 16), _mm512_setzero_ps(), _CMP_NEQ_OQ);
        exist &= low | __mmask32(high) << 16;
      }
      c.keep[row][d / 32] = exist;
    }
  }
  return c;
}

LOWRANK_INLINE __m512i elements(const Matrix& x, const Chunk& c, int64_t row, int64_t d) {  // 32, zeros where not kept
  return _mm512_maskz_loadu_epi16(c.keep[row][d / 32], row_of<BF16>(x, row, c.begin + d));
}

// Rows as they are, zeros behind them: [padded_rows][kColumns].
static void copy_rows(const Matrix& x, const Chunk& c, Words* out) {
  for (int64_t row = 0; row < padded_rows(c.rows); ++row)
    for (int64_t d = 0; d < c.width(); d += 32)
      _mm512_storeu_si512(out + (row * kColumns + d) / 2,
                          row < c.rows ? elements(x, c, row, d) : _mm512_setzero_si512());
}

// Rows 2 i and 2 i + 1 as the halves of words: [kTileRows / 2][kColumns].
static void pair_rows(const Matrix& x, const Chunk& c, Words* out) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t row = 0; row < kTileRows; row += 2)
    for (int64_t d = 0; d < c.width(); d += 32) {
      const __m512i zero = _mm512_setzero_si512();
      const __m512i a = row < c.rows ? elements(x, c, row, d) : zero;
      const __m512i b = row + 1 < c.rows ? elements(x, c, row + 1, d) : zero;
      Words* to = out + row / 2 * kColumns + d;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
      _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(a, high, b));
    }
}

// ---------------------------------------------------------------------------------------------- z

// What hi leaves of v; zero where hi is not finite, for inf - inf would turn it into NaN.
LOWRANK_INLINE V low_part(V v, V hi) { return select(((VI)hi & 0x7f800000) != 0x7f800000, v - hi, V{}); }

// (hi, lo) of scale * z: [padded_rows][k] words.
static void split_z(const float* z, int64_t rows, int64_t k, float scale, float* words) {
  const int64_t count = rows * k;  // rows follow each other without a gap
  for (int64_t i = 0; i < count; i += kLanes) {
    const V v = load1_tail<F32>(z + i, count - i) * scale;
    const VU hi = high_half(v);
    store1_tail<F32>(words + i, count - i, (V)((hi >> 16) | high_half(low_part(v, (V)hi))));
  }
  std::memset(words + count, 0, (padded_rows(rows) - rows) * k * sizeof(float));
}

// scale * z^T in bfloat16, zeros behind its rows: [k][2][kTileRows], hi and then lo as in split_z.
static void transpose_z(const float* z, int64_t rows, int64_t k, float scale, uint16_t* out) {
  for (int64_t rank = 0; rank < k; rank += kLanes)
    for (int64_t row = 0; row < kTileRows; row += kLanes) {
      V v[kLanes];
      for (int i = 0; i < kLanes; ++i)
        v[i] = row + i < rows ? load1_tail<F32>(z + (row + i) * k + rank, k - rank) * scale : V{};
      transpose(v);
      for (int i = 0; i < kLanes && rank + i < k; ++i) {
        uint16_t* to = out + (rank + i) * 2 * kTileRows + row;
        const V hi = (V)high_half(v[i]);
        BF16::store1(to, hi);
        BF16::store1(to + kTileRows, low_part(v[i], hi));
      }
    }
}

LOWRANK_INLINE float keep_scale(const Dropout& drop) { return drop.on ? drop.keep_scale : 1.0f; }

// ---------------------------------------------------------------------------------------------- the products

// sums [ranks / kRanks][padded_rows][kRanks] (+)= the chunk's columns of x times ranks [rank, rank + ranks) of P
static void shrink_chunk(const Matrix& x, const Chunk& c, const Dropout& drop, Panel P, int64_t rank, int64_t ranks,
                         float* sums) {
  const int64_t m = padded_rows(c.rows);
  const void* rows = row_of<BF16>(x, 0, c.begin);
  int64_t stride = x.stride;
  if (drop.on || c.rows != m || c.columns != c.width() || stride < c.columns) {
    rows = buffers().x;
    stride = kColumns;
    copy_rows(x, c, buffers().x);
  }
  for (int64_t i = 0; i < ranks; i += kRanks) {
    const int64_t n = P.step - rank - i < kRanks ? P.step - rank - i : kRanks;
    brgemm(m, n, c.width(), stride, P.step, kRanks, c.begin > 0, rows, P.data + c.begin / 2 * P.step + rank + i,
           sums + i * m);
  }
}

static void store_sums(const float* sums, int64_t rows, int64_t rank, int64_t ranks, float scale, float* t, int64_t k) {
  const int64_t m = padded_rows(rows);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < ranks; i += kLanes)
      store1_tail<F32>(t + row * k + rank + i, ranks - i,
                       load(sums + i / kRanks * kRanks * m + row * kRanks + i % kRanks) * scale);
}

static void shrink(const Matrix& x, int64_t rows, Panel P, int64_t k, float* t, const Dropout& drop, int64_t first_row,
                   int64_t from, int64_t to) {
  const TileGuard guard;
  float* sums = scratch().lanes;
  for (int64_t rank = 0; rank < k; rank += kSumRanks) {
    const int64_t ranks = k - rank < kSumRanks ? k - rank : kSumRanks;
    for (int64_t begin = from; begin < to; begin += kColumns) {
      const Chunk c = chunk_of(rows, begin, to - begin < kColumns ? to - begin : kColumns, drop, first_row);
      shrink_chunk(x, c, drop, P, rank, ranks, sums);
    }
    if (to == x.cols) store_sums(sums, rows, rank, ranks, keep_scale(drop), t, k);
  }
}

// out = y + C, or C where dropout kept the element
static void expand_chunk(const Matrix* y, const Matrix& out, const Chunk& c, const float* z, Panel P, int64_t k) {
  float* product = buffers().product;
  brgemm(padded_rows(c.rows), c.width(), 2 * k, 2 * k, P.step, kColumns, false, z, P.data + c.begin, product);
  for (int64_t row = 0; row < c.rows; ++row)
    for (int64_t d = 0; d < c.width(); d += 32) {
      V a = load(product + row * kColumns + d), b = load(product + row * kColumns + d + 16);
      if (y) {
        const __m512i words = elements(*y, c, row, d);
        a = (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(words)), 16) + a;
        b = (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(words, 1)), 16) + b;
      }
      const __m512i rounded =
          _mm512_maskz_mov_epi16(c.keep[row][d / 32], (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
      const __mmask32 exist = c.columns - d < 32 ? (1u << (c.columns - d)) - 1 : ~0u;
      _mm512_mask_storeu_epi16(row_of<BF16>(out, row, c.begin + d), exist, rounded);
    }
}

// sums (+)= z^T x; z as transpose_z leaves it
static void outer_chunk(const Matrix& x, const Chunk& c, const uint16_t* z, int64_t k, const Sums& sums,
                        bool accumulate) {
  Words* pairs = buffers().pairs;
  pair_rows(x, c, pairs);
  brgemm(k, c.width(), kTileRows, 2 * kTileRows, kColumns, sums.step, accumulate, z, pairs, sums.data + c.begin);
  brgemm(k, c.width(), kTileRows, 2 * kTileRows, kColumns, sums.step, true, z + kTileRows, pairs, sums.data + c.begin);
}

static void expand_outer_columns(const Matrix* y, const Matrix* out, const Matrix* x, int64_t rows, const float* z,
                                 Panel P, int64_t k, const Sums& sums, bool accumulate, int64_t from, int64_t to,
                                 const Dropout& drop, int64_t first_row) {
  const TileGuard guard;
  float* halves = grouped_scratch(2 * kTileRows * k);
  uint16_t* transposed = reinterpret_cast<uint16_t*>(halves + kTileRows * k);
  if (out) split_z(z, rows, k, keep_scale(drop), halves);
  if (sums.data) transpose_z(z, rows, k, keep_scale(drop), transposed);
  for (int64_t begin = from; begin < to; begin += kColumns) {
    const Chunk c = chunk_of(rows, begin, to - begin < kColumns ? to - begin : kColumns, drop, first_row);
    if (out) expand_chunk(y, *out, c, halves, P, k);
    if (sums.data) outer_chunk(*x, c, transposed, k, sums, accumulate);
  }
}

// ---------------------------------------------------------------------------------------------- the table

static void expand(const Matrix* y, const Matrix& out, int64_t rows, const float* z, Panel P, int64_t k, int64_t begin,
                   int64_t end, const Dropout& drop, int64_t first_row) {
  expand_outer_columns(y, &out, nullptr, rows, z, P, k, {}, false, begin, end, drop, first_row);
}

static void outer(const Matrix& x, int64_t rows, const float* z, int64_t k, const Sums& sums, bool accumulate,
                  int64_t begin, int64_t end, const Dropout& drop, int64_t first_row) {
  expand_outer_columns(nullptr, nullptr, &x, rows, z, {}, k, sums, accumulate, begin, end, drop, first_row);
}

static void expand_outer(const float* z, Panel P, int64_t k, const Matrix* dx, const Matrix* x, int64_t rows,
                         const Sums& sums, bool accumulate, const Dropout& drop, int64_t first_row) {
  expand_outer_columns(nullptr, dx, x, rows, z, P, k, sums, accumulate, 0, dx ? dx->cols : x->cols, drop, first_row);
}

static void shrink_outer(const Matrix& g, int64_t rows, Panel P, int64_t k, float* u, const float* z, int64_t z_k,
                         const Sums& sums, bool accumulate) {
  const Dropout none{};
  if (!u || !sums.data || k > kSumRanks) {  // nothing to fuse, or more ranks than the scratch holds
    if (u) shrink(g, rows, P, k, u, none, 0, 0, g.cols);
    if (sums.data) outer(g, rows, z, z_k, sums, accumulate, 0, g.cols, none, 0);
    return;
  }
  const TileGuard guard;
  float* products = scratch().lanes;
  uint16_t* transposed = reinterpret_cast<uint16_t*>(grouped_scratch(kTileRows * z_k));
  transpose_z(z, rows, z_k, 1.0f, transposed);
  for (int64_t begin = 0; begin < g.cols; begin += kColumns) {
    const Chunk c = chunk_of(rows, begin, g.cols - begin < kColumns ? g.cols - begin : kColumns, none, 0);
    shrink_chunk(g, c, none, P, 0, k, products);
    outer_chunk(g, c, transposed, z_k, sums, accumulate);
  }
  store_sums(products, rows, 0, k, 1.0f, u, k);
}

// One row takes the same way as many: other bits otherwise.
static bool shrink_row(const Matrix&, const Factor*, int64_t, float*) { return false; }

static bool expand_row(const Matrix*, const Matrix&, const float*, const Factor*, int64_t, int64_t, int64_t) {
  return false;
}

static bool outer_direct(const Matrix&, int64_t, const float*, const Factor&, int64_t, int64_t) { return false; }

static int64_t row_floats(int64_t k, int64_t d) { return panel_floats<Layout::rows>(k, d); }
static Sums rows_in(float* memory, int64_t, int64_t d) { return rows_of_sums(memory, panel_ld(d), kUnit); }

constexpr PanelFormat kPairs = {pairs_floats, pack_pairs, false},
                      kTwice = {panel_floats<Layout::rows>, pack_twice, false};

}  // namespace

namespace lowrank {
extern const Kernels kernels_amx;
const Kernels kernels_amx = {kUnit,      kTileRows,    kTileRows,    kTileRows,    kPairs,     kTwice, kUnit,
                             row_floats, rows_in,      unpack<F32>,  shrink,       shrink_row, expand, expand_row,
                             outer,      outer_direct, shrink_outer, expand_outer, softmax,    nullptr};
}  // namespace lowrank

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
