// The column kernel: everything that needs a tensor of shape [T, cols] in backward, from one tile of it in shared
// memory.
//
//   pass 1 (kRows):  X = g, Z = t, W = B:   dB partial += g^T t     and   u partial = s g B     (one read of g)
//   pass 2 (kOut):   X = x, Z = u, W = A:   dA partial += x^T u     and   dx = u A     (one read of x, one write of dx)
//
// kClusterRows is kRows on sm_90 and later: the blocks of up to 8 neighbouring column slices form a cluster and add
// their shares of u through distributed shared memory, so that one partial leaves per cluster; a cluster that covers
// all columns writes u itself.
//
// A block owns `block_n` columns and a range of rows, which it walks in tiles of 32 rows through a ring of cp.async
// stages. The tile X [32, block_n] feeds X^T Z through ldmatrix.trans and X W through plain ldmatrix; the accumulators
// of X^T Z stay in registers over the whole walk. W [block_n, R] is loaded once. Sums over columns (u) and over rows
// (dA, dB) leave as fp32 partials, [column slice, T, rank] and [row split, cols, rank], and are added in a fixed order
// by reduce.cuh: no atomics, same bits every run. Partial traffic of u relative to one read of g: 8 rank / (block_n *
// element size), by a cluster of n blocks an n-th of it.
//
// Grid: (column slices, row splits, segments). A segment is a range of rows with its own W and its own sums.
#pragma once
#include "tile.cuh"

