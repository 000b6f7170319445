// The whole backward of residual add in one launch on sm_90 and later: reads g and x once, writes dx once.
//
//   u = s g B    dB = s g^T t    dA = u^T x    dx = u A
//
// A cluster of up to 8 blocks covers all columns: block c holds columns [c block_n, (c + 1) block_n) of g, x and dx,
// its slices of A and B in shared memory and its slices of dA and dB in registers. Clusters walk the row tiles with a
// stride. Per tile of 32 rows each block makes its share of u from its columns of g; a cluster barrier later every
// block adds the shares of all in rank order, through distributed shared memory, and goes on to dA and dx. The shares
// are double-buffered, so one cluster barrier per tile suffices: a buffer is written again only after the barrier that
// follows its last reading. A last barrier keeps every block's shared memory alive until all have read it. dA and dB
// leave as one partial per cluster.
//
// Grid: clusters * blocks. The number of clusters depends on the shape alone, so results do not depend on the GPU's
// size.
#pragma once
#include "column_pass.cuh"

namespace lowrank {
namespace LOWRANK_ARCH {

struct ClusterParams {
  const void *g, *x;  // [T, d_out], [T, d_in]
  void* dx;           // [T, d_in]
  int64_t g_stride, x_stride, dx_stride;
  const float* t;  // [T, rank]
  Factor A, B;
  float *dA, *dB;  // [clusters, d_in, rank], [clusters, d_out, rank]
  int64_t tokens;
  int d_in, d_out, rank, A_access, B_access, g_vec, x_vec, dx_vec;
  float u_scale, dx_scale;
  Dropout dropout;
};

// 256 threads. Bytes = A and B: 2 block_n (R + pad) + 2 stages * (g and x: 2 * 32 (block_n + pad) + t: 32 (R + pad))
// + sums of 4 warps: 4 * 32 R floats + shares of u: 2 * 32 R floats + u: 32 (R + pad).
//
//   R   block_n (16-bit / fp32)  16-bit bytes                                      accumulators dA + dB   widest d
//   16  512 / 256                49152 + 2 * 68096 + 8192 + 4096 + 1536 = 199168   32 + 32                4096 / 2048
//   32  256 / 128                40960 + 2 * 36352 + 16384 + 8192 + 2560 = 140800  32 + 32                2048 / 1024
//
// Compiled (nvcc 13.0)          shared bytes   registers on sm_80, sm_90, sm_100
//   cluster_backward_kernel<Bf16, 16> 199168         -, 155, 176
//   cluster_backward_kernel<Bf16, 32> 140800         -, 165, 188
template <class E, int R>
struct ClusterTuning {
  static constexpr int threads = 256, warps = 8, block_m = 32, stages = 2;
  static constexpr int block_n = (R > 16 ? 512 : 1024) / static_cast<int>(sizeof(E));
  static constexpr int ld_n = padded<E>(block_n), ld_r = padded<E>(R);
  static constexpr int column_groups = warps, grad_m = block_n / 16 / warps, grad_n = R / 8;
  static constexpr size_t w_bytes = block_n * ld_r * sizeof(E), x_bytes = block_m * ld_n * sizeof(E);
  static constexpr size_t z_bytes = block_m * ld_r * sizeof(E), stage = 2 * x_bytes + z_bytes;
  static constexpr size_t share = block_m * R * sizeof(float);
  static constexpr size_t shared_bytes = 2 * w_bytes + stages * stage + 6 * share + z_bytes;
  static_assert(shared_bytes <= 227 * 1024, "sm_90 gives a block 227 KiB");
};

// t tile [32, R] <- rows of t, converted, zero outside.
template <class C, int R, class E>
SIMT_DEVICE void load_t(E* tile, const float* t, int rows, int rank) {
  SIMT_NO_UNROLL
  for (int i = thread_id(); i < C::block_m * R; i += C::threads) {
    int row = i / R, k = i % R;
    tile[row * C::ld_r + k] = rounded<E>(row < rows && k < rank ? t[row * rank + k] : 0.0f);
  }
}

// u tile <- u_scale * the shares of all blocks of the cluster, in rank order.
template <class C, int R, class E>
SIMT_DEVICE void gather_shares(E* u_tile, const float* share, int blocks, float u_scale) {
  SIMT_NO_UNROLL
  for (int i = 4 * thread_id(); i < C::block_m * R; i += 4 * C::threads) {
    float sum[4];
    add_shares(sum, share, i, blocks);
    E* at = &u_tile[i / R * C::ld_r + i % R];
    store_pair(at, u_scale * sum[0], u_scale * sum[1]);
    store_pair(at + 2, u_scale * sum[2], u_scale * sum[3]);
  }
  sync_block();
}

template <class E, int R>
SIMT_KERNEL(256, 1)
cluster_backward_kernel(const ClusterParams p) {
  using C = ClusterTuning<E, R>;
  char* shared = shared_memory();
  E *a_slice = reinterpret_cast<E*>(shared), *b_slice = reinterpret_cast<E*>(shared + C::w_bytes);
  char* ring = shared + 2 * C::w_bytes;
  float* sums = reinterpret_cast<float*>(ring + C::stages * C::stage);
  float* shares = sums + 4 * C::block_m * R;
  E* u_tile = reinterpret_cast<E*>(reinterpret_cast<char*>(shares) + 2 * C::share);
  const E *g = static_cast<const E*>(p.g), *x = static_cast<const E*>(p.x);
  const int width = p.d_in > p.d_out ? p.d_in : p.d_out, blocks = (width + C::block_n - 1) / C::block_n;
  const int cluster = block_id().x / blocks, clusters = grid_blocks().x / blocks, col0 = cluster_rank() * C::block_n;
  const int all_tiles = static_cast<int>((p.tokens + C::block_m - 1) / C::block_m);
  const int tiles = (all_tiles - cluster + clusters - 1) / clusters;
  const auto first_row = [&](int i) { return (int64_t(i) * clusters + cluster) * C::block_m; };
  const auto rows_of_tile = [&](int64_t row0) {
    return p.tokens - row0 < C::block_m ? static_cast<int>(p.tokens - row0) : C::block_m;
  };
  const auto load = [&](int i) {
    if (i < tiles) {
      const int64_t row0 = first_row(i);
      const int rows = rows_of_tile(row0);
      E* stage = reinterpret_cast<E*>(ring + i % C::stages * C::stage);
      load_tile<E, C::block_m, C::block_n, C::threads>(stage, g + row0 * p.g_stride + col0, g, p.g_stride, rows,
                                                       p.d_out - col0, p.g_vec);
      load_tile<E, C::block_m, C::block_n, C::threads>(stage + C::block_m * C::ld_n, x + row0 * p.x_stride + col0, x,
                                                       p.x_stride, rows, p.d_in - col0, p.x_vec);
      load_t<C, R>(stage + 2 * C::block_m * C::ld_n, p.t + row0 * p.rank, rows, p.rank);
    }
    cp_async_commit();
  };
  load_factor<E, false, R, C::block_n, C::threads>(a_slice, p.A, p.A, p.rank, p.rank, col0, p.d_in, p.A_access);
  load_factor<E, false, R, C::block_n, C::threads>(b_slice, p.B, p.B, p.rank, p.rank, col0, p.d_out, p.B_access);
  float dA[C::grad_m][C::grad_n][4], dB[C::grad_m][C::grad_n][4];
  clear(dA);
  clear(dB);
  load(0);
  SIMT_NO_UNROLL
  for (int i = 0; i < tiles; i++) {
    const int64_t row0 = first_row(i);
    const int rows = rows_of_tile(row0);
    E* g_tile = reinterpret_cast<E*>(ring + i % C::stages * C::stage);
    E *x_tile = g_tile + C::block_m * C::ld_n, *t_tile = x_tile + C::block_m * C::ld_n;
    float* share = shares + i % 2 * C::block_m * R;
    cp_async_wait<0>();
    sync_block();  // tile i has landed for all threads, tile i - 1 is stored
    load(i + 1);
    multiply_rows<C>(dB, g_tile, t_tile);
    make_share<C, R>(g_tile, b_slice, sums, share);
    gather_shares<C, R>(u_tile, share, blocks, p.u_scale);
    if (p.dropout.seed) {
      drop_tile<E, C::block_m, C::block_n, C::threads>(x_tile, row0, col0, rows, p.dropout);
      sync_block();
    }
    multiply_rows<C>(dA, x_tile, u_tile);
    sync_block();  // every warp has read the x tile; dx is made over it
    multiply_hidden<C, R>(x_tile, u_tile, a_slice, p.dx_scale);
    if (p.dropout.seed) {
      drop_tile<E, C::block_m, C::block_n, C::threads>(x_tile, row0, col0, rows, p.dropout);
      sync_block();
    }
    store_tile<E, C::block_m, C::block_n, C::threads>(static_cast<E*>(p.dx) + row0 * p.dx_stride + col0, p.dx_stride,
                                                      x_tile, rows, p.d_in - col0, p.dx_vec);
  }
  cp_async_wait<0>();
  sync_cluster();  // nobody reads this block's shares any more
  write_gradient<C>(p.dA + int64_t(cluster) * p.d_in * p.rank, dA, col0, p.d_in, p.rank);
  write_gradient<C>(p.dB + int64_t(cluster) * p.d_out * p.rank, dB, col0, p.d_out, p.rank);
}

}  // namespace LOWRANK_ARCH
}  // namespace lowrank
