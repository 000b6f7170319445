// The memory checker: bounds, alignment, read-only and uninitialised memory, races, copies in flight.
//
// Kernels are compiled with -fsanitize=thread but without its library, so that every load and store of the compiled
// code calls one of the __tsan_* functions at the end of this file. An address belongs to the shared memory of a block
// of the cluster, to a registered global buffer, to the thread's own stack, to the launch arguments or to constants;
// anything else is a finding.
//
// Shared and global memory have a shadow of one cell per two bytes: the last writer and the last two readers, each with
// the barriers that its warp, block and cluster had passed. Two accesses by different threads, one of them a write,
// race unless a barrier of a scope that holds both came between; this does not depend on the schedule that ran.
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <set>
#include <sstream>

#include "machine.h"

namespace simt {
namespace {

struct Access {
  int thread = -1;  // within the cluster; -1: none
  int cluster = 0;
  uint32_t launch = 0, warp_epoch = 0, block_epoch = 0, cluster_epoch = 0;
};

struct Cell {
  Access writer, readers[2];
  bool initialised = false;
  bool in_flight = false;  // the destination of a cp.async that was not waited for
};

struct Buffer {  // `rows` rows of `row_bytes` bytes, `stride` bytes apart
  std::string name;
  char* base;
  size_t rows, row_bytes, stride;
  bool writable;
  uint64_t read_bytes = 0, written_bytes = 0;
  std::vector<Cell> cells;
  size_t extent() const { return rows ? (rows - 1) * stride + row_bytes : 0; }
};

std::vector<Buffer> buffers;
std::vector<Cell> shared_cells[16];
std::vector<bool> block_exited;
std::vector<std::string> findings;
std::set<std::pair<std::string, std::string>> seen;
const char *image_begin, *image_end;  // this library: constants live here

std::string line_of(const void* code) {  // addr2line, asked once per finding
  Dl_info info;
  if (!code || !dladdr(code, &info)) return "";
  char command[512], line[512] = "";
  auto offset = static_cast<const char*>(code) - static_cast<char*>(info.dli_fbase) - 1;
  std::snprintf(command, sizeof command, "addr2line -e '%s' 0x%lx", info.dli_fname, static_cast<long>(offset));
  if (FILE* pipe = popen(command, "r")) {
    if (!std::fgets(line, sizeof line, pipe)) line[0] = 0;
    pclose(pipe);
  }
  std::string text(line);
  text.resize(std::min(text.size(), text.find(" (")));  // drops " (discriminator 3)"
  while (!text.empty() && (text.back() == '\n' || text.back() == ' ')) text.pop_back();
  size_t slash = text.rfind('/');
  return slash == std::string::npos ? text : text.substr(slash + 1);
}

std::string place(Site site, const void* code) {
  if (code) return line_of(code);
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

Access now() {
  Fiber& self = *machine.self;
  return Access{self.id,
                machine.cluster_number,
                machine.launch_number,
                machine.warps[self.warp].epoch,
                machine.blocks[self.block].epoch,
                machine.cluster.epoch};
}

bool ordered(const Access& before, const Access& current) {
  if (before.thread < 0 || before.launch != current.launch) return true;
  if (before.cluster != current.cluster) return false;
  if (before.thread == current.thread || before.cluster_epoch < current.cluster_epoch) return true;
  Fiber &a = machine.fibers[before.thread], &b = machine.fibers[current.thread];
  if (a.block == b.block && before.block_epoch < current.block_epoch) return true;
  return a.warp == b.warp && before.warp_epoch < current.warp_epoch;
}

std::string describe(const Access& access) {
  if (access.cluster != machine.cluster_number) return "another block";
  Fiber& fiber = machine.fibers[access.thread];
  return "block " + std::to_string(fiber.block) + " thread " + std::to_string(fiber.thread);
}

void race(const char* kind, const std::string& what, const Access& other, Site site, const void* code) {
  report("RACE", std::string(kind) + " on " + what + " with " + describe(other) + ", no barrier between", site, code,
         false);
}

void touch(Cell& cell, bool is_write, const std::string& what, Site site, const void* code) {
  Access current = now();
  if (cell.in_flight) {
    report("IN FLIGHT", what + " is the destination of a cp.async that was not waited for", site, code, false);
    return;
  }
  if (!ordered(cell.writer, current))
    race(is_write ? "write after write" : "read after write", what, cell.writer, site, code);
  if (is_write) {
    for (Access& reader : cell.readers) {
      if (!ordered(reader, current)) race("write after read", what, reader, site, code);
      reader.thread = -1;
    }
    cell.writer = current;
    cell.initialised = true;
    return;
  }
  if (!cell.initialised) report("UNINITIALISED", what + " was never written", site, code, false);
  Access* slot = &cell.readers[0];
  if (slot->thread >= 0 && slot->thread != current.thread) slot = &cell.readers[1];
  *slot = current;
}

[[noreturn]] void fatal(const char* kind, const std::string& text, Site site, const void* code) {
  report(kind, text, site, code, true);
  __builtin_unreachable();
}

Cell* shared_cell(const char* address, size_t bytes, bool is_write, Site site, const void* code, std::string* what) {
  size_t offset = address - machine.arenas;
  int block = int(offset / kArenaStride), own = machine.self->block;
  offset %= kArenaStride;
  *what = "shared memory";
  if (block >= machine.launch.cluster || offset + bytes > machine.launch.shared_bytes)
    fatal("OUT OF BOUNDS",
          "shared memory byte " + std::to_string(offset) + " of " + std::to_string(machine.launch.shared_bytes), site,
          code);
  if (block != own) {
    *what = "shared memory of block " + std::to_string(block);
    if (machine.cluster.epoch == 0)
      report("CLUSTER", *what + " used before the first cluster barrier", site, code, false);
    if (block_exited[block]) report("CLUSTER", *what + " used after that block exited", site, code, false);
  }
  machine.counters.shared_accesses++;
  (void)is_write;
  return &shared_cells[block][offset / 2];
}

Cell* global_cell(Buffer& buffer, const char* address, size_t bytes, bool is_write, Site site, const void* code) {
  size_t offset = address - buffer.base, column = buffer.stride ? offset % buffer.stride : offset;
  if (column + bytes > buffer.row_bytes && bytes)
    fatal("OUT OF BOUNDS",
          buffer.name + " row " + std::to_string(buffer.stride ? offset / buffer.stride : 0) + " byte " +
              std::to_string(column) + " of " + std::to_string(buffer.row_bytes),
          site, code);
  if (is_write && !buffer.writable) fatal("READ-ONLY", buffer.name + " is an input", site, code);
  (is_write ? buffer.written_bytes : buffer.read_bytes) += bytes;
  (is_write ? machine.counters.global_written : machine.counters.global_read) += bytes;
  return &buffer.cells[offset / 2];
}

// The cells of an access, or null where nothing is to be checked (own stack, constants, launch arguments).
Cell* find(const char* address, size_t bytes, bool is_write, Site site, const void* code, std::string* what) {
  if (machine.arenas && address >= machine.arenas && address < machine.arenas + 16 * kArenaStride)
    return shared_cell(address, bytes, is_write, site, code, what);
  for (Buffer& buffer : buffers)
    if (address >= buffer.base && address < buffer.base + buffer.extent()) {
      *what = buffer.name;
      return global_cell(buffer, address, bytes, is_write, site, code);
    }
  bool constant = (address >= image_begin && address < image_end) ||
                  (address >= machine.closure && address < machine.closure + machine.closure_bytes);
  if (constant && !is_write) return nullptr;
  for (Buffer& buffer : buffers)  // just past a buffer is out of bounds, not wild
    if (address >= buffer.base + buffer.extent() && address < buffer.base + buffer.extent() + 4096)
      fatal("OUT OF BOUNDS", std::to_string(address - buffer.base - buffer.extent()) + " bytes past " + buffer.name,
            site, code);
  std::ostringstream text;
  text << "address " << static_cast<const void*>(address) << " belongs to nobody this thread may use";
  fatal("WILD", text.str(), site, code);
}

int find_image(dl_phdr_info* info, size_t, void*) {
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    auto* begin = reinterpret_cast<const char*>(info->dlpi_addr + header.p_vaddr);
    auto* end = begin + header.p_memsz;
    auto* here = reinterpret_cast<const char*>(&find_image);
    auto* first = reinterpret_cast<const char*>(info->dlpi_addr + info->dlpi_phdr[0].p_vaddr);
    if (here >= begin && here < end) image_begin = reinterpret_cast<const char*>(info->dlpi_addr), (void)first;
  }
  if (image_begin != reinterpret_cast<const char*>(info->dlpi_addr)) return 0;
  for (int i = 0; i < info->dlpi_phnum; i++)
    if (info->dlpi_phdr[i].p_type == PT_LOAD)
      image_end = std::max(image_end, reinterpret_cast<const char*>(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr +
                                                                    info->dlpi_phdr[i].p_memsz));
  return 1;
}

}  // namespace

// ---------------------------------------------------------------------------------------------- called by fibers.cpp

bool has_findings() { return !findings.empty(); }

void report(const std::string& kind, const std::string& text, Site site, const void* code, bool is_fatal) {
  std::ostringstream pc;
  pc << code << site.file << site.line;
  if (findings.size() < 40 && seen.insert({kind, pc.str()}).second) {
    std::string who;
    if (machine.self)
      who = " [block " + std::to_string(block_index().x) + "," + std::to_string(block_index().y) + "," +
            std::to_string(block_index().z) + " thread " + std::to_string(machine.self->thread) + "]";
    findings.push_back(kind + " " + place(site, code) + ": " + text + who + " in " + machine.launch.name);
  }
  if (is_fatal) abandon_launch();
}

void memory_begin_cluster(int blocks) {
  block_exited.assign(blocks, false);
  for (int block = 0; block < blocks; block++) {
    // 0xFF bytes read as NaN in every floating type, so that uninitialised values also show in results.
    std::memset(machine.arenas + block * kArenaStride, 0xFF, machine.launch.shared_bytes);
    shared_cells[block].assign(machine.launch.shared_bytes / 2 + 8, Cell{});
  }
}

// A block may not exit while another could still be using its shared memory: a cluster barrier must come after the last
// use.
void memory_block_exit(int block) {
  block_exited[block] = true;
  if (machine.launch.cluster == 1) return;
  for (Cell& cell : shared_cells[block])
    for (Access* access : {&cell.writer, &cell.readers[0], &cell.readers[1]})
      if (access->thread >= 0 && machine.fibers[access->thread].block != block &&
          access->cluster_epoch == machine.cluster.epoch) {
        report("CLUSTER",
               "block " + std::to_string(block) +
                   " exits with no cluster barrier after the last use of its shared "
                   "memory by block " +
                   std::to_string(machine.fibers[access->thread].block),
               Site{"exit", 0}, nullptr, false);
        return;
      }
}

void memory_access(const void* pointer, size_t bytes, bool is_write, size_t alignment, Site site, const void* code) {
  auto* address = static_cast<const char*>(pointer);
  Fiber* self = machine.self;
  if (!self || (address >= self->stack && address < self->stack + kStackBytes)) return;
  if (machine.preempt > 0.0 && random_below(1u << 20) < machine.preempt * (1u << 20)) yield_now();
  std::string what;
  Cell* cells = find(address, bytes, is_write, site, code, &what);
  if (alignment && reinterpret_cast<uintptr_t>(address) % alignment)
    fatal("MISALIGNED", std::to_string(bytes) + " bytes of " + what + " need alignment " + std::to_string(alignment),
          site, code);
  if (!cells) return;
  size_t first = reinterpret_cast<uintptr_t>(address) & 1;
  for (size_t i = 0; i < (first + bytes + 1) / 2; i++) touch(cells[i], is_write, what, site, code);
}

void workspace(void* base, size_t bytes) {
  Buffer buffer{
      "workspace " + std::to_string(buffers.size()), static_cast<char*>(base), 1, bytes, bytes, true, 0, 0, {}};
  buffer.cells.resize(bytes / 2 + 9);
  std::memset(base, 0xFF, bytes);
  buffers.push_back(std::move(buffer));
}

void load16(void* to, const void* from, Site site) {
  memory_access(from, 16, false, 16, site, nullptr);
  std::memcpy(to, from, 16);
}

void store16(void* to, const void* from, Site site) {
  memory_access(to, 16, true, 16, site, nullptr);
  std::memcpy(to, from, 16);
}

// ---------------------------------------------------------------------------------------------- cp.async

void cp_async(void* shared, const void* global, int source_bytes, Site site) {
  machine.counters.async_copies++;
  if (source_bytes < 0 || source_bytes > 16)
    fatal("COPY", "source size " + std::to_string(source_bytes), site, nullptr);
  if (reinterpret_cast<uintptr_t>(global) % 16)
    fatal("MISALIGNED", "cp.async source needs alignment 16", site, nullptr);
  if (source_bytes) memory_access(global, source_bytes, false, 0, site, nullptr);
  memory_access(shared, 16, true, 16, site, nullptr);
  std::string what;
  Cell* cells = find(static_cast<char*>(shared), 16, true, site, nullptr, &what);
  for (int i = 0; i < 8; i++) cells[i].in_flight = true;
  std::memset(shared, 0xFF, 16);
  machine.self->open_group.push_back(
      {static_cast<char*>(shared), static_cast<const char*>(global), source_bytes, site});
}

void cp_async_commit() {
  machine.self->committed.push_back(std::move(machine.self->open_group));
  machine.self->open_group.clear();
}

void cp_async_wait(int groups_left) {
  auto& committed = machine.self->committed;
  while (int(committed.size()) > groups_left) {
    for (PendingCopy& copy : committed.front()) {
      std::string what;
      Cell* cells = find(copy.shared, 16, true, copy.site, nullptr, &what);
      for (int i = 0; i < 8; i++) cells[i].in_flight = false;
      char bytes[16] = {};
      std::memcpy(bytes, copy.global, copy.source_bytes);
      std::memcpy(copy.shared, bytes, 16);
      for (int i = 0; i < 8; i++) touch(cells[i], true, what, copy.site, nullptr);
    }
    committed.pop_front();
  }
}

}  // namespace simt

