// Tiles in shared memory: how they are loaded, multiplied and masked.
//
// A tile is row-major with a leading dimension of its width plus 16 bytes, which makes the eight row addresses of an
// ldmatrix fall into eight different bank groups. Accumulators are in the C layout of mma.m16n8k16 for every dtype
// (float32 too, where plain FMA fills them): lane 4 g + q holds rows g and g + 8, columns 2 q and 2 q + 1.
#pragma once
#include "simt.cuh"
#include "types.h"

namespace lowrank {
namespace LOWRANK_ARCH {

template <class E>
struct Element;
template <>
struct Element<float> {
  static constexpr int kChunk = 4;  // elements per 16 bytes
  static constexpr int kStep = 4;   // depth of one multiplication step
};
template <>
struct Element<Bf16> {
  static constexpr int kChunk = 8, kStep = 16;
  SIMT_DEVICE static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_bf16(c, a, b0, b1);
  }
};
template <>
struct Element<F16> {
  static constexpr int kChunk = 8, kStep = 16;
  SIMT_DEVICE static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_f16(c, a, b0, b1);
  }
};

template <class E>
SIMT_HD constexpr int padded(int width) {
  return width + 16 / static_cast<int>(sizeof(E));
}

SIMT_HD constexpr size_t max_bytes(size_t a, size_t b) { return a > b ? a : b; }

// Row and column of accumulator element i (0..3) of this lane in its 16 x 8 tile.
SIMT_DEVICE int fragment_row(int i) { return lane_id() / 4 + 8 * (i >> 1); }
SIMT_DEVICE int fragment_column(int i) { return 2 * (lane_id() % 4) + (i & 1); }

// Two neighbours in a row: what a lane holds of an accumulator tile's row, moved by one access.
template <class E>
struct alignas(2 * sizeof(E)) Pair {
  E low, high;
};
template <class E>
SIMT_DEVICE void store_pair(E* at, float low, float high) {
  *reinterpret_cast<Pair<E>*>(at) = {rounded<E>(low), rounded<E>(high)};
}

// ------------------------------------------------------------------------------------------------ activations

// tile [rows_max, cols_max] <- source [rows, cols] (row_stride elements apart), zero outside. `source` is the tile's
// origin, `base` any valid aligned address of the tensor. `vec`: rows are aligned to 16 bytes, so cp.async may be used;
// the caller commits and waits. Without it the elements are copied one by one and only a barrier is needed.
template <class E, int rows_max, int cols_max, int threads>
SIMT_DEVICE void load_tile(E* tile, const E* source, const E* base, int64_t row_stride, int rows, int cols, bool vec) {
  constexpr int ld = padded<E>(cols_max), chunk = Element<E>::kChunk;
  if (vec) {
    SIMT_NO_UNROLL
    for (int i = thread_id(); i < rows_max * (cols_max / chunk); i += threads) {
      int row = i / (cols_max / chunk), col = i % (cols_max / chunk) * chunk;
      int valid = row < rows ? cols - col : 0;
      valid = valid < 0 ? 0 : valid > chunk ? chunk : valid;
      cp_async_16(&tile[row * ld + col], valid ? source + row * row_stride + col : base,
                  valid * static_cast<int>(sizeof(E)));
    }
  } else {
    SIMT_NO_UNROLL
    for (int i = thread_id(); i < rows_max * cols_max; i += threads) {
      int row = i / cols_max, col = i % cols_max;
      tile[row * ld + col] = row < rows && col < cols ? source[row * row_stride + col] : rounded<E>(0.0f);
    }
  }
}

// target [rows, cols] <- tile, 16 bytes at a time where the target is aligned and the chunk is whole.
template <class E, int rows_max, int cols_max, int threads>
SIMT_DEVICE void store_tile(E* target, int64_t row_stride, const E* tile, int rows, int cols, bool vec) {
  constexpr int ld = padded<E>(cols_max), chunk = Element<E>::kChunk;
  SIMT_NO_UNROLL
  for (int i = thread_id(); i < rows_max * (cols_max / chunk); i += threads) {
    int row = i / (cols_max / chunk), col = i % (cols_max / chunk) * chunk;
    if (row >= rows) continue;
    if (vec && col + chunk <= cols) {
      store16(target + row * row_stride + col, load16(&tile[row * ld + col]));
    } else {
      for (int c = col; c < col + chunk && c < cols; c++) target[row * row_stride + c] = tile[row * ld + c];
    }
  }
}

