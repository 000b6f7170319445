// Device primitives: the only file with inline PTX and the only one that differs between nvcc and the CPU harness.
//
// Each primitive has two bodies with one meaning. Under nvcc it is an instruction or two. Under a host compiler it
// calls the SIMT harness (tests/simt), which executes it and checks its use. Kernels use nothing else of CUDA, so the
// same source runs on a CPU. The PTX bodies themselves never run there: keep this file small, and its machine code is
// pinned by a test. PTX ISA sections are named where a layout or an ordering matters.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define SIMT_GPU 1
#define SIMT_KERNEL(threads, blocks_per_sm) __global__ void __launch_bounds__(threads, blocks_per_sm)
#define SIMT_DEVICE __device__ __forceinline__
#define SIMT_HD __host__ __device__ __forceinline__
#define SIMT_AT0
#define SIMT_AT
#define SIMT_UNROLL _Pragma("unroll")
#define SIMT_NO_UNROLL _Pragma("unroll 1")
#else
#include "simt_runtime.h"
#define SIMT_GPU 0
#define SIMT_KERNEL(threads, blocks_per_sm) void
#define SIMT_DEVICE inline
#define SIMT_HD inline
#define SIMT_AT0 const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SIMT_AT , SIMT_AT0
#define SIMT_HERE (::simt::Site{file, line})
#define SIMT_UNROLL
#define SIMT_NO_UNROLL
#endif

namespace lowrank {
namespace LOWRANK_ARCH {

struct alignas(16) Vec16 {  // one 16-byte access
  uint32_t word[4];
};

// ------------------------------------------------------------------------------------------------ position

SIMT_DEVICE int thread_id() {
#if SIMT_GPU
  return static_cast<int>(threadIdx.x);
#else
  return simt::thread_index();
#endif
}
SIMT_DEVICE int lane_id() { return thread_id() % 32; }
SIMT_DEVICE int warp_id() { return thread_id() / 32; }

struct Index3 {
  int x, y, z;
};
SIMT_DEVICE Index3 block_id() {
#if SIMT_GPU
  return {static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z)};
#else
  simt::Grid b = simt::block_index();
  return {b.x, b.y, b.z};
#endif
}
SIMT_DEVICE Index3 grid_blocks() {
#if SIMT_GPU
  return {static_cast<int>(gridDim.x), static_cast<int>(gridDim.y), static_cast<int>(gridDim.z)};
#else
  simt::Grid g = simt::grid_size();
  return {g.x, g.y, g.z};
#endif
}

// Dynamic shared memory of the block, aligned to 16 bytes.
SIMT_DEVICE char* shared_memory() {
#if SIMT_GPU
  extern __shared__ Vec16 lowrank_shared[];
  return reinterpret_cast<char*>(lowrank_shared);
#else
  return static_cast<char*>(simt::shared_memory());
#endif
}

// ------------------------------------------------------------------------------------------------ barriers, shuffles

SIMT_DEVICE void sync_block(SIMT_AT0) {
#if SIMT_GPU
  __syncthreads();
#else
  simt::sync_block(SIMT_HERE);
#endif
}
SIMT_DEVICE void sync_warp(SIMT_AT0) {
#if SIMT_GPU
  __syncwarp();
#else
  simt::sync_warp(SIMT_HERE);
#endif
}
SIMT_DEVICE float shuffle_xor(float value, int mask SIMT_AT) {
#if SIMT_GPU
  return __shfl_xor_sync(0xffffffffu, value, mask);
#else
  union {
    float f;
    uint32_t u;
  } bits;
  bits.f = value;
  bits.u = simt::shuffle(bits.u, lane_id() ^ mask, SIMT_HERE);
  return bits.f;
#endif
}

// ------------------------------------------------------------------------------------------------ 16-byte accesses

SIMT_DEVICE Vec16 load16(const void* p SIMT_AT) {
#if !SIMT_GPU
  Vec16 v;
  simt::load16(&v, p, SIMT_HERE);
  return v;
#else
  uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
#endif
}
// To global memory. In PTX, because nvcc divides the plain store into four where a scalar path stands beside it.
SIMT_DEVICE void store16(void* p, const Vec16& v SIMT_AT) {
#if !SIMT_GPU
  simt::store16(p, &v, SIMT_HERE);
#else
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(p)), "r"(v.word[0]),
               "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
#endif
}

// ------------------------------------------------------------------------------------------------ cp.async

// 16 bytes global -> shared, of which the first `source_bytes` (0..16) are read and the rest become zero. `source` must
// be a valid aligned address even when nothing is read. PTX ISA: "cp.async", .cg = past L1.
SIMT_DEVICE void cp_async_16(void* shared, const void* source, int source_bytes SIMT_AT) {
#if SIMT_GPU
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(source), "r"(source_bytes)
      : "memory");
#else
  simt::cp_async(shared, source, source_bytes, SIMT_HERE);
#endif
}
SIMT_DEVICE void cp_async_commit() {
#if SIMT_GPU
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simt::cp_async_commit();
#endif
}
// Waits until at most `groups` of this thread's newest groups are still under way.
template <int groups>
SIMT_DEVICE void cp_async_wait() {
#if SIMT_GPU
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
#else
  simt::cp_async_wait(groups);
#endif
}

// ------------------------------------------------------------------------------------------------ tensor cores

