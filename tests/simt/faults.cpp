// Small kernels with one fault each: what the harness must report, and kernels without one that it must not.
#define LOWRANK_ARCH simt_faults
#include "simt.cuh"

using namespace lowrank::LOWRANK_ARCH;

namespace {

struct Params {
  const float* in;  // [64]
  float* out;       // [64]
};

float* tile() { return reinterpret_cast<float*>(shared_memory()); }
int t() { return thread_id(); }

void clean(Params p) {
  tile()[t()] = p.in[t()];
  sync_block();
  p.out[t()] = tile()[63 - t()];
}
void missing_barrier(Params p) {
  tile()[t()] = p.in[t()];
  p.out[t()] = tile()[63 - t()];
}
void warp_barrier_across_warps(Params p) {
  tile()[t()] = p.in[t()];
  sync_warp();
  p.out[t()] = tile()[63 - t()];
}
void clean_within_a_warp(Params p) {
  tile()[t()] = p.in[t()];
  sync_warp();
  p.out[t()] = tile()[t() ^ 1];
}
void missing_warp_barrier(Params p) {
  tile()[t()] = p.in[t()];
  p.out[t()] = tile()[t() ^ 1];
}
void write_after_read(Params p) {
  tile()[t()] = p.in[t()];
  sync_block();
  p.out[t()] = tile()[63 - t()];
  tile()[t()] = 0.0f;
}
void write_write(Params p) { p.out[t() / 2] = p.in[t()]; }
void blocks_overlap(Params p) { p.out[t()] = p.in[t()]; }
void past_global(Params p) { p.out[t() + 1] = p.in[t()]; }
void read_past_global(Params p) { p.out[t()] = p.in[t() + 1]; }
void past_shared(Params p) {
  tile()[t() + 200] = p.in[t()];
  p.out[t()] = 0.0f;
}
void null_pointer(Params p) { *reinterpret_cast<volatile float*>(uintptr_t(16)) = p.in[t()]; }
void write_input(Params p) { const_cast<float*>(p.in)[t()] = 1.0f; }
void uninitialised(Params p) { p.out[t()] = tile()[t()]; }
void uninitialised_output(Params p) { p.out[t()] += p.in[t()]; }
void misaligned(Params p) {
  if (t() < 8) store16(reinterpret_cast<char*>(p.out) + 16 * t() + 4, load16(p.in + 4 * t()));
}
void divergent(Params) {
  if (t() % 32 < 16) {
    sync_block();
  } else {
    sync_block();
  }
}
void half_a_block(Params) {
  if (t() < 32) sync_block();
}
void leaves_a_shuffle(Params p) {
  if (t() % 32 == 5) return;
  p.out[t()] = shuffle_xor(p.in[t()], 1);
}
void deadlock(Params) {
  if (t() < 32) {
    sync_block();
  } else if (t() % 32 < 8) {
    sync_warp();
  } else {
    sync_block();
  }
}
void copy_not_awaited(Params p) {
  cp_async_16(tile() + 4 * t(), p.in + 4 * (t() % 16), 16);
  cp_async_commit();
  p.out[t()] = tile()[4 * t()];
  cp_async_wait<0>();
}
void copy_never_awaited(Params p) {
  cp_async_16(tile() + 4 * t(), p.in + 4 * (t() % 16), 16);
  cp_async_commit();
}
void copy_without_barrier(Params p) {
  cp_async_16(tile() + 4 * t(), p.in + 4 * (t() % 16), 16);
  cp_async_commit();
  cp_async_wait<0>();
  p.out[t()] = tile()[4 * (63 - t())];
}
void clean_copy(Params p) {
  cp_async_16(tile() + 4 * t(), p.in + 4 * (t() % 16), 8);
  cp_async_commit();
  cp_async_wait<0>();
  sync_block();
  p.out[t()] = tile()[4 * (63 - t())];
}
void cluster_too_early(Params p) {
  tile()[t()] = p.in[t()];
  sync_block();
  Vec16 v = load16_cluster(tile() + 4 * (t() % 8), 1 - cluster_rank());
  if (cluster_rank() == 0) p.out[t()] = bits_to_float(v.word[0]);
  sync_cluster();
}
void cluster_exits_too_early(Params p) {
  tile()[t()] = p.in[t()];
  sync_cluster();
  if (cluster_rank() == 0) p.out[t()] = bits_to_float(load16_cluster(tile() + 4 * (t() % 8), 1).word[0]);
}
void clean_cluster(Params p) {
  tile()[t()] = p.in[t()];
  sync_cluster();
  if (cluster_rank() == 0) p.out[t()] = bits_to_float(load16_cluster(tile() + 4 * (t() % 8), 1).word[0]);
  sync_cluster();
}

struct Named {
  const char* name;
  void (*kernel)(Params);
  int blocks, cluster;
};
#define FAULT(name) {#name, name, 1, 1}
const Named kernels[] = {
    FAULT(clean),
    FAULT(missing_barrier),
    FAULT(warp_barrier_across_warps),
    FAULT(clean_within_a_warp),
    FAULT(missing_warp_barrier),
    FAULT(write_after_read),
    FAULT(write_write),
    {"blocks_overlap", blocks_overlap, 2, 1},
    FAULT(past_global),
    FAULT(read_past_global),
    FAULT(past_shared),
    FAULT(null_pointer),
    FAULT(write_input),
    FAULT(uninitialised),
    FAULT(uninitialised_output),
    FAULT(misaligned),
    FAULT(divergent),
    FAULT(half_a_block),
    FAULT(leaves_a_shuffle),
    FAULT(deadlock),
    FAULT(copy_not_awaited),
    FAULT(copy_never_awaited),
    FAULT(copy_without_barrier),
    FAULT(clean_copy),
    {"cluster_too_early", cluster_too_early, 2, 2},
    {"cluster_exits_too_early", cluster_exits_too_early, 2, 2},
    {"clean_cluster", clean_cluster, 2, 2},
};

}  // namespace

// Runs a kernel with two warps per block and `shared_bytes` of shared memory; false for an unknown name.
extern "C" int fault(const char* name, const float* in, float* out, int shared_bytes) {
  for (const Named& entry : kernels)
    if (!__builtin_strcmp(entry.name, name)) {
      launch(entry.kernel, {entry.blocks, 1, 1, 64, entry.cluster, size_t(shared_bytes), entry.name}, nullptr,
             Params{in, out});
      return 1;
    }
  return 0;
}