namespace lowrank {
namespace LOWRANK_ARCH {

enum ColumnMode { kRows = 1, kOut = 2, kClusterRows = 3 };

struct ColumnParams {
  const void* x;  // [T, cols]; not read when grad and row_sums are null
  int64_t x_stride;
  // Z is [z | z_upper], divided at z_rank, or with token weights w (x) z.
  const float* z;          // [T, z_rank] fp32
  const float* z_upper;    // [T, rank - z_rank] fp32
  const float* z_weights;  // [T, rank / z_rank], or null
  Factor W, W_upper;       // [rank, cols]
  int64_t W_segment_stride;
  float* grad;                                           // [segments * splits, cols, rank], or null
  float* row_sums;                                       // [slices or clusters, T, rank] = scale * X W, or null
  void* out;                                             // kOut: [T, cols], or null
  int64_t out_stride, tokens, segment_rows, split_rows;  // split_rows: multiple of 32
  int cols, rank, z_rank, W_split, W_access;
  int x_vec, out_vec;
  float scale;     // also of kOut: out = scale * Z W
  int accumulate;  // kOut: add to out instead of replacing it
  int blocks;      // kClusterRows: of a cluster
  Dropout drop_x, drop_out;
};

// 256 threads; bytes = W: block_n (R + pad) + stages * (X: 32 (block_n + pad) + Z: 32 (R + pad)) + sums of 4 warps for
// u: 4 * 32 * R floats (kRows, R <= 32; above that u comes from the row kernel, whose second read of g costs less than
// partials).
//
//   R    block_n (16-bit / fp32)  16-bit bytes: W + ring + sums          accumulators: X^T Z + larger of (u, out)
//   16   256 / 128                12288 + 3 * 18432 + 8192  = 75776      16 + 16
//   32   256 / 128                20480 + 3 * 19456 + 16384 = 95232      32 + 16
//   64   256 / 128                36864 + 2 * 21504 + 0     = 79872      64 + 16
//   128  128 / 64                 34816 + 2 * 17408 + 0     = 69632      64 + 16
//
// kClusterRows has three stages and the sums for every R, and two buffers for shares of u: 2 * 32 R floats more.
//
//   16   75776 + 4096 = 79872     32   95232 + 8192 = 103424     64   134144 + 16384 = 150528
//   128  152576 + 32768 = 185344 (fp32 208896)                   accumulators with R / 2 for u: at most 64 + 64
//
// Compiled (nvcc 13.0)          shared bytes   registers on sm_80, sm_90, sm_100
//   column_kernel<Bf16, 16, 1>   75776          68, 68, 92
//   column_kernel<Bf16, 32, 1>   95232          96, 96, 116
//   column_kernel<Bf16, 64, 1>   43008          132, 132, 142
//   column_kernel<Bf16, 128, 1>  34816          138, 143, 161
//   column_kernel<Bf16, 16, 2>   67584          71, 71, 94
//   column_kernel<Bf16, 32, 2>   78848          96, 96, 118
//   column_kernel<Bf16, 64, 2>   79872          139, 139, 156
//   column_kernel<Bf16, 128, 2>  69632          151, 155, 171
//   column_kernel<Bf16, 16, 3>   79872          -, 64, 94
//   column_kernel<Bf16, 32, 3>   103424         -, 96, 116
//   column_kernel<Bf16, 64, 3>   150528         -, 159, 178
//   column_kernel<Bf16, 128, 3>  185344         -, 190, 204
template <class E, int R, int mode>
struct ColumnTuning {
  static constexpr int threads = 256, warps = 8, block_m = 32, stages = R > 32 && mode != kClusterRows ? 2 : 3;
  static constexpr int block_n = (R > 64 ? 256 : 512) / static_cast<int>(sizeof(E));
  static constexpr bool has_row_sums = mode == kClusterRows || (mode == kRows && R <= 32);
  static constexpr int ld_n = padded<E>(block_n), ld_r = padded<E>(R);
  // X^T Z: 16-column tiles of X are divided among groups of warps; warps of one group divide the rank.
  static constexpr int column_tiles = block_n / 16, column_groups = column_tiles < warps ? column_tiles : warps;
  static constexpr int rank_groups = warps / column_groups;
  static constexpr int grad_m = column_tiles / column_groups, grad_n = R / 8 / rank_groups;
  static_assert(grad_n % 2 == 0, "two rank tiles per step");
  static constexpr bool has_w = has_row_sums || mode == kOut;
  static constexpr size_t w_bytes = has_w ? block_n * ld_r * sizeof(E) : 0;
  static constexpr size_t x_bytes = block_m * ld_n * sizeof(E), z_bytes = block_m * ld_r * sizeof(E);
  static constexpr size_t stage = x_bytes + z_bytes;
  static constexpr size_t sums = has_row_sums ? 4 * block_m * R * sizeof(float) : 0;
  static constexpr size_t share = mode == kClusterRows ? block_m * R * sizeof(float) : 0;
  static constexpr size_t shared_bytes = w_bytes + stages * stage + sums + 2 * share;
  static_assert(shared_bytes <= (mode == kClusterRows ? 227 : 99) * 1024, "sm_86 and sm_89: 99 KiB, sm_90: 227 KiB");
};

// Z tile [32, R] <- z rows, converted; w (x) z for token routing; zero outside.
template <class E, int R, int mode>
SIMT_DEVICE void load_hidden(const ColumnParams& p, E* tile, int64_t row0, int rows) {
  using C = ColumnTuning<E, R, mode>;
  SIMT_NO_UNROLL
  for (int i = thread_id(); i < C::block_m * R; i += C::threads) {
    int row = i / R, k = i % R;
    float z = 0.0f;
    if (row < rows && k < p.rank) {
      const int64_t at = row0 + row;
      if (p.z_weights) {
        z = p.z[at * p.z_rank + k % p.z_rank] * p.z_weights[at * (p.rank / p.z_rank) + k / p.z_rank];
      } else {
        z = k < p.z_rank ? p.z[at * p.z_rank + k] : p.z_upper[at * (p.rank - p.z_rank) + k - p.z_rank];
      }
    }
    tile[row * C::ld_r + k] = rounded<E>(z);
  }
}

// sums [4, 32, R] <- X W by quarters of the columns: warps 0..3 and 4..7 take the two 16-row tiles. Ends with a
// barrier.
template <class C, int R, class E>
SIMT_DEVICE void multiply_columns(const E* x_tile, const E* w_tile, float* sums) {
  constexpr int depth = C::block_n / 4;
  const int m = warp_id() / 4, part = warp_id() % 4;
  float acc[1][R / 8][4];
  clear(acc);
  multiply<true, false>(acc, x_tile + 16 * m * C::ld_n + part * depth, C::ld_n, w_tile + part * depth * C::ld_r,
                        C::ld_r, depth);
  SIMT_UNROLL
  for (int n = 0; n < R / 8; n++) {
    SIMT_UNROLL
    for (int i = 0; i < 4; i += 2)
      store_pair(&sums[(part * C::block_m + 16 * m + fragment_row(i)) * R + 8 * n + fragment_column(i)], acc[0][n][i],
                 acc[0][n][i + 1]);
  }
  sync_block();  // the quarters are written
}

// The sum of the four quarters.
template <class C, int R>
SIMT_DEVICE float quarter_sum(const float* sums, int i) {
  constexpr int step = C::block_m * R;
  return (sums[i] + sums[i + step]) + (sums[i + 2 * step] + sums[i + 3 * step]);
}

// row_sums [slice, rows, rank] <- X W.
template <class E, int R, int mode>
SIMT_DEVICE void sum_columns(const ColumnParams& p, const E* x_tile, const E* w_tile, float* sums, int64_t row0,
                             int rows) {
  using C = ColumnTuning<E, R, mode>;
  multiply_columns<C, R>(x_tile, w_tile, sums);
  float* target = p.row_sums + (block_id().x * p.tokens + row0) * p.rank;
  SIMT_NO_UNROLL
  for (int i = thread_id(); i < C::block_m * R; i += C::threads) {
    int row = i / R, k = i % R;
    if (row < rows && k < p.rank) target[row * p.rank + k] = p.scale * quarter_sum<C, R>(sums, i);
  }
}

// share [32, R] <- X W of this block's columns. Ends with a barrier of the cluster.
template <class C, int R, class E>
SIMT_DEVICE void make_share(const E* x_tile, const E* w_tile, float* sums, float* share) {
  multiply_columns<C, R>(x_tile, w_tile, sums);
  SIMT_NO_UNROLL
  for (int i = thread_id(); i < C::block_m * R; i += C::threads) share[i] = quarter_sum<C, R>(sums, i);
  sync_cluster();  // the shares are complete everywhere
}

// Elements i to i + 3 of the sum of all shares of the cluster, added in rank order.
SIMT_DEVICE void add_shares(float (&sum)[4], const float* share, int i, int blocks) {
  SIMT_UNROLL
  for (int j = 0; j < 4; j++) sum[j] = 0.0f;
  SIMT_NO_UNROLL
  for (int block = 0; block < blocks; block++) {
    const Vec16 part = load16_cluster(&share[i], block);
    SIMT_UNROLL
    for (int j = 0; j < 4; j++) sum[j] += bits_to_float(part.word[j]);
  }
}

// row_sums [cluster, rows, rank] <- X W over the columns of the cluster, whose blocks divide the elements. Its share is
// written again only after the next call's barrier but one, which follows the last reading of it.
template <class E, int R>
SIMT_DEVICE void sum_cluster(const ColumnParams& p, const E* x_tile, const E* w_tile, float* sums, float* share,
                             int64_t row0, int rows) {
  using C = ColumnTuning<E, R, kClusterRows>;
  make_share<C, R>(x_tile, w_tile, sums, share);
  float* target = p.row_sums + (block_id().x / p.blocks * p.tokens + row0) * p.rank;
  SIMT_NO_UNROLL
  for (int i = 4 * (C::threads * cluster_rank() + thread_id()); i < C::block_m * R; i += 4 * C::threads * p.blocks) {
    float sum[4];
    add_shares(sum, share, i, p.blocks);
    const int row = i / R, k = i % R;
    SIMT_UNROLL
    for (int j = 0; j < 4; j++)
      if (row < rows && k + j < p.rank) target[row * p.rank + k + j] = p.scale * sum[j];
  }
}

// tile [32, block_n] <- scale * Z W. Ends with a barrier.
template <class C, int R, class E>
SIMT_DEVICE void multiply_hidden(E* tile, const E* z_tile, const E* w_tile, float scale) {
  SIMT_NO_UNROLL
  for (int c = 16 * warp_id(); c < C::block_n; c += 16 * C::warps) {
    float acc[2][2][4];
    clear(acc);
    multiply<true, true>(acc, z_tile, C::ld_r, w_tile + c * C::ld_r, C::ld_r, R);
    SIMT_UNROLL
    for (int m = 0; m < 2; m++) {
      SIMT_UNROLL
      for (int n = 0; n < 2; n++) {
        SIMT_UNROLL
        for (int i = 0; i < 4; i += 2)
          store_pair(&tile[(16 * m + fragment_row(i)) * C::ld_n + c + 8 * n + fragment_column(i)], scale * acc[m][n][i],
                     scale * acc[m][n][i + 1]);
      }
    }
  }
  sync_block();  // the tile is complete
}

// out <- scale * Z W, made over the x tile (which nobody needs any more) and stored 16 bytes at a time.
template <class E, int R, int mode>
SIMT_DEVICE void write_out(const ColumnParams& p, E* x_tile, const E* z_tile, const E* w_tile, int64_t row0, int rows,
                           int col0) {
  using C = ColumnTuning<E, R, mode>;
  multiply_hidden<C, R>(x_tile, z_tile, w_tile, p.scale);
  if (p.drop_out.seed) {
    drop_tile<E, C::block_m, C::block_n, C::threads>(x_tile, row0, col0, rows, p.drop_out);
    sync_block();
  }
  E* out = static_cast<E*>(p.out) + row0 * p.out_stride + col0;
  if (p.accumulate) {
    SIMT_NO_UNROLL
    for (int i = thread_id(); i < rows * C::block_n; i += C::threads) {
      int row = i / C::block_n, col = i % C::block_n;
      if (col >= p.cols - col0) continue;
      E* at = &out[row * p.out_stride + col];
      *at = rounded<E>(to_float(*at) + to_float(x_tile[row * C::ld_n + col]));
    }
    return;
  }
  store_tile<E, C::block_m, C::block_n, C::threads>(out, p.out_stride, x_tile, rows, p.cols - col0, p.out_vec);
}

// acc += X^T Z: this warp's columns and ranks.
template <class C, class E, class Acc>
SIMT_DEVICE void multiply_rows(Acc& acc, const E* x_tile, const E* z_tile) {
  const int column = 16 * C::grad_m * (warp_id() % C::column_groups),
            k = 8 * C::grad_n * (warp_id() / C::column_groups);
  multiply<false, false>(acc, x_tile + column, C::ld_n, z_tile + k, C::ld_r, C::block_m);
}

// grad [cols, rank] <- the accumulators of X^T Z.
template <class C, class Acc>
SIMT_DEVICE void write_gradient(float* grad, const Acc& acc, int col0, int cols, int rank) {
  const int column_base = col0 + 16 * C::grad_m * (warp_id() % C::column_groups);
  const int rank_base = 8 * C::grad_n * (warp_id() / C::column_groups);
  SIMT_UNROLL
  for (int m = 0; m < C::grad_m; m++) {
    SIMT_UNROLL
    for (int n = 0; n < C::grad_n; n++) {
      SIMT_UNROLL
      for (int i = 0; i < 4; i++) {
        int column = column_base + 16 * m + fragment_row(i), k = rank_base + 8 * n + fragment_column(i);
        if (column < cols && k < rank) grad[int64_t(column) * rank + k] = acc[m][n][i];
      }
    }
  }
}

template <class E, int R, int mode>
SIMT_KERNEL(256, 1)
column_kernel(const ColumnParams p) {
  using C = ColumnTuning<E, R, mode>;
  char* shared = shared_memory();
  E* w_tile = reinterpret_cast<E*>(shared);
  float* sums = reinterpret_cast<float*>(shared + C::w_bytes + C::stages * C::stage);
  float* shares = sums + C::sums / sizeof(float);
  auto x_stage = [&](int i) { return reinterpret_cast<E*>(shared + C::w_bytes + i % C::stages * C::stage); };
  const E* x = static_cast<const E*>(p.x);
  const int col0 = block_id().x * C::block_n;
  const int64_t begin = block_id().z * p.segment_rows + block_id().y * p.split_rows;
  int64_t end = begin + p.split_rows, segment_end = (block_id().z + 1) * p.segment_rows;
  end = end < segment_end ? end : segment_end;
  const int tiles = end > begin ? static_cast<int>((end - begin + C::block_m - 1) / C::block_m) : 0;
  const bool reads_x = p.grad || (C::has_row_sums && p.row_sums);

  auto load = [&](int i) {
    if (i < tiles) {
      int64_t row0 = begin + int64_t(i) * C::block_m;
      int rows = end - row0 < C::block_m ? static_cast<int>(end - row0) : C::block_m;
      E* stage = x_stage(i);
      if (reads_x)
        load_tile<E, C::block_m, C::block_n, C::threads>(stage, x + row0 * p.x_stride + col0, x, p.x_stride, rows,
                                                         p.cols - col0, p.x_vec);
      if (mode == kOut || p.grad) load_hidden<E, R, mode>(p, stage + C::block_m * C::ld_n, row0, rows);
    }
    cp_async_commit();
  };
  if (C::has_w && (mode == kOut || p.row_sums)) {
    const Factor W = of_segment<E>(p.W, p.W_segment_stride);
    load_factor<E, false, R, C::block_n, C::threads>(w_tile, W, p.W_upper, p.W_split, p.rank, col0, p.cols, p.W_access);
  }
  float acc[C::grad_m][C::grad_n][4];
  clear(acc);
  for (int i = 0; i < C::stages - 1; i++) load(i);
  SIMT_NO_UNROLL
  for (int i = 0; i < tiles; i++) {
    const int64_t row0 = begin + int64_t(i) * C::block_m;
    const int rows = end - row0 < C::block_m ? static_cast<int>(end - row0) : C::block_m;
    cp_async_wait<C::stages - 2>();
    sync_block();  // tile i (and W) has landed for all threads; nobody uses tile i - 1 or the sums any more
    load(i + C::stages - 1);
    E *x_tile = x_stage(i), *z_tile = x_tile + C::block_m * C::ld_n;
    if (p.grad) {
      if (p.drop_x.seed) {
        drop_tile<E, C::block_m, C::block_n, C::threads>(x_tile, row0, col0, rows, p.drop_x);
        sync_block();
      }
      multiply_rows<C>(acc, x_tile, z_tile);
    }
    if constexpr (mode == kClusterRows) {
      sum_cluster<E, R>(p, x_tile, w_tile, sums, shares + i % 2 * C::block_m * R, row0, rows);
    } else if constexpr (C::has_row_sums) {
      if (p.row_sums) sum_columns<E, R, mode>(p, x_tile, w_tile, sums, row0, rows);
    }
    if (mode == kOut && p.out) {
      sync_block();  // every warp has read the x tile
      write_out<E, R, mode>(p, x_tile, z_tile, w_tile, row0, rows, col0);
    }
  }
  cp_async_wait<0>();
  if constexpr (mode == kClusterRows) sync_cluster();  // nobody reads this block's shares any more
  if (p.grad) {
    const int split = block_id().z * grid_blocks().y + block_id().y;
    write_gradient<C>(p.grad + int64_t(split) * p.cols * p.rank, acc, col0, p.cols, p.rank);
  }
}

}  // namespace LOWRANK_ARCH
}  // namespace lowrank
