// What every op asks of its arguments before it allocates, reads or writes: shapes, dtypes and devices, with the name
// of the argument in the error. `lowrank_fast/checks.py` asks the same of the public functions, in more words.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>

#include <initializer_list>

namespace lowrank {

inline bool kernel_dtype(const at::Tensor& x) {
  const auto dtype = x.scalar_type();
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
}

inline void check_activation(const char* name, const at::Tensor& x) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) >= 1 && kernel_dtype(x) && x.is_cpu(), "lowrank_fast: ", name,
              " must be [.., d >= 1] float32, bfloat16 or float16 on the CPU; got ", x.sizes(), " ", x.scalar_type(),
              " on ", x.device());
}

inline bool same_leading(const at::Tensor& x, const at::Tensor& y) {
  return x.dim() == y.dim() && x.sizes().slice(0, x.dim() - 1) == y.sizes().slice(0, y.dim() - 1);
}

// x [.., width] beside y, a checked activation.
inline void check_beside(const char* name, const at::Tensor& x, const at::Tensor& y, int64_t width) {
  TORCH_CHECK(same_leading(x, y) && x.size(-1) == width && x.scalar_type() == y.scalar_type() && x.is_cpu(),
              "lowrank_fast: ", name, " must be [.., ", width, "] ", y.scalar_type(),
              " with the leading dimensions of ", y.sizes(), "; got ", x.sizes(), " ", x.scalar_type(), " on ",
              x.device());
}

// A parameter: these sizes, the dtype of the activations or float32.
inline void check_parameter(const char* name, const at::Tensor& p, const at::Tensor& like,
                            std::initializer_list<int64_t> sizes) {
  TORCH_CHECK(p.sizes() == at::IntArrayRef(sizes) && p.numel() > 0 && p.is_cpu() &&
                  (p.scalar_type() == like.scalar_type() || p.scalar_type() == at::kFloat),
              "lowrank_fast: ", name, " must be ", at::IntArrayRef(sizes), ", not empty, ", like.scalar_type(),
              " or float32 like the activations; got ", p.sizes(), " ", p.scalar_type(), " on ", p.device());
}

// A tensor that runs beside the activations in the accumulators' dtype, or in theirs: t, dt, p.
inline void check_hidden(const char* name, const at::Tensor& t, const at::Tensor& like, int64_t width) {
  TORCH_CHECK(same_leading(t, like) && t.size(-1) == width && t.is_cpu() &&
                  (t.scalar_type() == at::kFloat || t.scalar_type() == like.scalar_type()),
              "lowrank_fast: ", name, " must be [.., ", width, "] float32 or ", like.scalar_type(),
              " with the leading dimensions of ", like.sizes(), "; got ", t.sizes(), " ", t.scalar_type());
}

// y [.., d_out], x [.., d_in], A [r, d_in], B [d_out, r], parameters in the dtype of the activations or float32.
inline bool is_update(const at::Tensor& y, const at::Tensor& x, const at::Tensor& A, const at::Tensor& B) {
  const auto dtype = y.scalar_type();
  auto parameter = [&](const at::Tensor& p) {
    return p.dim() == 2 && p.numel() > 0 && p.is_cpu() && (p.scalar_type() == dtype || p.scalar_type() == at::kFloat);
  };
  return y.is_cpu() && kernel_dtype(y) && x.is_cpu() && x.scalar_type() == dtype && y.dim() >= 1 &&
         same_leading(x, y) && parameter(A) && parameter(B) && A.size(1) == x.size(-1) && B.size(0) == y.size(-1) &&
         B.size(1) == A.size(0);
}

inline void check_update(const char* stream, const at::Tensor& y, const at::Tensor& x, const at::Tensor& A,
                         const at::Tensor& B) {
  if (is_update(y, x, A, B)) return;
  check_activation(stream, y);
  check_activation("x", x);
  check_beside("x", x, y, x.size(-1));
  TORCH_CHECK(A.dim() == 2, "lowrank_fast: A must be [r, d_in]; got ", A.sizes());
  check_parameter("A", A, y, {A.size(0), x.size(-1)});
  check_parameter("B", B, y, {y.size(-1), A.size(0)});
}

// A tensor to be written: like `like` in shape, dtype and device, each element in memory of its own, none of it shared
// with what is read.
inline void check_written(const char* name, const at::Tensor& out, const at::Tensor& like,
                          std::initializer_list<at::Tensor> read) {
  TORCH_CHECK(out.sizes() == like.sizes() && out.scalar_type() == like.scalar_type() && out.device() == like.device(),
              "lowrank_fast: ", name, " must be ", like.sizes(), " ", like.scalar_type(), " on ", like.device(),
              "; got ", out.sizes(), " ", out.scalar_type(), " on ", out.device());
  at::assert_no_internal_overlap(out);
  for (const at::Tensor& input : read) at::assert_no_overlap(out, input);
}

}  // namespace lowrank
