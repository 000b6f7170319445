// Per-thread memory that outlives a call.
#include <cstdlib>

#include "tensors.h"

namespace lowrank {

namespace {

struct Block {
  float* data = nullptr;
  int64_t floats = 0;
  ~Block() { std::free(data); }
};

}  // namespace

float* workspace(Slot slot, int64_t floats) {
  static thread_local Block blocks[3];
  Block& block = blocks[static_cast<int>(slot)];
  if (block.floats < floats) {
    std::free(block.data);
    block.floats = 0;
    const int64_t rounded = (floats + 1023) / 1024 * 1024;
    block.data = static_cast<float*>(std::aligned_alloc(64, rounded * sizeof(float)));
    TORCH_CHECK(block.data, "lowrank_fast: no memory for a workspace of ", rounded * sizeof(float), " bytes");
    block.floats = rounded;
  }
  return block.data;
}

}  // namespace lowrank
