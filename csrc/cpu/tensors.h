// From tensors to the matrices, factors and row ranges that the kernels take.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../row_stride.h"
#include "dispatch.h"

namespace lowrank {

using at::Tensor;

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return Dtype::f32;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::f16;
    default:
      TORCH_CHECK(false, "lowrank_fast: the CPU kernels take float32, bfloat16 and float16; got ", x.scalar_type());
  }
}

// An activation tensor as rows of its last dimension. Keeps the tensor that owns the memory: the argument itself unless
// its inner stride or its leading dimensions rule out one row stride, which costs a contiguous copy.
struct Rows {
  Tensor owner;
  Matrix matrix;
  int64_t count;

  const void* at(int64_t row) const {
    return static_cast<const char*>(matrix.data) + row * matrix.stride * owner.element_size();
  }
  const float* floats(int64_t row) const { return static_cast<const float*>(at(row)); }  // of a float32 tensor
  Rows slice(int64_t row, int64_t rows) const { return {owner, from(row), rows}; }
  Matrix from(int64_t row) const { return {const_cast<void*>(at(row)), matrix.stride, matrix.cols}; }
};

inline Rows rows_of(const Tensor& x) {
  TORCH_CHECK(x.dim() >= 1, "lowrank_fast: activations must have at least one dimension");
  int64_t stride;
  Tensor owner = single_row_stride(x, stride) ? x : x.contiguous();
  single_row_stride(owner, stride);
  const int64_t cols = x.size(-1);
  return {owner, {owner.data_ptr(), stride, cols}, cols ? x.numel() / cols : 0};
}

// The [k][d] factor of a parameter stored [k, d] (`d_dim` 1) or [d, k] (`d_dim` 0).
inline Factor factor_of(const Tensor& p, int64_t d_dim, int64_t d) {
  TORCH_CHECK(p.dim() == 2 && p.is_cpu() && p.size(d_dim) == d, "lowrank_fast: a parameter of sizes ", p.sizes(),
              " does not match activations [.., ", d, "]");
  return {p.data_ptr(), dtype_of(p), p.size(1 - d_dim), d, p.stride(1 - d_dim), p.stride(d_dim)};
}

enum class Use { shrink, expand };  // which kernel reads a panel

// Whether the factor's own memory is a panel of a natural format.
inline bool is_panel(const Factor& f, int64_t unit) {
  return f.dtype == Dtype::f32 && f.stride_d == 1 && f.k % 4 == 0 && f.d % unit == 0;
}

// Factors stacked along k, as one panel for activations of `dtype`.
class PanelSource {
 public:
  PanelSource(const Factor& factor, Dtype dtype, Use use) : PanelSource(std::vector<Factor>{factor}, dtype, use) {}
  PanelSource(std::vector<Factor> stack, Dtype dtype, Use use) : stack_(std::move(stack)), use_(use) {
    const Kernels& table = kernels(dtype);
    format_ = use == Use::shrink ? table.shrink_panel : table.expand_panel;
    unit_ = table.unit;
    for (const Factor& f : stack_) k_ += f.k;
  }
  int64_t cols() const { return stack_.front().d; }

  // The parameter's own memory is a panel, which `rows` rows are too few to pack. Expand takes all ranks of a unit
  // together: many that lie whole pages apart push each other out of the first-level cache. The copy pays from about 40
  // rows on (AVX-512, 24 and 32 ranks of 2048 and 4096 columns; 16 ranks at no number of rows).
  bool direct(int64_t rows) const {
    if (stack_.size() != 1 || !format_.natural || !is_panel(stack_.front(), unit_)) return false;
    return use_ == Use::shrink || k_ <= 16 || rows < 40 || !pages_apart(stack_.front().stride_k);
  }
  Panel in_place() const {
    return rows_of_ranks(static_cast<const float*>(stack_.front().data), stack_.front().stride_k, unit_);
  }

  const std::vector<Factor>& stack() const { return stack_; }

  int64_t floats(int64_t columns) const { return format_.floats(k_, columns); }
  // Packs columns [begin, end), begin a multiple of the unit, into memory of floats(end - begin). The panel's columns
  // are those of the factor: only [begin, end) may be read.
  Panel pack(float* memory, int64_t begin, int64_t end) const {
    return format_.pack(stack_.data(), static_cast<int64_t>(stack_.size()), begin, end, memory);
  }

 private:
  std::vector<Factor> stack_;
  Use use_;
  PanelFormat format_;
  int64_t unit_, k_ = 0;
};

// Grow-only memory of the calling thread, aligned to a cache line; valid until its next call with the same slot. Fresh
// pages cost more than the kernels that use them (1.4 us a page here), so they are kept.
enum class Slot { shared, thread, piece };
float* workspace(Slot slot, int64_t floats);

inline Dropout dropout_of(double p, const std::optional<Tensor>& seed) {
  if (p <= 0.0 || !seed.has_value()) return {};
  TORCH_CHECK(seed->scalar_type() == at::kLong && seed->numel() == 2 && seed->is_contiguous(),
              "lowrank_fast: seed must be int64 [2]; got ", seed->sizes());
  const int64_t* words = seed->data_ptr<int64_t>();
  const double threshold = p * 4294967296.0;
  return {static_cast<uint64_t>(words[0]), static_cast<uint32_t>(words[1]),
          threshold >= 4294967295.0 ? 0xffffffffu : static_cast<uint32_t>(threshold),
          static_cast<float>(1.0 / (1.0 - p)), true};
}

// ---------------------------------------------------------------------------------------------- threads

// Threads worth waking for `work` multiply-adds: one per ~30 us, and at most one per `grains`.
inline int64_t thread_count(int64_t work, int64_t grains) {
  if (at::in_parallel_region()) return 1;
  return std::max<int64_t>(1, std::min<int64_t>({at::get_num_threads(), grains, work / (1 << 20)}));
}

// f(thread, begin, end) over a static partition of [0, count) in multiples of `align`: same bits for a thread count.
template <class F>
void split(int64_t threads, int64_t count, int64_t align, const F& f) {
  const int64_t blocks = (count + align - 1) / align;
  threads = std::max<int64_t>(1, std::min(threads, blocks));
  auto run = [&](int64_t i) {
    const int64_t begin = blocks * i / threads * align, end = std::min(blocks * (i + 1) / threads * align, count);
    if (begin < end) f(i, begin, end);
  };
  if (threads == 1) return run(0);
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) run(i);
  });
}

// f(row, rows) over [begin, end) in blocks of `size` rows.
template <class F>
void blocks(int64_t begin, int64_t end, int64_t size, const F& f) {
  for (int64_t row = begin; row < end; row += size) f(row, std::min(size, end - row));
}

inline Tensor empty_result(const Tensor& like) { return at::empty({0}, like.options()); }

inline Tensor hidden(const Tensor& x, int64_t width) {  // [.., width] float32 beside x [.., d]
  auto sizes = x.sizes().vec();
  sizes.back() = width;
  return at::empty(sizes, x.options().dtype(at::kFloat));
}

// Asks for huge pages behind a large fresh result. The allocator maps anything over 32 MiB anew for every call, and its
// first touch costs 1.4 us for each 4 KiB page: more than the kernel that fills it.
void prefer_huge_pages(const Tensor& fresh);

inline Tensor activations(const Tensor& x, int64_t width) {  // [.., width] in the dtype of x, contiguous
  auto sizes = x.sizes().vec();
  sizes.back() = width;
  Tensor fresh = at::empty(sizes, x.options());
  prefer_huge_pages(fresh);
  return fresh;
}

}  // namespace lowrank
