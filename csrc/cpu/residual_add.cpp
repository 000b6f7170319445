// residual_add: out = y + s (x A^T) B^T in one read of x and y, and its backward in one read of g and x.
//
//   forward   t = dropout(x) A^T, z = s t, out = y + z B^T
//   backward  v = g B, u = s v, dB = g^T (s t), dx = u A, dA = u^T dropout(x)
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "checks.h"
#include "engine.h"

namespace lowrank {
namespace {

using Seed = std::optional<Tensor>;

Tensor add_into(const Tensor& out_tensor, const Tensor& y_tensor, const Tensor& x_tensor, const Tensor& A,
                const Tensor& B, double scale, double dropout_p, const Seed& seed, bool save_t) {
  check_update("y", y_tensor, x_tensor, A, B);
  const Rows x = rows_of(x_tensor), y = rows_of(y_tensor), out = rows_of(out_tensor);
  const Factor down = factor_of(A, 1, x.matrix.cols), up = factor_of(B, 0, y.matrix.cols);
  const int64_t k = down.k, padded = pad_rank(k);
  const Dtype dtype = dtype_of(y_tensor);
  Tensor t_tensor = save_t ? hidden(x_tensor, k) : at::empty({0}, x_tensor.options().dtype(at::kFloat));
  float* saved = save_t ? t_tensor.data_ptr<float>() : nullptr;

  const Shrink first{x, PanelSource(down, dtype, Use::shrink), k, dropout_of(dropout_p, seed)};
  const Expand second{&y, out, PanelSource(up, dtype, Use::expand), k, {}};
  forward(y.count, &first, &second, [&](int64_t row, int64_t rows, const float* t, float* z) {
    if (saved)
      for (int64_t i = 0; i < rows; ++i) std::copy_n(t + i * padded, k, saved + (row + i) * k);
    scaled(t, padded, rows, k, static_cast<float>(scale), z, padded);
  });
  if (!out.owner.is_same(out_tensor)) out_tensor.copy_(out.owner);  // a layout without one row stride
  return t_tensor;
}

std::tuple<Tensor, Tensor> residual_add(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B,
                                        double scale, double dropout_p, const Seed& seed, bool save_t) {
  check_activation("y", y);
  Tensor out = activations(y, y.size(-1));
  Tensor t = add_into(out, y, x, A, B, scale, dropout_p, seed, save_t);
  return {out, t};
}

Tensor residual_add_(Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B, double scale, double dropout_p,
                     const Seed& seed, bool save_t) {
  check_written("y", y, y, {x, A, B});
  return add_into(y, y, x, A, B, scale, dropout_p, seed, save_t);
}

Tensor residual_add_out(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B, double scale,
                        double dropout_p, const Seed& seed, bool save_t, Tensor& out) {
  check_written("out", out, y, {x, A, B});
  at::assert_no_partial_overlap(out, y);  // y itself is fine
  return add_into(out, y, x, A, B, scale, dropout_p, seed, save_t);
}

void check_backward(const Tensor& g, const std::optional<Tensor>& x, const Tensor& t, const Tensor& A, const Tensor& B,
                    bool need_dA, bool need_dB) {
  check_activation("g", g);
  TORCH_CHECK(A.dim() == 2, "lowrank_fast: A must be [r, d_in]; got ", A.sizes());
  check_parameter("A", A, g, {A.size(0), A.size(1)});
  check_parameter("B", B, g, {g.size(-1), A.size(0)});
  TORCH_CHECK(!need_dA || x.has_value(), "lowrank_fast: the gradient of A needs x");
  if (need_dA) check_beside("x", *x, g, A.size(1));
  if (need_dB) check_hidden("t", t, g, A.size(0));
}

// dx, dA, dB undefined: not needed.
void gradients_into(const Tensor& g_tensor, const std::optional<Tensor>& x_tensor, const Tensor& t_tensor,
                    const Tensor& A, const Tensor& B, double scale, double dropout_p, const Seed& seed,
                    const Tensor& dx_tensor, const Tensor& dA, const Tensor& dB) {
  const Rows g = rows_of(g_tensor);
  const Dtype dtype = dtype_of(g_tensor);
  const int64_t d_in = A.size(-1), k = A.size(0), padded = pad_rank(k);
  const Factor down = factor_of(A, 1, d_in), up = factor_of(B, 0, g.matrix.cols);
  const bool need_dx = dx_tensor.defined(), need_dA = dA.defined(), need_dB = dB.defined();
  const bool need_u = need_dx || need_dA;
  const float s = static_cast<float>(scale);

  const Tensor t = need_dB ? hidden_rows(t_tensor, g.count, k) : Tensor();
  std::optional<Rows> x, dx;
  if (need_dA) x = rows_of(*x_tensor);
  if (need_dx) {
    dx = rows_of(dx_tensor);
    TORCH_CHECK(dx->owner.is_same(dx_tensor), "lowrank_fast: dx must have one stride between rows");
  }
  const PanelSource B_panel(up, dtype, Use::shrink);
  const ShrinkOuter first{g, need_u ? &B_panel : nullptr, target(need_dB, dB, 0, g.matrix.cols), k, k};
  const ExpandOuter second{x ? &*x : nullptr,
                           dx ? &*dx : nullptr,
                           PanelSource(down, dtype, Use::expand),
                           target(need_dA, dA, 1, d_in),
                           k,
                           dropout_of(dropout_p, seed)};
  backward(
      g.count, &first, need_u ? &second : nullptr,
      [&](int64_t row, int64_t rows, float* z) { scaled(t.data_ptr<float>() + row * k, k, rows, k, s, z, padded); },
      [&](int64_t, int64_t rows, const float* v, float* u) {
        if (u) scaled(v, padded, rows, k, s, u, padded);
      });
}

std::tuple<Tensor, Tensor, Tensor> residual_add_backward(const Tensor& g, const std::optional<Tensor>& x,
                                                         const Tensor& t, const Tensor& A, const Tensor& B,
                                                         double scale, double dropout_p, const Seed& seed, bool need_dx,
                                                         bool need_dA, bool need_dB) {
  check_backward(g, x, t, A, B, need_dA, need_dB);
  Tensor dx = need_dx ? activations(g, A.size(-1)) : Tensor();
  Tensor dA = need_dA ? at::empty_like(A) : Tensor(), dB = need_dB ? at::empty_like(B) : Tensor();
  gradients_into(g, x, t, A, B, scale, dropout_p, seed, dx, dA, dB);
  return {need_dx ? dx : empty_result(g), need_dA ? dA : empty_result(A), need_dB ? dB : empty_result(B)};
}

void residual_add_backward_out(const Tensor& g, const Tensor& x, const Tensor& t, const Tensor& A, const Tensor& B,
                               double scale, double dropout_p, const Seed& seed, Tensor& dx, Tensor& dA, Tensor& dB) {
  check_backward(g, x, t, A, B, true, true);
  check_written("dx", dx, x, {g, x, t, A, B, dA, dB});
  check_written("dA", dA, A, {g, x, t, A, B, dB});
  check_written("dB", dB, B, {g, x, t, A, B});
  gradients_into(g, x, t, A, B, scale, dropout_p, seed, dx, dA, dB);
}

}  // namespace

TORCH_LIBRARY_IMPL(lowrank_fast, CPU, m) {
  m.impl("residual_add", residual_add);
  m.impl("residual_add_", residual_add_);
  m.impl("residual_add_out", residual_add_out);
  m.impl("residual_add_backward", residual_add_backward);
  m.impl("residual_add_backward_out", residual_add_backward_out);
}

}  // namespace lowrank