// ---------------------------------------------------------------------------------------------- called from Python

extern "C" {

// Forgets buffers, findings and counters. The schedule follows `seed`; `preempt` is the chance of a switch per access.
void simt_reset(uint64_t seed, double preempt) {
  using namespace simt;
  buffers.clear();
  findings.clear();
  seen.clear();
  machine.random = seed * 0x9E3779B97F4A7C15ULL + 0x1234567;
  machine.preempt = preempt;
  machine.aborted = false;
  machine.counters = Counters{};
  if (!image_begin) dl_iterate_phdr(find_image, nullptr);
}

// Declares a global buffer. One that is not initialised is filled with 0xFF (NaN) and must be written before it is
// read.
void simt_buffer(const char* name, void* base, size_t rows, size_t row_bytes, size_t stride, int writable,
                 int initialised) {
  using namespace simt;
  Buffer buffer{name, static_cast<char*>(base), rows, row_bytes, stride, writable != 0, 0, 0, {}};
  buffer.cells.resize(buffer.extent() / 2 + 9);
  if (initialised)
    for (Cell& cell : buffer.cells) cell.initialised = true;
  else
    for (size_t row = 0; row < rows; row++) std::memset(buffer.base + row * stride, 0xFF, row_bytes);
  buffers.push_back(std::move(buffer));
}

// The findings, one a line; empty when there are none.
const char* simt_findings() {
  static std::string text;
  text.clear();
  for (auto& finding : simt::findings) text += finding + "\n";
  return text.c_str();
}

void simt_counters(uint64_t* out) { std::memcpy(out, &simt::machine.counters, sizeof(simt::Counters)); }

void simt_buffer_traffic(int index, uint64_t* read_bytes, uint64_t* written_bytes) {
  *read_bytes = simt::buffers[index].read_bytes;
  *written_bytes = simt::buffers[index].written_bytes;
}

#define SIMT_HOOK(prefix, bytes, alignment)                                                \
  void __tsan_##prefix##read##bytes(void* p) {                                             \
    simt::memory_access(p, bytes, false, alignment, {"", 0}, __builtin_return_address(0)); \
  }                                                                                        \
  void __tsan_##prefix##write##bytes(void* p) {                                            \
    simt::memory_access(p, bytes, true, alignment, {"", 0}, __builtin_return_address(0));  \
  }
#define SIMT_HOOKS(bytes) \
  SIMT_HOOK(, bytes, bytes) SIMT_HOOK(unaligned_, bytes, bytes) SIMT_HOOK(volatile_, bytes, bytes)
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
void __tsan_read_range(void* p, size_t n) { simt::memory_access(p, n, false, 0, {"", 0}, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { simt::memory_access(p, n, true, 0, {"", 0}, __builtin_return_address(0)); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

}  // extern "C"