// Four 8 x 8 matrices of 16-bit elements. Lane 8 j + i gives the address of row i of matrix j (16 bytes, aligned); lane
// l receives elements (l / 4, 2 (l % 4)) and its right neighbour of every matrix. PTX ISA: "ldmatrix".
SIMT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row SIMT_AT) {
#if SIMT_GPU
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#else
  simt::ldmatrix(r, row, 4, false, SIMT_HERE);
#endif
}
// The same, each matrix transposed on the way.
SIMT_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row SIMT_AT) {
#if SIMT_GPU
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#else
  simt::ldmatrix(r, row, 4, true, SIMT_HERE);
#endif
}

// c [16, 8] += a [16, 16] b [16, 8], fp32 accumulators. Lane = 4 g + q. PTX ISA: "Matrix Fragments for mma.m16n8k16":
// a: (g, 2q..), (g + 8, 2q..), (g, 2q + 8..), (g + 8, 2q + 8..); b: (2q.., g), (2q + 8.., g); c: (g, 2q..), (g + 8,
// 2q..).
SIMT_DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 SIMT_AT) {
#if SIMT_GPU
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  uint32_t b[2] = {b0, b1};
  simt::mma_16816(c, a, b, simt::MmaType::kBf16, SIMT_HERE);
#endif
}
SIMT_DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 SIMT_AT) {
#if SIMT_GPU
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  uint32_t b[2] = {b0, b1};
  simt::mma_16816(c, a, b, simt::MmaType::kF16, SIMT_HERE);
#endif
}

// ------------------------------------------------------------------------------------------------ clusters (sm_90)

SIMT_DEVICE int cluster_rank() {
#if SIMT_GPU
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return simt::block_rank();
#endif
}
// Barrier of all threads of the cluster; orders shared memory accesses of its blocks. PTX ISA: "barrier.cluster".
SIMT_DEVICE void sync_cluster(SIMT_AT0) {
#if SIMT_GPU
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  simt::sync_cluster(SIMT_HERE);
#endif
}
// A float4 from the shared memory of block `rank` of the cluster, at the place of `own` in ours. PTX ISA: "mapa".
SIMT_DEVICE Vec16 load16_cluster(const void* own, int rank SIMT_AT) {
#if SIMT_GPU
  Vec16 v;
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(own));
  asm volatile(
      "{.reg .b32 remote; mapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.u32 {%0,%1,%2,%3}, [remote];}"
      : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
      : "r"(address), "r"(rank)
      : "memory");
  return v;
#else
  return load16(simt::map_shared(own, rank), file, line);
#endif
}

// ------------------------------------------------------------------------------------------------ number formats

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

SIMT_HD float bits_to_float(uint32_t u) {
  union {
    uint32_t u;
    float f;
  } b;
  b.u = u;
  return b.f;
}
SIMT_HD uint32_t float_to_bits(float f) {
  union {
    float f;
    uint32_t u;
  } b;
  b.f = f;
  return b.u;
}

SIMT_DEVICE float to_float(float v) { return v; }
SIMT_DEVICE float to_float(Bf16 v) { return bits_to_float(static_cast<uint32_t>(v.bits) << 16); }
SIMT_DEVICE float to_float(F16 v) {
#if SIMT_GPU
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
#else
  _Float16 h;
  __builtin_memcpy(&h, &v.bits, 2);
  return static_cast<float>(h);
#endif
}

// Round to nearest even; NaN stays NaN.
SIMT_DEVICE void from_float(float f, float& out) { out = f; }
SIMT_DEVICE void from_float(float f, Bf16& out) {
#if SIMT_GPU
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(f));
#else
  uint32_t u = float_to_bits(f);
  out.bits = static_cast<uint16_t>(f != f ? 0x7fffu : (u + 0x7fffu + (u >> 16 & 1u)) >> 16);
#endif
}
SIMT_DEVICE void from_float(float f, F16& out) {
#if SIMT_GPU
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(f));
#else
  _Float16 h = static_cast<_Float16>(f);
  __builtin_memcpy(&out.bits, &h, 2);
#endif
}
template <class E>
SIMT_DEVICE E rounded(float f) {
  E e;
  from_float(f, e);
  return e;
}

SIMT_DEVICE float exponential(float x) {
#if SIMT_GPU
  return expf(x);
#else
  return __builtin_expf(x);
#endif
}
SIMT_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

// ------------------------------------------------------------------------------------------------ launching

struct Launch {
  int grid_x, grid_y, grid_z;
  int threads;
  int cluster;          // blocks per cluster along x; 1: no cluster
  size_t shared_bytes;  // dynamic shared memory
  const char* name;
};

// Launches `kernel(params)` on `stream`; returns a cudaError_t, 0 for success. Never synchronises.
template <class Params>
inline int launch(void (*kernel)(Params), const Launch& l, void* stream, const Params& params) {
  if (l.grid_x <= 0 || l.grid_y <= 0 || l.grid_z <= 0) return 0;
#if SIMT_GPU
  if (l.shared_bytes > 48 * 1024) {
    cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(l.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(l.grid_x, l.grid_y, l.grid_z);
  config.blockDim = dim3(l.threads);
  config.dynamicSmemBytes = l.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = l.cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = l.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
#else
  (void)stream;
  struct Closure {
    void (*kernel)(Params);
    Params params;
  } closure{kernel, params};
  simt::Launch s;
  s.grid = {l.grid_x, l.grid_y, l.grid_z};
  s.threads = l.threads;
  s.cluster = l.cluster;
  s.shared_bytes = l.shared_bytes;
  s.name = l.name;
  s.kernel = reinterpret_cast<const void*>(kernel);
  simt::launch(
      s,
      [](void* p) {
        auto* c = static_cast<Closure*>(p);
        c->kernel(c->params);
      },
      &closure, sizeof closure);
  return 0;
#endif
}

}  // namespace LOWRANK_ARCH
}  // namespace lowrank
