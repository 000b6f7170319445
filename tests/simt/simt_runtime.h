// The interface between kernels compiled for the CPU and the SIMT harness: what csrc/cuda/simt.cuh calls.
//
// One fiber stands for one GPU thread. All fibers of a cluster live at once and run one at a time, in an order drawn
// from a seed; a fiber gives way at every collective (barrier, shuffle, mma) and, if asked, at random memory accesses.
// See README.md for what is modelled, what is checked and what is not.
#pragma once
#include <cstddef>
#include <cstdint>

namespace simt {

constexpr int kWarpSize = 32;
constexpr size_t kSharedLimit = 227 * 1024;  // bytes of dynamic shared memory a block may ask for (sm_90)
constexpr size_t kArenaStride = 256 * 1024;  // distance between the shared memories of a cluster's blocks

struct Site {  // a source line, for messages
  const char* file;
  int line;
};

struct Grid {
  int x = 1, y = 1, z = 1;
};

struct Launch {
  Grid grid;
  int threads = 32;         // per block, a multiple of 32
  int cluster = 1;          // blocks per cluster, along x
  size_t shared_bytes = 0;  // dynamic shared memory per block
  const char* name = "";
  const void* kernel = nullptr;  // its address, for the list of kernels that have run
};

// Runs `kernel(closure)` once per thread. `closure` [closure_bytes] is readable by every thread.
void launch(const Launch& launch, void (*kernel)(void*), void* closure, size_t closure_bytes);

// Host code of a launch plan declares a part of its workspace: a buffer of its own, uninitialised.
void workspace(void* base, size_t bytes);

// Where the calling thread is.
int thread_index();
int block_rank();  // within the cluster
Grid block_index();
Grid grid_size();
void* shared_memory();

// Collectives. All threads of the scope must arrive at the same source line.
void sync_block(Site site);
void sync_warp(Site site);
void sync_cluster(Site site);
uint32_t shuffle(uint32_t value, int source_lane, Site site);
void ldmatrix(uint32_t* out, const void* row, int matrices, bool transposed, Site site);
enum class MmaType { kBf16, kF16 };
void mma_16816(float* c, const uint32_t* a, const uint32_t* b, MmaType type, Site site);

// Asynchronous copy of 16 bytes, of which `source_bytes` (0..16) are read and the rest is zero.
void cp_async(void* shared, const void* global, int source_bytes, Site site);
void cp_async_commit();
void cp_async_wait(int groups_left);

// 16-byte accesses and the shared memory of another block of the cluster.
void load16(void* to, const void* from, Site site);
void store16(void* to, const void* from, Site site);
void* map_shared(const void* own_shared, int block_rank);

}  // namespace simt