// ------------------------------------------------------------------------------------------------ factors

// How a factor's tile is fetched; decided once per launch on the host (factor_access in plan.cuh).
enum FactorAccess : int32_t {
  kAsync = 0,      // cp.async: dtype of the activations, contiguous and aligned along the tile's rows
  kConvert = 1,    // four float32 at a time, converted on the way
  kAlongTile = 2,  // single elements, neighbours along the tile's rows
  kAcrossTile = 3  // single elements, neighbours down the tile's columns (a transposed view)
};

SIMT_DEVICE int64_t factor_offset(const Factor& f, int k, int n) {
  return (k / f.group) * f.group_stride + (k % f.group) * f.rank_stride + n * f.n_stride;
}

// The factor of this block's segment (grid z).
template <class E>
SIMT_DEVICE Factor of_segment(Factor f, int64_t segment_stride) {
  f.data =
      static_cast<const char*>(f.data) + block_id().z * segment_stride * static_cast<int64_t>(f.wide ? 4 : sizeof(E));
  return f;
}

template <class E>
SIMT_DEVICE E factor_element(const Factor& f, int k, int n) {
  int64_t at = factor_offset(f, k, n);
  return f.wide ? rounded<E>(static_cast<const float*>(f.data)[at]) : static_cast<const E*>(f.data)[at];
}

template <class E>
SIMT_DEVICE float factor_value(const Factor& f, int k, int n) {
  int64_t at = factor_offset(f, k, n);
  return f.wide ? static_cast<const float*>(f.data)[at] : to_float(static_cast<const E*>(f.data)[at]);
}

// Element (k, n) of two factors stacked along the rank: `upper` takes over at `split`.
template <class E>
SIMT_DEVICE E stacked_element(const Factor& f, const Factor& upper, int split, int k, int n) {
  return k < split ? factor_element<E>(f, k, n) : factor_element<E>(upper, k - split, n);
}

// tile <- factor elements k in [0, rank_max), n in [n0, n0 + n_max), zero where k >= rank or n >= n_total.
// rank_rows: the tile is [rank_max, n_max] (as shrink's A), otherwise [n_max, rank_max] (as expand's B).
template <class E, bool rank_rows, int rank_max, int n_max, int threads>
SIMT_DEVICE void load_factor(E* tile, const Factor& f, const Factor& upper, int split, int rank, int n0, int n_total,
                             int access) {
  constexpr int rows = rank_rows ? rank_max : n_max, cols = rank_rows ? n_max : rank_max, ld = padded<E>(cols);
  const int row_limit = rank_rows ? rank : n_total - n0, col_limit = rank_rows ? n_total - n0 : rank;
  if (access == kAsync || access == kConvert) {
    const int chunk = access == kAsync ? Element<E>::kChunk : 4;
    const int per_row = cols / chunk;
    SIMT_NO_UNROLL
    for (int i = thread_id(); i < rows * per_row; i += threads) {
      int row = i / per_row, col = i % per_row * chunk;
      int valid = row < row_limit ? col_limit - col : 0;
      valid = valid < 0 ? 0 : valid > chunk ? chunk : valid;
      int k = rank_rows ? row : col, n = n0 + (rank_rows ? col : row);
      const bool high = k >= split;
      const void* data = high ? upper.data : f.data;
      int64_t at = 0;
      if (valid) at = high ? factor_offset(upper, k - split, n) : factor_offset(f, k, n);
      if (access == kAsync) {
        cp_async_16(&tile[row * ld + col], static_cast<const E*>(data) + at, valid * static_cast<int>(sizeof(E)));
      } else {
        const float* source = static_cast<const float*>(data) + at;
        float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (valid == 4) {
          Vec16 four = load16(source);
          SIMT_UNROLL
          for (int j = 0; j < 4; j++) v[j] = bits_to_float(four.word[j]);
        } else {
          SIMT_UNROLL
          for (int j = 0; j < 4; j++)
            if (j < valid) v[j] = source[j];
        }
        SIMT_UNROLL
        for (int j = 0; j < 4; j++) tile[row * ld + col + j] = rounded<E>(v[j]);
      }
    }
    return;
  }
  SIMT_NO_UNROLL
  for (int i = thread_id(); i < rows * cols; i += threads) {
    int row = access == kAlongTile ? i / cols : i % rows, col = access == kAlongTile ? i % cols : i / rows;
    int k = rank_rows ? row : col, n = n0 + (rank_rows ? col : row);
    tile[row * ld + col] =
        row < row_limit && col < col_limit ? stacked_element<E>(f, upper, split, k, n) : rounded<E>(0.0f);
  }
}

