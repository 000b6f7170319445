// Threads, their schedule, and the collectives: barriers, shuffles, ldmatrix, mma.sync, cp.async groups.
//
// A collective is a rendezvous of its scope. The last thread to arrive computes for all of them from pointers to the
// others' registers, then everybody is made ready again. Threads that meet at different lines, leave while others
// wait, or wait for ever are findings (DIVERGENT, EXIT, DEADLOCK), each with the lines involved.
#include <dlfcn.h>
#include <sys/mman.h>

#include <cmath>
#include <cstring>
#include <map>
#include <set>

#include "machine.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

Machine machine;

uint32_t random_below(uint32_t n) {  // xorshift64*
  machine.random ^= machine.random >> 12;
  machine.random ^= machine.random << 25;
  machine.random ^= machine.random >> 27;
  return uint32_t(((machine.random * 0x2545F4914F6CDD1DULL) >> 32) * uint64_t(n) >> 32);
}

// ---------------------------------------------------------------------------------------------- switching

#if defined(__x86_64__)
// Saves the callee-saved registers on the old stack and takes them from the new one: no system call, unlike ucontext.
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch,.-simt_switch
)");

static void prepare(Fiber& fiber, void (*entry)()) {
  uintptr_t top = (reinterpret_cast<uintptr_t>(fiber.stack) + kStackBytes) & ~uintptr_t(15);
  auto* slot = reinterpret_cast<void**>(top);
  *--slot = nullptr;  // alignment: at entry the stack must be 8 modulo 16
  *--slot = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--slot = nullptr;
  fiber.stack_pointer = slot;
}
#else  // any other processor: slower by a factor of about three, because swapcontext makes a system call
static std::map<void**, ucontext_t> contexts;
static void simt_switch(void** save, void* load) {
  ucontext_t& from = contexts[save];
  *save = save;
  swapcontext(&from, &contexts[static_cast<void**>(load)]);
}
static void prepare(Fiber& fiber, void (*entry)()) {
  ucontext_t& context = contexts[&fiber.stack_pointer];
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
  fiber.stack_pointer = &fiber.stack_pointer;
}
#endif

static void to_scheduler() {
  Fiber* self = machine.self;
  simt_switch(&self->stack_pointer, machine.scheduler_stack_pointer);
}

void abandon_launch() {
  machine.aborted = true;
  machine.self->state = State::kDone;
  to_scheduler();
  __builtin_unreachable();
}

void yield_now() {
  machine.ready.push_back(machine.self->id);
  to_scheduler();
}

static void block_at(Site site) {
  machine.self->state = State::kWaiting;
  machine.self->waiting_at = site;
  to_scheduler();
}

static void wake(Rendezvous& meeting) {
  for (Fiber* member : meeting.members) {
    if (member == machine.self || member->state != State::kWaiting) continue;
    member->state = State::kReady;
    machine.ready.push_back(member->id);
  }
}

// ---------------------------------------------------------------------------------------------- rendezvous

enum Operation { kSyncWarp = 1, kSyncBlock, kSyncCluster, kShuffle, kLdmatrix, kMma };

