// Memory: what outlives a call on each thread, and how large results are mapped.
#include <cstdlib>
#if defined(__linux__)
#include <sys/mman.h>
#endif

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

void prefer_huge_pages(const Tensor& fresh) {
#if defined(__linux__)
  constexpr size_t kHuge = size_t{2} << 20, kWorthIt = size_t{32} << 20;
  if (fresh.nbytes() < kWorthIt) return;
  const auto begin = (reinterpret_cast<uintptr_t>(fresh.data_ptr()) + kHuge - 1) / kHuge * kHuge;
  const auto end = (reinterpret_cast<uintptr_t>(fresh.data_ptr()) + fresh.nbytes()) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: failing is harmless
#else
  (void)fresh;
#endif
}

}  // namespace lowrank
