// One tiny kernel per primitive of csrc/cuda/simt.cuh, for tests of fragment layouts that share nothing with the
// kernels.
#define LOWRANK_ARCH simt_primitives
#include "tile.cuh"

using namespace lowrank::LOWRANK_ARCH;

namespace {

struct Params {
  const char* in;
  char* out;
  int option;
};

void mma(Params p) {  // in: per lane a[4], b[2] (uint32) and c[4] (float); out: per lane c[4]
  const uint32_t* in = reinterpret_cast<const uint32_t*>(p.in) + lane_id() * 10;
  uint32_t a[4];
  float c[4];
  for (int i = 0; i < 4; i++) a[i] = in[i];
  for (int i = 0; i < 4; i++) c[i] = bits_to_float(in[6 + i]);
  if (p.option) {
    mma_f16(c, a, in[4], in[5]);
  } else {
    mma_bf16(c, a, in[4], in[5]);
  }
  for (int i = 0; i < 4; i++) reinterpret_cast<float*>(p.out)[lane_id() * 4 + i] = c[i];
}

void ldmatrix(Params p) {  // in: 32 rows of 8 uint16; lane l passes row l; out: per lane 4 registers
  auto* shared = reinterpret_cast<uint16_t*>(shared_memory());
  const auto* in = reinterpret_cast<const uint16_t*>(p.in);
  for (int i = 0; i < 8; i++) shared[lane_id() * 8 + i] = in[lane_id() * 8 + i];
  sync_warp();
  uint32_t r[4];
  if (p.option) {
    ldmatrix_x4_trans(r, &shared[lane_id() * 8]);
  } else {
    ldmatrix_x4(r, &shared[lane_id() * 8]);
  }
  for (int i = 0; i < 4; i++) reinterpret_cast<uint32_t*>(p.out)[lane_id() * 4 + i] = r[i];
}

void shuffle(Params p) {
  float v = reinterpret_cast<const float*>(p.in)[lane_id()];
  reinterpret_cast<float*>(p.out)[lane_id()] = shuffle_xor(v, p.option);
}

void async_copy(Params p) {  // option: bytes of the source to read, the rest must become zero
  char* shared = shared_memory() + 16 * thread_id();
  cp_async_16(shared, p.in + 16 * thread_id(), p.option);
  cp_async_commit();
  cp_async_wait<0>();
  store16(p.out + 16 * thread_id(), load16(shared));
}

void convert(Params p) {  // in: float; out: bf16, f16 bits and both back as float
  float v = reinterpret_cast<const float*>(p.in)[thread_id()];
  Bf16 b = rounded<Bf16>(v);
  F16 h = rounded<F16>(v);
  auto* out = reinterpret_cast<float*>(p.out) + 2 * thread_id();
  out[0] = to_float(b);
  out[1] = to_float(h);
}

void random_words(Params p) {  // in: counter[4], key[2]; out: word[4]
  const auto* in = reinterpret_cast<const uint32_t*>(p.in) + 6 * thread_id();
  Philox4 r = philox(in[0], in[1], in[2], in[3], in[4], in[5]);
  for (int i = 0; i < 4; i++) reinterpret_cast<uint32_t*>(p.out)[4 * thread_id() + i] = r.word[i];
}

void cluster_share(Params p) {  // every block writes 32 floats, then reads those of block (rank + option) % 4
  auto* own = reinterpret_cast<float*>(shared_memory());
  own[thread_id()] = reinterpret_cast<const float*>(p.in)[cluster_rank() * 32 + thread_id()];
  sync_cluster();
  if (thread_id() < 8) {
    Vec16 v = load16_cluster(own + 4 * thread_id(), (cluster_rank() + p.option) % 4);
    store16(p.out + cluster_rank() * 128 + 16 * thread_id(), v);
  }
  sync_cluster();
}

using Kernel = void (*)(Params);
struct Named {
  const char* name;
  Kernel kernel;
  int blocks, cluster;
};
const Named kernels[] = {
    {"mma", mma, 1, 1},
    {"ldmatrix", ldmatrix, 1, 1},
    {"shuffle", shuffle, 1, 1},
    {"async_copy", async_copy, 1, 1},
    {"convert", convert, 1, 1},
    {"random_words", random_words, 1, 1},
    {"cluster_share", cluster_share, 4, 4},
};

}  // namespace

// Runs a primitive's kernel with one warp per block; false for an unknown name.
extern "C" int primitive(const char* name, const char* in, char* out, int option) {
  for (const Named& entry : kernels)
    if (!__builtin_strcmp(entry.name, name)) {
      launch(entry.kernel, {entry.blocks, 1, 1, 32, entry.cluster, 1024, entry.name}, nullptr, Params{in, out, option});
      return 1;
    }
  return 0;
}
