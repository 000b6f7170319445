// The state of the simulated machine, shared by the scheduler (fibers.cpp) and the memory checker (memory.cpp).
#pragma once
#include <deque>
#include <string>
#include <vector>

#include "simt_runtime.h"

namespace simt {

struct PendingCopy {  // a cp.async that was issued and has not landed
  char* shared;
  const char* global;
  int source_bytes;
  Site site;
};

enum class State { kReady, kWaiting, kDone };

struct Fiber {  // one GPU thread
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  int id = 0;      // within the cluster
  int thread = 0;  // within the block
  int warp = 0;    // within the cluster
  int block = 0;   // rank in the cluster
  State state = State::kReady;
  Site waiting_at{"", 0};
  std::vector<PendingCopy> open_group;
  std::deque<std::vector<PendingCopy>> committed;
};

// A place where a fixed set of fibers meets: a warp, a block or a cluster.
struct Rendezvous {
  int expected = 0, arrived = 0;
  int operation = 0;
  Site site{"", 0};
  uint32_t epoch = 0;  // memory-ordering points passed so far
  std::vector<Fiber*> members;
  void* slots[kWarpSize];
};

struct Counters {
  uint64_t global_read, global_written, shared_accesses, mma, ldmatrix, ldmatrix_phases, ldmatrix_ideal, barriers,
      async_copies, launches;
};

struct Machine {
  // settings
  uint64_t random = 1;
  double preempt = 0.0;
  // the launch under way
  Launch launch;
  void (*kernel)(void*) = nullptr;
  const char* closure = nullptr;
  size_t closure_bytes = 0;
  uint32_t launch_number = 0;
  int cluster_number = 0;
  Grid first_block;
  std::vector<Fiber> fibers;
  std::vector<int> ready;
  std::vector<Rendezvous> warps, blocks;
  Rendezvous cluster;
  std::vector<int> running_in_block;
  Fiber* self = nullptr;
  void* scheduler_stack_pointer = nullptr;
  bool aborted = false;
  char* arenas = nullptr;
  Counters counters{};
};

extern Machine machine;

uint32_t random_below(uint32_t n);

// Records a finding; `fatal` also abandons the launch (the offending access is never made) and does not return.
void report(const std::string& kind, const std::string& text, Site site, const void* code, bool fatal);
[[noreturn]] void abandon_launch();
void yield_now();

// memory.cpp
constexpr size_t kStackBytes = 128 * 1024;
void memory_begin_cluster(int blocks);
void memory_block_exit(int block);
void memory_access(const void* address, size_t bytes, bool is_write, size_t alignment, Site site, const void* code);
bool has_findings();

}  // namespace simt
