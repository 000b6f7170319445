// shrink: t = dropout(x) A^T, the first half of the residual add; backward dx = dt A, dA = dt^T dropout(x).
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "checks.h"
#include "engine.h"

namespace lowrank {
namespace {

using Seed = std::optional<Tensor>;

Tensor shrink(const Tensor& x_tensor, const Tensor& A, double dropout_p, const Seed& seed) {
  check_activation("x", x_tensor);
  check_parameter("A", A, x_tensor, {A.dim() == 2 ? A.size(0) : 1, x_tensor.size(-1)});
  const Rows x = rows_of(x_tensor);
  const Factor down = factor_of(A, 1, x.matrix.cols);
  const int64_t k = down.k, padded = pad_rank(k);
  Tensor t_tensor = hidden(x_tensor, k);
  float* saved = t_tensor.data_ptr<float>();
  const Shrink first{x, PanelSource(down, dtype_of(x_tensor), Use::shrink), k, dropout_of(dropout_p, seed)};
  forward(x.count, &first, nullptr, [&](int64_t row, int64_t rows, const float* t, float*) {
    for (int64_t i = 0; i < rows; ++i) std::copy_n(t + i * padded, k, saved + (row + i) * k);
  });
  return t_tensor;
}

std::tuple<Tensor, Tensor> shrink_backward(const Tensor& dt_tensor, const std::optional<Tensor>& x_tensor,
                                           const Tensor& A, double dropout_p, const Seed& seed, at::ScalarType dx_dtype,
                                           bool need_dx, bool need_dA) {
  TORCH_CHECK(A.dim() == 2 && A.numel() > 0, "lowrank_fast: A must be [r >= 1, d_in >= 1]; got ", A.sizes());
  TORCH_CHECK(!need_dA || x_tensor.has_value(), "lowrank_fast: the gradient of A needs x");
  const int64_t k = A.size(0), d_in = A.size(1), padded = pad_rank(k), count = dt_tensor.numel() / k;
  const auto options = dt_tensor.options().dtype(dx_dtype);
  const Tensor& like = need_dA ? *x_tensor : dt_tensor;
  check_activation(need_dA ? "x" : "dt", like);
  check_hidden("dt", dt_tensor, like, k);
  TORCH_CHECK(A.is_cpu() && kernel_dtype(A), "lowrank_fast: A must be float32, bfloat16 or float16; got ",
              A.scalar_type());
  if (need_dA) check_beside("x", *x_tensor, like, d_in);
  if (need_dA && need_dx)
    TORCH_CHECK(like.scalar_type() == dx_dtype, "lowrank_fast: dx_dtype must be that of x, ", like.scalar_type(),
                "; got ", dx_dtype);
  const Tensor u_rows = hidden_rows(dt_tensor, count, k);
  auto sizes = dt_tensor.sizes().vec();
  sizes.back() = d_in;
  Tensor dx_tensor = need_dx ? at::empty(sizes, options) : at::empty({0}, options);
  Tensor dA = need_dA ? at::empty_like(A) : empty_result(A);
  if (!need_dx && !need_dA) return {dx_tensor, dA};
  std::optional<Rows> x, dx;
  if (need_dA) x = rows_of(*x_tensor);
  if (need_dx) dx = rows_of(dx_tensor);
  const Dtype dtype = need_dx ? dtype_of(dx_tensor) : dtype_of(*x_tensor);
  const ExpandOuter second{x ? &*x : nullptr,
                           dx ? &*dx : nullptr,
                           PanelSource(factor_of(A, 1, d_in), dtype, Use::expand),
                           target(need_dA, dA, 1, d_in),
                           k,
                           dropout_of(dropout_p, seed)};
  backward(
      count, nullptr, &second, [](int64_t, int64_t, float*) {},
      [&](int64_t row, int64_t rows, const float*, float* u) {
        scaled(u_rows.data_ptr<float>() + row * k, k, rows, k, 1.0f, u, padded);
      });
  return {dx_tensor, dA};
}

}  // namespace

TORCH_LIBRARY_IMPL(lowrank_fast, CPU, m) {
  m.impl("shrink", shrink);
  m.impl("shrink_backward", shrink_backward);
}

}  // namespace lowrank