// ------------------------------------------------------------------------------------------------ multiplication

// Operand of one 16-deep step for tensor cores. `along_k`: the tile is stored [m, k] (or [n, k]); else [k, m] (or [k,
// n]), and the matrices are transposed on the way. A: regs 0..3 = (m, k) blocks (0,0) (8,0) (0,8) (8,8); B, for 16
// columns: regs 0, 1 = k blocks 0, 8 of columns 0..7; regs 2, 3 of columns 8..15.
template <bool is_a, bool along_k, class E>
SIMT_DEVICE void load_operand(uint32_t (&regs)[4], const E* tile, int ld) {
  const int i = lane_id() % 8, j = lane_id() / 8;
  const int outer = i + 8 * (is_a ? j & 1 : j >> 1), depth = 8 * (is_a ? j >> 1 : j & 1);
  if (along_k) {
    ldmatrix_x4(regs, &tile[outer * ld + depth]);
  } else {
    const int outer_block = 8 * (is_a ? j & 1 : j >> 1);
    ldmatrix_x4_trans(regs, &tile[(i + depth) * ld + outer_block]);
  }
}

template <class E, bool a_along_k, bool b_along_k, int m_tiles, int n_tiles>
struct Multiply {
  SIMT_DEVICE static void run(float (&acc)[m_tiles][n_tiles][4], const E* a, int lda, const E* b, int ldb, int depth) {
    static_assert(n_tiles % 2 == 0, "ldmatrix.x4 fetches two column tiles of B at once");
    SIMT_UNROLL
    for (int k = 0; k < depth; k += 16) {
      uint32_t fa[m_tiles][4];
      SIMT_UNROLL
      for (int m = 0; m < m_tiles; m++)
        load_operand<true, a_along_k>(fa[m], a + (a_along_k ? 16 * m * lda + k : k * lda + 16 * m), lda);
      SIMT_UNROLL
      for (int n = 0; n < n_tiles; n += 2) {
        uint32_t fb[4];
        load_operand<false, b_along_k>(fb, b + (b_along_k ? 8 * n * ldb + k : k * ldb + 8 * n), ldb);
        SIMT_UNROLL
        for (int m = 0; m < m_tiles; m++) {
          Element<E>::mma(acc[m][n], fa[m], fb[0], fb[1]);
          Element<E>::mma(acc[m][n + 1], fa[m], fb[2], fb[3]);
        }
      }
    }
  }
};

