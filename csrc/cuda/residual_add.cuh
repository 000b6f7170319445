// The row kernel: t = t_scale * drop(x) A^T and out = y + scale * t B^T for a block of rows, in one pass.
//
//   residual add        both phases: reads x and y once, writes out once; t [T, r] stays on chip (stored on request)
//   shrink              phase 1 only, out = null          expand_add      phase 2 only, x = null, t read
//   dx without dA, dB   both phases on g with the factors' roles swapped, y = null: reads g, writes dx
//   token routing       phase 2 with z = w (x) t as the hidden tensor and the bank as one factor of rank E r
//
// A block owns `block_m` rows. Phase 1 streams [block_m, block_k] tiles of x and [R, block_k] tiles of A through a ring
// of cp.async stages; its four warps divide the depth of each tile, and their sums are added in a fixed order. Phase 2
// streams tiles of y and B; each warp owns 16 of its 64 columns. Small T uses the same kernel with block_m = 16 and the
// columns of out divided among `grid.y` blocks, each of which recomputes t (x is then in L2): one launch. The order of
// every sum is the same in all forms, so a row's bits depend on neither T nor the form.
//
// Grid: (row blocks per segment, column splits, segments). A segment is a range of rows with its own B (sample
// routing).
#pragma once
#include "tile.cuh"

