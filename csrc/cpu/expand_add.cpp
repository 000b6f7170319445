// expand_add: out = y + s t B^T, the second half of the residual add; backward dt = s g B, dB = s g^T t.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "checks.h"
#include "engine.h"

namespace lowrank {
namespace {

// y (or in a backward its gradient), t [.., r], B [d_out, r]
void check_expand(const char* stream, const Tensor& y, const Tensor& t, const Tensor& B) {
  check_activation(stream, y);
  check_parameter("B", B, y, {y.size(-1), B.dim() == 2 ? B.size(1) : 1});
  check_hidden("t", t, y, B.size(1));
}

void add_into(const Tensor& out_tensor, const Tensor& y_tensor, const Tensor& t_tensor, const Tensor& B, double scale) {
  const Rows y = rows_of(y_tensor), out = rows_of(out_tensor);
  const Factor up = factor_of(B, 0, y.matrix.cols);
  const int64_t k = up.k, padded = pad_rank(k);
  const Rows t = rows_of(t_tensor.to(at::kFloat));
  const Expand second{&y, out, PanelSource(up, dtype_of(y_tensor), Use::expand), k, {}};
  forward(y.count, nullptr, &second, [&](int64_t row, int64_t rows, const float*, float* z) {
    scaled(t.floats(row), t.matrix.stride, rows, k, static_cast<float>(scale), z, padded);
  });
  if (!out.owner.is_same(out_tensor)) out_tensor.copy_(out.owner);
}

Tensor expand_add(const Tensor& y, const Tensor& t, const Tensor& B, double scale) {
  check_expand("y", y, t, B);
  Tensor out = activations(y, y.size(-1));
  add_into(out, y, t, B, scale);
  return out;
}

void expand_add_(Tensor& y, const Tensor& t, const Tensor& B, double scale) {
  check_expand("y", y, t, B);
  check_written("y", y, y, {t, B});
  add_into(y, y, t, B, scale);
}

std::tuple<Tensor, Tensor> expand_add_backward(const Tensor& g_tensor, const Tensor& t_tensor, const Tensor& B,
                                               double scale, bool need_dt, bool need_dB) {
  check_activation("g", g_tensor);
  check_parameter("B", B, g_tensor, {g_tensor.size(-1), B.dim() == 2 ? B.size(1) : 1});
  if (need_dB) check_hidden("t", t_tensor, g_tensor, B.size(1));
  const Rows g = rows_of(g_tensor);
  const Factor up = factor_of(B, 0, g.matrix.cols);
  const int64_t k = up.k, padded = pad_rank(k);
  const float s = static_cast<float>(scale);
  Tensor dt = need_dt ? hidden(g_tensor, k) : at::empty({0}, g_tensor.options().dtype(at::kFloat));
  Tensor dB = need_dB ? at::empty_like(B) : empty_result(B);
  if (!need_dt && !need_dB) return {dt, dB};
  const Rows t = need_dB ? rows_of(t_tensor.to(at::kFloat)) : Rows{};
  const PanelSource B_panel(up, dtype_of(g_tensor), Use::shrink);
  const ShrinkOuter first{g, need_dt ? &B_panel : nullptr, target(need_dB, dB, 0, g.matrix.cols), k, k};
  backward(
      g.count, &first, nullptr,
      [&](int64_t row, int64_t rows, float* z) { scaled(t.floats(row), t.matrix.stride, rows, k, s, z, padded); },
      [&](int64_t row, int64_t rows, const float* v, float*) {
        if (v) scaled(v, padded, rows, k, s, dt.data_ptr<float>() + row * k, k);
      });
  return {dt, dB};
}

}  // namespace

TORCH_LIBRARY_IMPL(lowrank_fast, CPU, m) {
  m.impl("expand_add", expand_add);
  m.impl("expand_add_", expand_add_);
  m.impl("expand_add_backward", expand_add_backward);
}

}  // namespace lowrank