static bool same_site(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

static std::string where(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

// `compute(slots)` runs once, in the last thread to arrive, before anybody goes on.
template <class Compute>
static void meet(Rendezvous& meeting, Operation operation, Site site, void* payload, Compute compute) {
  Fiber& self = *machine.self;
  if (meeting.arrived == 0) {
    meeting.operation = operation;
    meeting.site = site;
  } else if (meeting.operation != operation || !same_site(meeting.site, site)) {
    report("DIVERGENT",
           "thread " + std::to_string(self.thread) + " is at a collective while others of its scope wait at " +
               where(meeting.site),
           site, nullptr, true);
  }
  if (meeting.expected <= kWarpSize) meeting.slots[self.thread % kWarpSize] = payload;
  if (++meeting.arrived < meeting.expected) {
    block_at(site);
    return;
  }
  compute(meeting.slots);
  meeting.arrived = 0;
  wake(meeting);
}

static Rendezvous& own_warp() { return machine.warps[machine.self->warp]; }
static Rendezvous& own_block() { return machine.blocks[machine.self->block]; }

void sync_warp(Site site) {
  meet(own_warp(), kSyncWarp, site, nullptr, [](void**) { own_warp().epoch++; });
}

void sync_block(Site site) {
  machine.counters.barriers++;
  meet(own_block(), kSyncBlock, site, nullptr, [](void**) { own_block().epoch++; });
}

void sync_cluster(Site site) {
  meet(machine.cluster, kSyncCluster, site, nullptr, [](void**) { machine.cluster.epoch++; });
}

struct ShufflePayload {
  uint32_t value, result;
  int source;
};

uint32_t shuffle(uint32_t value, int source_lane, Site site) {
  ShufflePayload own{value, 0, source_lane};
  meet(own_warp(), kShuffle, site, &own, [](void** slots) {
    for (int lane = 0; lane < kWarpSize; lane++) {
      auto* payload = static_cast<ShufflePayload*>(slots[lane]);
      payload->result = static_cast<ShufflePayload*>(slots[payload->source % kWarpSize])->value;
    }
  });
  return own.result;
}

// ---------------------------------------------------------------------------------------------- tensor cores

struct LdmatrixPayload {
  uint32_t* out;
  const char* row;
};

// Lane 8j + i supplies the address of row i of matrix j; lane l receives elements (l/4, 2(l%4)) and the next one of
// each matrix, or of its transpose.
void ldmatrix(uint32_t* out, const void* row, int matrices, bool transposed, Site site) {
  LdmatrixPayload own{out, static_cast<const char*>(row)};
  if (machine.self->thread % kWarpSize < 8 * matrices) memory_access(row, 16, false, 16, site, nullptr);
  meet(own_warp(), kLdmatrix, site, &own, [=](void** slots) {
    for (int matrix = 0; matrix < matrices; matrix++) {
      uint16_t values[8][8];
      int in_bank_group[8] = {};
      for (int i = 0; i < 8; i++) {
        const char* source = static_cast<LdmatrixPayload*>(slots[8 * matrix + i])->row;
        std::memcpy(values[i], source, 16);
        in_bank_group[(reinterpret_cast<uintptr_t>(source) / 16) % 8]++;
      }
      int phases = 1;
      for (int count : in_bank_group) phases = count > phases ? count : phases;
      machine.counters.ldmatrix_phases += phases;
      machine.counters.ldmatrix_ideal += 1;
      for (int lane = 0; lane < kWarpSize; lane++) {
        int r = lane / 4, c = 2 * (lane % 4);
        uint16_t low = transposed ? values[c][r] : values[r][c];
        uint16_t high = transposed ? values[c + 1][r] : values[r][c + 1];
        static_cast<LdmatrixPayload*>(slots[lane])->out[matrix] = uint32_t(high) << 16 | low;
      }
    }
    machine.counters.ldmatrix++;
  });
}

static double half_value(uint16_t bits, MmaType type) {
  if (type == MmaType::kBf16) {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  double magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                     : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                    : std::ldexp(mantissa, -24);
  return bits >> 15 ? -magnitude : magnitude;
}

struct MmaPayload {
  float* c;
  const uint32_t *a, *b;
};

// C [16, 8] += A [16, 16] B [16, 8]; products exact, summed in double, rounded once. PTX ISA, "Matrix Fragments for
// mma.m16n8k16 with floating point type": lane = 4 g + q holds A rows g, g + 8, columns 2q.. and 2q + 8..; B rows 2q..,
// 2q + 8.., column g; C rows g, g + 8, columns 2q, 2q + 1.
void mma_16816(float* c, const uint32_t* a, const uint32_t* b, MmaType type, Site site) {
  MmaPayload own{c, a, b};
  meet(own_warp(), kMma, site, &own, [=](void** slots) {
    double A[16][16], B[16][8];
    for (int lane = 0; lane < kWarpSize; lane++) {
      auto* p = static_cast<MmaPayload*>(slots[lane]);
      int g = lane / 4, q = lane % 4;
      for (int reg = 0; reg < 4; reg++)
        for (int h = 0; h < 2; h++)
          A[g + 8 * (reg & 1)][2 * q + h + 8 * (reg >> 1)] = half_value(uint16_t(p->a[reg] >> 16 * h), type);
      for (int reg = 0; reg < 2; reg++)
        for (int h = 0; h < 2; h++) B[2 * q + h + 8 * reg][g] = half_value(uint16_t(p->b[reg] >> 16 * h), type);
    }
    for (int lane = 0; lane < kWarpSize; lane++) {
      auto* p = static_cast<MmaPayload*>(slots[lane]);
      for (int i = 0; i < 4; i++) {
        int row = lane / 4 + 8 * (i >> 1), column = 2 * (lane % 4) + (i & 1);
        double sum = p->c[i];
        for (int k = 0; k < 16; k++) sum += A[row][k] * B[k][column];
        p->c[i] = float(sum);
      }
    }
    machine.counters.mma++;
  });
}

// ---------------------------------------------------------------------------------------------- where a thread is

int thread_index() { return machine.self->thread; }
int block_rank() { return machine.self->block; }
Grid grid_size() { return machine.launch.grid; }
Grid block_index() {
  Grid index = machine.first_block;
  index.x += machine.self->block;
  return index;
}
void* shared_memory() { return machine.arenas + machine.self->block * kArenaStride; }
void* map_shared(const void* own_shared, int rank) {
  auto offset = static_cast<const char*>(own_shared) - static_cast<char*>(shared_memory());
  return machine.arenas + rank * kArenaStride + offset;
}

// ---------------------------------------------------------------------------------------------- the schedule

static void fiber_main() {
  machine.kernel(const_cast<char*>(machine.closure));
  Fiber& self = *machine.self;
  bool waited = self.open_group.empty();
  for (auto& group : self.committed) waited = waited && group.empty();
  if (!waited)
    report("COPY", "thread " + std::to_string(self.thread) + " exits with a cp.async it never waited for",
           Site{"exit", 0}, nullptr, false);
  for (Rendezvous* meeting : {&own_warp(), &own_block(), &machine.cluster})
    if (meeting->arrived)
      report("EXIT", "thread " + std::to_string(self.thread) + " exits while others of its scope wait", meeting->site,
             nullptr, true);
  self.state = State::kDone;
  if (--machine.running_in_block[self.block] == 0) memory_block_exit(self.block);
  to_scheduler();
}

static void report_deadlock() {
  std::map<std::string, int> waiting;
  Site site{"", 0};
  for (Fiber& fiber : machine.fibers)
    if (fiber.state == State::kWaiting) {
      waiting[where(fiber.waiting_at)]++;
      site = fiber.waiting_at;
    }
  std::string text = "no thread can run:";
  for (auto& [line, count] : waiting) text += " " + std::to_string(count) + " wait at " + line;
  report("DEADLOCK", text, site, nullptr, false);
}

static void join(Rendezvous& meeting, Fiber& fiber) {
  meeting.expected++;
  meeting.members.push_back(&fiber);
}

static void run_cluster() {
  Machine& m = machine;
  int blocks = m.launch.cluster, total = blocks * m.launch.threads;
  static std::vector<char*> stacks;  // kept from launch to launch
  while (int(stacks.size()) < total)
    stacks.push_back(static_cast<char*>(
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)));
  m.fibers.assign(total, Fiber{});
  m.warps.assign(total / kWarpSize, Rendezvous{});
  m.blocks.assign(blocks, Rendezvous{});
  m.cluster = Rendezvous{};
  m.running_in_block.assign(blocks, m.launch.threads);
  m.ready.clear();
  memory_begin_cluster(blocks);
  for (int i = 0; i < total; i++) {
    Fiber& fiber = m.fibers[i];
    fiber.stack = stacks[i];
    fiber.id = i;
    fiber.thread = i % m.launch.threads;
    fiber.block = i / m.launch.threads;
    fiber.warp = i / kWarpSize;
    join(m.warps[fiber.warp], fiber);
    join(m.blocks[fiber.block], fiber);
    join(m.cluster, fiber);
    prepare(fiber, fiber_main);
    m.ready.push_back(i);
  }
  while (!m.ready.empty() && !m.aborted) {
    uint32_t pick = random_below(uint32_t(m.ready.size()));
    std::swap(m.ready[pick], m.ready.back());
    m.self = &m.fibers[m.ready.back()];
    m.ready.pop_back();
    simt_switch(&m.scheduler_stack_pointer, m.self->stack_pointer);
  }
  m.self = nullptr;
  bool finished = true;
  for (Fiber& fiber : m.fibers) finished = finished && fiber.state == State::kDone;
  if (!finished && !m.aborted) {
    report_deadlock();
    m.aborted = true;
  }
}

std::set<const void*> kernels_run;

void launch(const Launch& launch, void (*kernel)(void*), void* closure, size_t closure_bytes) {
  Machine& m = machine;
  if (m.aborted) return;  // an earlier launch of this operation was abandoned: its results do not exist
  m.launch = launch;
  m.kernel = kernel;
  m.closure = static_cast<const char*>(closure);
  m.closure_bytes = closure_bytes;
  m.launch_number++;
  m.counters.launches++;
  kernels_run.insert(launch.kernel);
  if (launch.threads % kWarpSize || launch.threads > 1024 || launch.shared_bytes > kSharedLimit ||
      launch.grid.x % launch.cluster || launch.grid.y > 65535 || launch.grid.z > 65535) {
    report("LAUNCH",
           std::string(launch.name) + ": " + std::to_string(launch.threads) + " threads, " +
               std::to_string(launch.shared_bytes) + " bytes of shared memory",
           Site{"launch", 0}, nullptr, false);
    return;
  }
  if (!m.arenas)
    m.arenas = static_cast<char*>(
        mmap(nullptr, 16 * kArenaStride, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  int across = launch.grid.x / launch.cluster;
  std::vector<int> order(size_t(across) * launch.grid.y * launch.grid.z);
  for (size_t i = 0; i < order.size(); i++) order[i] = int(i);
  for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[random_below(uint32_t(i))]);
  for (int number : order) {
    m.cluster_number = number;
    m.first_block =
        Grid{number % across * launch.cluster, number / across % launch.grid.y, number / across / launch.grid.y};
    run_cluster();
    if (m.aborted) return;
  }
}

}  // namespace simt

// The mangled names of all kernels that this process has launched, one a line.
extern "C" const char* simt_kernels_run() {
  static std::string text;
  text.clear();
  Dl_info info;
  for (const void* kernel : simt::kernels_run)
    if (kernel && dladdr(kernel, &info) && info.dli_sname) text += std::string(info.dli_sname) + "\n";
  return text.c_str();
}