namespace lowrank {
namespace LOWRANK_ARCH {

struct RowParams {
  const void* x;  // [T, d_in], or null: no phase 1
  int64_t x_stride;
  Factor A, A_upper;  // stacked along the rank at A_split (router on x); one factor: A_split >= rank
  int64_t A_segment_stride;
  const void* y;  // [T, d_out], or null: zero
  int64_t y_stride;
  Factor B;
  int64_t B_segment_stride;
  void* out;  // [T, d_out], or null: no phase 2
  int64_t out_stride;
  float* t_out;       // [T, A_split or rank] fp32, or null
  float* upper_out;   // [T, rank - A_split] fp32: what A_upper gives, or null
  const float* t_in;  // [T, t_rank] fp32, when x is null
  const float* w_in;  // [T, rank / t_rank] token weights, or null: rank == t_rank
  int64_t segment_rows;
  int d_in, d_out, rank, t_rank, A_split;
  int A_access, B_access;
  int x_vec, y_vec, out_vec;
  int column_tiles;  // tiles of out that one block writes
  float t_scale, scale;
  Dropout drop_x, drop_out;
};

// Shared memory and registers of a configuration. 128 threads.
//
//   bytes = max(phase 1: stages * (block_m + R) * (block_k + pad), phase 2: stages * (64 * (R + pad) + block_m * (64 +
//   pad)),
//               sums of 4 warps: 4 * block_m * R floats) + hidden tile: block_m * (R + pad)
//
//   R    block_m  stages  16-bit bytes: max(phase 1, phase 2, sums) + hidden     accumulators per thread (phase 1, 2)
//   16   64       3       max(65280, 36864, 16384) + 3072 = 68352                 32, 32
//   32   64       3       max(78336, 43008, 32768) + 5120 = 83456                 64, 32
//   64   32       3       max(78336, 41472, 32768) + 4608 = 82944                 64, 16
//   128  32       2       max(87040, 44032, 65536) + 8704 = 95744                 128, 16
//   any  16       (small T) 26880, 40448, 67584, 82688                            8 to 64, 8
// float32 halves block_k, so phase 1 has the same bytes; R = 128 takes block_m = 16. All fit the 99 KiB of sm_86 and
// sm_89.
//
// Compiled (nvcc 13.0)          shared bytes   registers on sm_80, sm_90, sm_100
//   row_kernel<Bf16, 16, 64>     68352          91, 87, 89
//   row_kernel<Bf16, 32, 64>     83456          127, 127, 128
//   row_kernel<Bf16, 64, 32>     82944          131, 127, 128
//   row_kernel<Bf16, 128, 32>    95744          224, 224, 226
//   row_kernel<Bf16, 16, 16>     26880          44, 40, 62
//   row_kernel<Bf16, 32, 16>     40448          59, 55, 64
//   row_kernel<Bf16, 64, 16>     67584          91, 87, 89
//   row_kernel<Bf16, 128, 16>    82688          143, 144, 154
template <class E, int R, int block_m_>
struct RowTuning {
  static constexpr int threads = 128, warps = 4, block_m = block_m_, m_tiles = block_m / 16;
  static constexpr int block_k = 256 / sizeof(E), block_n = 64, stages = R > 64 ? 2 : 3;
  static constexpr int ld_k = padded<E>(block_k), ld_n = padded<E>(block_n), ld_r = padded<E>(R);
  static constexpr size_t stage1 = (block_m + R) * ld_k * sizeof(E);
  static constexpr size_t stage2 = (block_n * ld_r + block_m * ld_n) * sizeof(E);
  static constexpr size_t sums = size_t(warps) * block_m * R * sizeof(float);
  static constexpr size_t ring = stages * (stage1 > stage2 ? stage1 : stage2);
  static constexpr size_t hidden = block_m * ld_r * sizeof(E);
  static constexpr size_t shared_bytes = (ring > sums ? ring : sums) + hidden;
  static_assert(shared_bytes <= 99 * 1024, "sm_86 and sm_89 give a block 99 KiB");
};

// Sums over this warp's quarter of every tile of x and A, left in sums [4, block_m, R].
template <class E, int R, int block_m>
SIMT_DEVICE void shrink_rows(const RowParams& p, int64_t row0, int rows, char* ring) {
  using C = RowTuning<E, R, block_m>;
  const E* x = static_cast<const E*>(p.x);
  const Factor A = of_segment<E>(p.A, p.A_segment_stride);
  const int tiles = (p.d_in + C::block_k - 1) / C::block_k;
  auto x_stage = [&](int i) { return reinterpret_cast<E*>(ring + i % C::stages * C::stage1); };
  auto load = [&](int i) {
    if (i < tiles) {
      E* stage = x_stage(i);
      int k0 = i * C::block_k;
      load_tile<E, block_m, C::block_k, C::threads>(stage, x + row0 * p.x_stride + k0, x, p.x_stride, rows, p.d_in - k0,
                                                    p.x_vec);
      load_factor<E, true, R, C::block_k, C::threads>(stage + block_m * C::ld_k, A, p.A_upper, p.A_split, p.rank, k0,
                                                      p.d_in, p.A_access);
    }
    cp_async_commit();
  };
  float acc[C::m_tiles][R / 8][4];
  clear(acc);
  for (int i = 0; i < C::stages - 1; i++) load(i);
  SIMT_NO_UNROLL
  for (int i = 0; i < tiles; i++) {
    cp_async_wait<C::stages - 2>();
    sync_block();  // tile i has landed for all threads, and nobody reads tile i - 1 any more
    load(i + C::stages - 1);
    E* stage = x_stage(i);
    if (p.drop_x.seed) {
      drop_tile<E, block_m, C::block_k, C::threads>(stage, row0, i * C::block_k, rows, p.drop_x);
      sync_block();
    }
    const int quarter = C::block_k / C::warps * warp_id();
    multiply<true, true>(acc, stage + quarter, C::ld_k, stage + block_m * C::ld_k + quarter, C::ld_k,
                         C::block_k / C::warps);
  }
  cp_async_wait<0>();
  sync_block();  // the sums overwrite the ring
  float* sums = reinterpret_cast<float*>(ring) + warp_id() * block_m * R;
  SIMT_UNROLL
  for (int m = 0; m < C::m_tiles; m++) {
    SIMT_UNROLL
    for (int n = 0; n < R / 8; n++) {
      SIMT_UNROLL
      for (int i = 0; i < 4; i += 2)
        store_pair(&sums[(16 * m + fragment_row(i)) * R + 8 * n + fragment_column(i)], acc[m][n][i], acc[m][n][i + 1]);
    }
  }
  sync_block();  // the sums of all four warps are written
}

SIMT_DEVICE void store_hidden(const RowParams& p, int64_t row, int k, float t) {
  const int split = p.A_split < p.rank ? p.A_split : p.rank;
  if (k >= split) {
    p.upper_out[row * (p.rank - split) + k - split] = t;
  } else if (p.t_out) {
    p.t_out[row * split + k] = t;
  }
}

// hidden [block_m, R] <- t (or z = w (x) t), in the dtype of the activations; t goes to t_out as fp32.
template <class E, int R, int block_m>
SIMT_DEVICE void finish_hidden(const RowParams& p, int64_t row0, int rows, const float* sums, E* hidden) {
  using C = RowTuning<E, R, block_m>;
  SIMT_NO_UNROLL
  for (int i = thread_id(); i < block_m * R; i += C::threads) {
    int row = i / R, k = i % R;
    float t = 0.0f;
    if (row < rows && k < p.rank) {
      if (p.x) {
        t = ((sums[i] + sums[i + block_m * R]) + sums[i + 2 * block_m * R]) + sums[i + 3 * block_m * R];
        t *= p.t_scale;
        if (block_id().y == 0) store_hidden(p, row0 + row, k, t);
      } else {
        t = p.t_in[(row0 + row) * p.t_rank + k % p.t_rank];
        if (p.w_in) t *= p.w_in[(row0 + row) * (p.rank / p.t_rank) + k / p.t_rank];
      }
    }
    hidden[row * C::ld_r + k] = rounded<E>(t);
  }
}

template <class E, int R, int block_m>
SIMT_DEVICE void expand_rows(const RowParams& p, int64_t row0, int rows, char* ring, const E* hidden) {
  using C = RowTuning<E, R, block_m>;
  const E* y = static_cast<const E*>(p.y);
  E* out = static_cast<E*>(p.out);
  const Factor B = of_segment<E>(p.B, p.B_segment_stride);
  const int first = block_id().y * p.column_tiles, all = (p.d_out + C::block_n - 1) / C::block_n;
  const int tiles = first >= all ? 0 : all - first < p.column_tiles ? all - first : p.column_tiles;
  auto b_stage = [&](int i) { return reinterpret_cast<E*>(ring + i % C::stages * C::stage2); };
  auto load = [&](int i) {
    if (i < tiles) {
      E* stage = b_stage(i);
      int n0 = (first + i) * C::block_n;
      load_factor<E, false, R, C::block_n, C::threads>(stage, B, B, p.rank, p.rank, n0, p.d_out, p.B_access);
      if (y)
        load_tile<E, block_m, C::block_n, C::threads>(stage + C::block_n * C::ld_r, y + row0 * p.y_stride + n0, y,
                                                      p.y_stride, rows, p.d_out - n0, p.y_vec);
    }
    cp_async_commit();
  };
  for (int i = 0; i < C::stages - 1; i++) load(i);
  SIMT_NO_UNROLL
  for (int i = 0; i < tiles; i++) {
    cp_async_wait<C::stages - 2>();
    sync_block();  // tile i has landed, tile i - 1 was stored; in the first round this also publishes `hidden`
    load(i + C::stages - 1);
    E *b_tile = b_stage(i), *y_tile = b_tile + C::block_n * C::ld_r;
    float acc[C::m_tiles][2][4];
    clear(acc);
    const int column0 = 16 * warp_id();
    multiply<true, true>(acc, hidden, C::ld_r, b_tile + column0 * C::ld_r, C::ld_r, R);
    SIMT_UNROLL
    for (int m = 0; m < C::m_tiles; m++) {
      SIMT_UNROLL
      for (int n = 0; n < 2; n++) {
        SIMT_UNROLL
        for (int j = 0; j < 4; j += 2) {
          E* at = &y_tile[(16 * m + fragment_row(j)) * C::ld_n + column0 + 8 * n + fragment_column(j)];
          float low = p.scale * acc[m][n][j], high = p.scale * acc[m][n][j + 1];
          if (y) {
            const Pair<E> stream = *reinterpret_cast<const Pair<E>*>(at);
            low += to_float(stream.low);
            high += to_float(stream.high);
          }
          store_pair(at, low, high);
        }
      }
    }
    sync_block();
    const int n0 = (first + i) * C::block_n;
    if (p.drop_out.seed) {
      drop_tile<E, block_m, C::block_n, C::threads>(y_tile, row0, n0, rows, p.drop_out);
      sync_block();
    }
    store_tile<E, block_m, C::block_n, C::threads>(out + row0 * p.out_stride + n0, p.out_stride, y_tile, rows,
                                                   p.d_out - n0, p.out_vec);
  }
  cp_async_wait<0>();
}

template <class E, int R, int block_m>
SIMT_KERNEL(128, 1)
row_kernel(const RowParams p) {
  using C = RowTuning<E, R, block_m>;
  char* ring = shared_memory();
  E* hidden = reinterpret_cast<E*>(ring + C::shared_bytes - C::hidden);
  const int64_t in_segment = int64_t(block_id().x) * block_m, row0 = block_id().z * p.segment_rows + in_segment;
  const int64_t left = p.segment_rows - in_segment;
  const int rows = left < block_m ? static_cast<int>(left) : block_m;
  if (p.x) shrink_rows<E, R, block_m>(p, row0, rows, ring);
  finish_hidden<E, R, block_m>(p, row0, rows, reinterpret_cast<const float*>(ring), hidden);
  sync_block();  // the sums are read, the ring is free again
  if (p.out) expand_rows<E, R, block_m>(p, row0, rows, ring, hidden);
}

}  // namespace LOWRANK_ARCH
}  // namespace lowrank