// float32: the same accumulators by FMA, four k at a time. A warp's reads of one operand row are broadcasts.
template <bool a_along_k, bool b_along_k, int m_tiles, int n_tiles>
struct Multiply<float, a_along_k, b_along_k, m_tiles, n_tiles> {
  template <bool along_k>
  SIMT_DEVICE static void four(float (&v)[4], const float* tile, int ld, int outer, int k) {
    if (along_k) {
      Vec16 packed = load16(&tile[outer * ld + k]);
      SIMT_UNROLL
      for (int j = 0; j < 4; j++) v[j] = bits_to_float(packed.word[j]);
    } else {
      SIMT_UNROLL
      for (int j = 0; j < 4; j++) v[j] = tile[(k + j) * ld + outer];
    }
  }
  SIMT_DEVICE static void run(float (&acc)[m_tiles][n_tiles][4], const float* a, int lda, const float* b, int ldb,
                              int depth) {
    const int g = lane_id() / 4, q = lane_id() % 4;
    SIMT_NO_UNROLL
    for (int k = 0; k < depth; k += 4) {
      float va[m_tiles][2][4];
      SIMT_UNROLL
      for (int m = 0; m < m_tiles; m++) {
        four<a_along_k>(va[m][0], a, lda, 16 * m + g, k);
        four<a_along_k>(va[m][1], a, lda, 16 * m + g + 8, k);
      }
      SIMT_UNROLL
      for (int n = 0; n < n_tiles; n++) {
        float vb[2][4];
        four<b_along_k>(vb[0], b, ldb, 8 * n + 2 * q, k);
        four<b_along_k>(vb[1], b, ldb, 8 * n + 2 * q + 1, k);
        SIMT_UNROLL
        for (int m = 0; m < m_tiles; m++) {
          SIMT_UNROLL
          for (int i = 0; i < 4; i++) {
            SIMT_UNROLL
            for (int j = 0; j < 4; j++) acc[m][n][i] += va[m][i >> 1][j] * vb[i & 1][j];
          }
        }
      }
    }
  }
};

// acc [16 m_tiles, 8 n_tiles] += a b over `depth` (a multiple of the step): a is [m, k] in memory if a_along_k, else
// [k, m]; b is [n, k] if b_along_k, else [k, n]. One warp.
template <bool a_along_k, bool b_along_k, class E, int m_tiles, int n_tiles>
SIMT_DEVICE void multiply(float (&acc)[m_tiles][n_tiles][4], const E* a, int lda, const E* b, int ldb, int depth) {
  Multiply<E, a_along_k, b_along_k, m_tiles, n_tiles>::run(acc, a, lda, b, ldb, depth);
}

template <int m_tiles, int n_tiles>
SIMT_DEVICE void clear(float (&acc)[m_tiles][n_tiles][4]) {
  SIMT_UNROLL
  for (int m = 0; m < m_tiles; m++) {
    SIMT_UNROLL
    for (int n = 0; n < n_tiles; n++) {
      SIMT_UNROLL
      for (int i = 0; i < 4; i++) acc[m][n][i] = 0.0f;
    }
  }
}

// ------------------------------------------------------------------------------------------------ dropout

struct Philox4 {
  uint32_t word[4];
};

// Philox4x32-10 (Salmon et al., SC'11).
SIMT_DEVICE Philox4 philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  SIMT_UNROLL
  for (int round = 0; round < 10; round++) {
    uint32_t high0 = multiply_high(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    uint32_t high1 = multiply_high(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Zeroes the dropped elements of a tile whose origin is (row0, col0) of x; col0 is a multiple of 64. Columns 64 q + 16
// w + l of row i take word w of counter (16 q + l, i, i >> 32, stream), so one Philox call masks four columns.
template <class E, int rows_max, int cols_max, int threads>
SIMT_DEVICE void drop_tile(E* tile, int64_t row0, int col0, int rows, const Dropout& d) {
  static_assert(cols_max % 64 == 0, "the mask is laid out in blocks of 64 columns");
  constexpr int ld = padded<E>(cols_max), counters = cols_max / 4;
  const uint64_t key = static_cast<uint64_t>(d.seed[0]), stream = static_cast<uint64_t>(d.seed[1]);
  SIMT_NO_UNROLL
  for (int i = thread_id(); i < rows_max * counters; i += threads) {
    int row = i / counters, q = i % counters / 16, l = i % 16;
    if (row >= rows) continue;
    uint64_t at = static_cast<uint64_t>(row0 + row);
    Philox4 random = philox(static_cast<uint32_t>(16 * (col0 / 64 + q) + l), static_cast<uint32_t>(at),
                            static_cast<uint32_t>(at >> 32), static_cast<uint32_t>(stream), static_cast<uint32_t>(key),
                            static_cast<uint32_t>(key >> 32));
    SIMT_UNROLL
    for (int w = 0; w < 4; w++)
      if (random.word[w] < d.threshold) tile[row * ld + 64 * q + 16 * w + l] = rounded<E>(0.0f);
  }
}

}  // namespace LOWRANK_ARCH
}  // namespace lowrank
