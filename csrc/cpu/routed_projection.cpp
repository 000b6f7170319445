// routed_projection: out = y + s sum_e w_e (x A^T) B_e^T, and its backward.
//
// token     one pass: t, logits, softmax and z = s (w (x) t) per block of rows, then a rank-E r expand. Backward the
// same
//           way round: v = g B_cat, dw_e = s <v_e, t>, dt = s sum_e w_e v_e.
// batch,    two passes, because the mean over tokens is a barrier: x -> t, p; then w, B_mix = sum_e w_e B_e (a few
// sample    hundred KB) and y -> out. Backward: g -> v = g B_mix and G = s g^T t, of which dB_e = w_e G and dw_e = <G,
// B_e>
//           (one G per sample, never E of them); then x -> dx, dA.
// static    batch with given weights: no barrier, one pass.
//
// Backward of the softmax: dlogits = p (dp - <p, dp>), where a mean shares dp = dw / tokens among the tokens it kept.
#include <ATen/autocast_mode.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/tensor.h>
#include <torch/library.h>

#include <array>
#include <string_view>

#include "checks.h"
#include "engine.h"

namespace lowrank {
namespace {

using MaybeTensor = std::optional<Tensor>;
// Autocast must not round the small matrix products below.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

struct Shape {
  int64_t count, samples, d_in, d_out, experts, k;
  bool token, sample, fixed, router_on_x;  // fixed: static
  Dtype dtype;
};

Shape shape_of(const Rows& rows, const Tensor& leading, const Tensor& A, const Tensor& B, std::string_view routing,
               std::string_view router_input) {
  const bool sample = routing == "sample";
  TORCH_CHECK(sample || routing == "batch" || routing == "token" || routing == "static",
              "lowrank_fast: unknown routing '", routing, "'");
  TORCH_CHECK(!sample || leading.dim() >= 3, "lowrank_fast: routing 'sample' needs activations [S, .., d]; got ",
              leading.sizes());
  const int64_t samples = sample ? leading.size(0) : 1;
  return {rows.count,         samples, A.size(1),           B.size(1),           B.size(0),        A.size(0),
          routing == "token", sample,  routing == "static", router_input == "x", dtype_of(leading)};
}

// A [r, d_in], B [E, d_out, r] beside the stream y, or its gradient.
void check_bank(const Tensor& A, const Tensor& B, const Tensor& y) {
  TORCH_CHECK(A.dim() == 2 && B.dim() == 3, "lowrank_fast: A must be [r, d_in] and B [E, d_out, r]; got ", A.sizes(),
              " and ", B.sizes());
  check_parameter("A", A, y, {A.size(0), A.size(1)});
  check_parameter("B", B, y, {B.size(0), y.size(-1), A.size(0)});
}

// The bank as the factors of its experts, stacked along k.
std::vector<Factor> bank_factors(const Tensor& B, int64_t d_out) {
  std::vector<Factor> stack;
  for (int64_t e = 0; e < B.size(0); ++e) stack.push_back(factor_of(B.select(0, e), 0, d_out));
  return stack;
}

// A bank stored [E r, d_out] (PEFT's Lily) is seen through a transposed view.
bool rank_major(const Tensor& B) { return B.stride(1) == 1 && B.size(1) > 1; }

// [E, r d_out] in the order of the bank's own memory, float32.
Tensor flat_bank(const Tensor& B) {
  return (rank_major(B) ? B.transpose(1, 2) : B).to(at::kFloat).reshape({B.size(0), -1});
}

// [samples, r d_out] in that order, as factors per sample.
Factor flat_factor(const Tensor& flat, int64_t sample, const Shape& s, bool rank_is_major) {
  float* data = flat.data_ptr<float>() + sample * s.k * s.d_out;
  return rank_is_major ? Factor{data, Dtype::f32, s.k, s.d_out, s.d_out, 1}
                       : Factor{data, Dtype::f32, s.k, s.d_out, 1, s.k};
}

// ---------------------------------------------------------------------------------------------- the router

// Probabilities softmax(t R^T) or softmax(x R^T) of a block of rows. A router on x rides along with A, as further ranks
// of one shrink, where there are rows enough to pay for that panel and no dropout hides elements of x from A alone.
class Router {
 public:
  Router(const MaybeTensor& R, const Shape& s, const Rows* x, const Dropout& drop)
      : s_(s),
        x_(x),
        table_(kernels(s.dtype)),
        stacked_(x && s.router_on_x && !s.fixed && !drop.on && s.count > kFewRows) {
    if (s.fixed) return;
    TORCH_CHECK(
        R.has_value() && R->dim() == 2 && R->size(0) == s.experts && R->size(1) == (s.router_on_x ? s.d_in : s.k),
        "lowrank_fast: R does not match the bank and router_input");
    if (!s.router_on_x) weight_ = R->to(at::kFloat).contiguous();
    if (!s.router_on_x || !x) return;
    factor_ = factor_of(*R, 1, s.d_in);
    if (stacked_) return;
    const PanelSource source(factor_, s.dtype, Use::shrink);
    if (source.direct(s.count)) {
      panel_ = source.in_place();
    } else {
      memory_ = at::empty({source.floats(s.d_in)}, at::kFloat);
      panel_ = source.pack(memory_.data_ptr<float>(), 0, s.d_in);
    }
  }

  // The shrink of A that `probabilities` reads its rows from.
  Shrink beside(const Rows& x, const Factor& A, const Dropout& drop) const {
    std::vector<Factor> stack{A};
    if (stacked_) stack.push_back(factor_);
    return {x, PanelSource(std::move(stack), s_.dtype, Use::shrink), s_.k + (stacked_ ? s_.experts : 0), drop};
  }

  // p [rows][experts], from the rows of t, `stride` floats apart
  void probabilities(int64_t row, int64_t rows, const float* t, int64_t stride, float* p) const {
    const int64_t E = s_.experts;
    if (stacked_) {
      for (int64_t i = 0; i < rows; ++i) std::copy_n(t + i * stride + s_.k, E, p + i * E);
    } else if (s_.router_on_x) {
      const int64_t padded = pad_rank(E);
      std::vector<float> logits(rows * padded);
      blocks(0, rows, table_.most_rows, [&](int64_t i, int64_t n) {
        table_.shrink(x_->from(row + i), n, panel_, padded, logits.data() + i * padded, {}, row + i, 0, s_.d_in);
      });
      for (int64_t i = 0; i < rows; ++i) std::copy_n(logits.data() + i * padded, E, p + i * E);
    } else {
      const float* R = weight_.data_ptr<float>();
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t e = 0; e < E; ++e) {
          float sum = 0.0f;
          for (int64_t j = 0; j < s_.k; ++j) sum += t[i * stride + j] * R[e * s_.k + j];
          p[i * E + e] = sum;
        }
    }
    table_.softmax(p, rows, E, E);
  }

  // dt [k] += dlogits [E] R, for a router on t
  void add_gradient(const float* dlogits, float* dt) const {
    const float* R = weight_.data_ptr<float>();
    for (int64_t e = 0; e < s_.experts; ++e)
      for (int64_t j = 0; j < s_.k; ++j) dt[j] += dlogits[e] * R[e * s_.k + j];
  }

 private:
  const Shape& s_;
  const Rows* x_;
  const Kernels& table_;
  bool stacked_;
  Tensor weight_, memory_;
  Factor factor_{};
  Panel panel_{};
};

// p (dp - <p, dp>), in float64: the difference cancels when the experts' dp are alike
void softmax_backward(const float* p, const float* dp, float factor, int64_t experts, float* dlogits) {
  double dot = 0.0;
  for (int64_t e = 0; e < experts; ++e) dot += double(p[e]) * dp[e];
  for (int64_t e = 0; e < experts; ++e) dlogits[e] = static_cast<float>(double(factor) * p[e] * (dp[e] - dot));
}

struct Means {               // which tokens each mean keeps
  Tensor mask;               // bool [count], or undefined
  std::vector<float> share;  // 1 / tokens kept, per sample
  float weight(int64_t row, int64_t sample) const {
    return !mask.defined() || mask.data_ptr<bool>()[row] ? share[sample] : 0.0f;
  }
};

Means means_of(const MaybeTensor& token_mask, const Shape& s) {
  Means m;
  const int64_t tokens = s.samples ? s.count / s.samples : 0;
  if (token_mask.has_value()) {
    TORCH_CHECK(token_mask->scalar_type() == at::kBool && token_mask->numel() == s.count,
                "lowrank_fast: token_mask must be a bool per token");
    m.mask = token_mask->contiguous();
  }
  for (int64_t i = 0; i < s.samples; ++i) {
    int64_t kept = tokens;
    if (m.mask.defined()) {
      const bool* keep = m.mask.data_ptr<bool>() + i * tokens;
      kept = std::count(keep, keep + tokens, true);
    }
    m.share.push_back(1.0f / static_cast<float>(std::max<int64_t>(kept, 1)));
  }
  return m;
}

// w [samples, E]: means of p over the kept tokens, summed in float64 in the order of the rows.
Tensor mean_weights(const Tensor& p, const MaybeTensor& token_mask, const Shape& s) {
  const Means means = means_of(token_mask, s);
  Tensor w = at::empty({s.samples, s.experts}, at::kFloat);
  const int64_t tokens = s.samples ? s.count / s.samples : 0;
  const float* from = p.data_ptr<float>();
  std::vector<double> sum(s.experts);
  for (int64_t i = 0; i < s.samples; ++i) {
    std::fill(sum.begin(), sum.end(), 0.0);
    for (int64_t row = i * tokens; row < (i + 1) * tokens; ++row)
      if (!means.mask.defined() || means.mask.data_ptr<bool>()[row])
        for (int64_t e = 0; e < s.experts; ++e) sum[e] += from[row * s.experts + e];
    for (int64_t e = 0; e < s.experts; ++e) w.data_ptr<float>()[i * s.experts + e] = float(sum[e] * means.share[i]);
  }
  return w;
}

// f(sample, first row, rows): across threads when there are enough samples, else each sample on all of them.
template <class F>
void for_samples(const Shape& s, const F& f) {
  if (s.samples == 0) return;
  const int64_t tokens = s.count / s.samples;
  const int64_t threads = s.samples >= at::get_num_threads() ? thread_count(s.count * s.d_out * s.k, s.samples) : 1;
  split(threads, s.samples, 1, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i, i * tokens, tokens);
  });
}

// z [rows][pad_rank(experts.size() k)] = s w_e t_j, for the experts listed
void khatri_rao(const float* w, const float* t, int64_t t_stride, int64_t rows, const Shape& s,
                const std::vector<int64_t>& experts, float scale, float* z) {
  const int64_t zk = static_cast<int64_t>(experts.size()) * s.k, padded = pad_rank(zk);
  for (int64_t i = 0; i < rows; ++i, w += s.experts, t += t_stride, z += padded) {
    float* to = z;
    for (int64_t e : experts) {
      const float factor = scale * w[e];
      for (int64_t j = 0; j < s.k; ++j) *to++ = factor * t[j];
    }
    std::fill(to, z + padded, 0.0f);
  }
}

// The experts whose B gets a gradient; without a mask, all.
std::vector<int64_t> listed(const MaybeTensor& active, int64_t experts) {
  std::vector<int64_t> list;
  const Tensor mask = active.has_value() ? active->contiguous() : Tensor();
  for (int64_t e = 0; e < experts; ++e)
    if (!mask.defined() || mask.data_ptr<bool>()[e]) list.push_back(e);
  return list;
}

// ---------------------------------------------------------------------------------------------- forward

std::tuple<Tensor, Tensor, Tensor> project_into(const Tensor& out_tensor, const Tensor& y_tensor,
                                                const Tensor& x_tensor, const Tensor& A, const Tensor& B,
                                                const MaybeTensor& R, const MaybeTensor& weights,
                                                const MaybeTensor& token_mask, double scale, std::string_view routing,
                                                std::string_view router_input, double dropout_p,
                                                const MaybeTensor& seed) {
  const NoAutocast no_autocast;
  check_activation("y", y_tensor);
  check_activation("x", x_tensor);
  check_bank(A, B, y_tensor);
  check_beside("x", x_tensor, y_tensor, A.size(1));
  const Rows x = rows_of(x_tensor), y = rows_of(y_tensor), out = rows_of(out_tensor);
  const Shape s = shape_of(x, x_tensor, A, B, routing, router_input);
  const float factor = static_cast<float>(scale);
  const int64_t tk = pad_rank(s.k), E = s.experts;
  Tensor t = hidden(x_tensor, s.k);
  Tensor p = s.fixed ? at::empty({0}, t.options()) : hidden(x_tensor, E);
  Tensor w = at::empty({0}, t.options());
  float *t_data = t.data_ptr<float>(), *p_data = p.data_ptr<float>();
  const Dropout drop = dropout_of(dropout_p, seed);
  const Router router(R, s, &x, drop);
  const Shrink first = router.beside(x, factor_of(A, 1, s.d_in), drop);
  const int64_t stride = pad_rank(first.k);  // of the rows that the shrink leaves
  auto keep_t = [&](int64_t row, int64_t rows, const float* from) {
    for (int64_t i = 0; i < rows; ++i) std::copy_n(from + i * stride, s.k, t_data + (row + i) * s.k);
  };

  if (s.token) {
    const std::vector<int64_t> all = listed({}, E);
    const Expand second{&y, out, PanelSource(bank_factors(B, s.d_out), s.dtype, Use::expand), E * s.k, {}};
    forward(s.count, &first, &second, [&](int64_t row, int64_t rows, const float* from, float* z) {
      keep_t(row, rows, from);
      router.probabilities(row, rows, from, stride, p_data + row * E);
      khatri_rao(p_data + row * E, from, stride, rows, s, all, factor, z);
    });
  } else {
    if (s.fixed) {
      TORCH_CHECK(weights.has_value() && weights->numel() == E, "lowrank_fast: static routing needs weights [E]");
      w = weights->to(at::kFloat).reshape({1, E}).clone();
    } else {
      forward(s.count, &first, nullptr, [&](int64_t row, int64_t rows, const float* from, float*) {
        keep_t(row, rows, from);
        router.probabilities(row, rows, from, stride, p_data + row * E);
      });
      w = mean_weights(p, token_mask, s);
    }
    const Tensor mix = at::mm(w, flat_bank(B));  // [samples, r d_out]
    const bool major = rank_major(B);
    if (s.fixed) {
      const Expand second{&y, out, PanelSource(flat_factor(mix, 0, s, major), s.dtype, Use::expand), s.k, {}};
      forward(s.count, &first, &second, [&](int64_t row, int64_t rows, const float* from, float* z) {
        keep_t(row, rows, from);
        scaled(from, stride, rows, s.k, factor, z, tk);
      });
    } else {
      for_samples(s, [&](int64_t sample, int64_t begin, int64_t tokens) {
        const Rows y_part = y.slice(begin, tokens), out_part = out.slice(begin, tokens);
        const Expand second{
            &y_part, out_part, PanelSource(flat_factor(mix, sample, s, major), s.dtype, Use::expand), s.k, {}};
        forward(tokens, nullptr, &second, [&](int64_t row, int64_t rows, const float*, float* z) {
          scaled(t_data + (begin + row) * s.k, s.k, rows, s.k, factor, z, tk);
        });
      });
    }
    if (!s.sample) w = w.view({E});
  }
  if (!out.owner.is_same(out_tensor)) out_tensor.copy_(out.owner);
  return {t, p, w};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> routed_projection(const Tensor& y, const Tensor& x, const Tensor& A,
                                                             const Tensor& B, const MaybeTensor& R,
                                                             const MaybeTensor& weights, const MaybeTensor& token_mask,
                                                             double scale, c10::string_view routing,
                                                             c10::string_view router_input, double dropout_p,
                                                             const MaybeTensor& seed) {
  check_activation("y", y);
  Tensor out = activations(y, y.size(-1));
  auto [t, p, w] = project_into(out, y, x, A, B, R, weights, token_mask, scale, std::string_view(routing),
                                std::string_view(router_input), dropout_p, seed);
  return {out, t, p, w};
}

std::tuple<Tensor, Tensor, Tensor> routed_projection_(Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B,
                                                      const MaybeTensor& R, const MaybeTensor& weights,
                                                      const MaybeTensor& token_mask, double scale,
                                                      c10::string_view routing, c10::string_view router_input,
                                                      double dropout_p, const MaybeTensor& seed) {
  check_written("y", y, y, {x, A, B});
  return project_into(y, y, x, A, B, R, weights, token_mask, scale, std::string_view(routing),
                      std::string_view(router_input), dropout_p, seed);
}

// ---------------------------------------------------------------------------------------------- backward

struct Needs {
  bool dx, dA, dB, dR, dweights;
};

// The second half, shared by all routings: dx = [u | dlogits] [A; R], dA = u^T dropout(x), dR = dlogits^T x. `u` and,
// for a router on x, `dlogits` are float32 [count][k] and [count][E].
struct InputGradients {
  const Shape& s;
  const Needs& needs;
  const Tensor &A, &dA, &dR;
  const MaybeTensor& R;
  const Rows *x, *dx;
  Dropout drop;

  bool wanted() const { return needs.dx || needs.dA || (needs.dR && s.router_on_x); }
  // The router's rows ride along in the same pass, unless dropout hides elements of x from A but not from R.
  bool stacked() const { return s.router_on_x && !s.fixed && !drop.on; }

  int64_t k() const { return s.k + (stacked() ? s.experts : 0); }
  ExpandOuter pass() const {
    std::vector<Factor> panel{factor_of(A, 1, s.d_in)}, targets;
    const bool dR_here = stacked() && needs.dR;
    if (needs.dA || dR_here) {
      targets.push_back(panel[0]);
      targets[0].data = nullptr;
      if (needs.dA) targets[0] = factor_of(dA, 1, s.d_in);
    }
    if (stacked()) panel.push_back(factor_of(*R, 1, s.d_in));
    if (dR_here) targets.push_back(factor_of(dR, 1, s.d_in));
    return {x, dx, PanelSource(panel, s.dtype, Use::expand), targets, k(), drop};
  }
  // What dropout kept out of the pass above.
  void router_on_its_own(const float* dlogits) const {
    if (!s.router_on_x || s.fixed || !drop.on) return;
    const int64_t E = s.experts, padded = pad_rank(E);
    auto source = [&](int64_t row, int64_t rows, const float*, float* z) {
      scaled(dlogits + row * E, E, rows, E, 1.0f, z, padded);
    };
    const PanelSource panel(factor_of(*R, 1, s.d_in), s.dtype, Use::expand);
    if (needs.dx) {
      const Expand second{dx, *dx, panel, E, {}};
      forward(s.count, nullptr, &second, source);
    }
    if (needs.dR) {
      const ExpandOuter second{x, nullptr, panel, {factor_of(dR, 1, s.d_in)}, E, {}};
      backward(s.count, nullptr, &second, [](int64_t, int64_t, float*) {}, source);
    }
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> routed_projection_backward(
    const Tensor& g_tensor, const MaybeTensor& x_tensor, const Tensor& t_tensor, const Tensor& p_tensor,
    const Tensor& w_tensor, const Tensor& A, const Tensor& B, const MaybeTensor& R, const MaybeTensor& token_mask,
    const MaybeTensor& active, double scale, c10::string_view routing, c10::string_view router_input, double dropout_p,
    const MaybeTensor& seed, std::array<bool, 5> need_list) {
  const NoAutocast no_autocast;
  const Needs needs{need_list[0], need_list[1], need_list[2], need_list[3], need_list[4]};
  check_activation("g", g_tensor);
  check_bank(A, B, g_tensor);
  const Rows g = rows_of(g_tensor);
  const Shape s = shape_of(g, g_tensor, A, B, std::string_view(routing), std::string_view(router_input));
  const int64_t E = s.experts, tk = pad_rank(s.k), ek = E * s.k;
  const float factor = static_cast<float>(scale);
  const bool need_x = needs.dA || (needs.dR && s.router_on_x);
  TORCH_CHECK(!need_x || x_tensor.has_value(), "lowrank_fast: the gradient of A or of a router on x needs x");
  if (need_x) check_beside("x", *x_tensor, g_tensor, s.d_in);
  TORCH_CHECK(!needs.dR || R.has_value(), "lowrank_fast: the gradient of R needs R");
  TORCH_CHECK(s.token || w_tensor.numel() == s.samples * E, "lowrank_fast: w must hold ", s.samples * E,
              " weights; got ", w_tensor.sizes());
  check_hidden("t", t_tensor, g_tensor, s.k);
  if (!s.fixed) check_hidden("p", p_tensor, g_tensor, s.experts);
  TORCH_CHECK(
      !active.has_value() || (active->scalar_type() == at::kBool && active->sizes() == at::IntArrayRef({s.experts})),
      "lowrank_fast: active must be bool [", s.experts, "]");

  Tensor dx_tensor = needs.dx ? activations(g_tensor, s.d_in) : empty_result(g_tensor);
  Tensor dA = needs.dA ? at::empty_like(A) : empty_result(A), dB = needs.dB ? at::empty_like(B) : empty_result(B);
  Tensor dR = needs.dR ? at::empty_like(*R) : empty_result(A);
  Tensor dweights = empty_result(w_tensor);
  std::optional<Rows> x, dx;
  if (need_x) x = rows_of(*x_tensor);
  if (needs.dx) dx = rows_of(dx_tensor);
  const std::vector<int64_t> trained = needs.dB ? listed(active, E) : std::vector<int64_t>{};
  if (needs.dB && static_cast<int64_t>(trained.size()) < E) dB.zero_();  // the others cost no more than this
  const Router router(R, s, nullptr, {});
  const InputGradients inputs{
      s, needs, A, dA, dR, R, x ? &*x : nullptr, dx ? &*dx : nullptr, dropout_of(dropout_p, seed)};
  const Tensor t = hidden_rows(t_tensor, s.count, s.k);
  const float* t_data = t.data_ptr<float>();
  const bool route = !s.fixed && (inputs.wanted() || needs.dR);  // the softmax's backward is needed
  const Tensor p = s.fixed ? Tensor() : hidden_rows(p_tensor, s.count, E);
  const float* p_data = s.fixed ? nullptr : p.data_ptr<float>();
  Tensor dlogits = route ? at::empty({s.count, E}, t.options()) : Tensor();
  float* dlogits_data = route ? dlogits.data_ptr<float>() : nullptr;
  const int64_t uk = pad_rank(inputs.k());

  // u (and dlogits behind it) of one row, for the second half
  auto finish_row = [&](int64_t row, float* u) {
    if (s.router_on_x) {
      if (inputs.stacked()) std::copy_n(dlogits_data + row * E, E, u + s.k);
    } else {
      router.add_gradient(dlogits_data + row * E, u);
    }
    std::fill(u + inputs.k(), u + uk, 0.0f);
  };

  if (s.token) {
    const bool need_v = inputs.wanted() || needs.dR;
    const PanelSource bank(bank_factors(B, s.d_out), s.dtype, Use::shrink);
    std::vector<Factor> targets;
    for (int64_t e : trained) targets.push_back(factor_of(dB.select(0, e), 0, s.d_out));
    const ShrinkOuter first{g, need_v ? &bank : nullptr, targets, ek, static_cast<int64_t>(trained.size()) * s.k};
    const ExpandOuter second = inputs.pass();
    const int64_t vk = pad_rank(ek);
    backward(
        s.count, &first, inputs.wanted() ? &second : nullptr,
        [&](int64_t row, int64_t rows, float* z) {
          khatri_rao(p_data + row * E, t_data + row * s.k, s.k, rows, s, trained, factor, z);
        },
        [&](int64_t row, int64_t rows, const float* v, float* u) {
          if (!v) return;
          std::vector<float> dw(E);
          for (int64_t i = 0; i < rows; ++i) {
            const float *vi = v + i * vk, *ti = t_data + (row + i) * s.k, *wi = p_data + (row + i) * E;
            for (int64_t e = 0; e < E; ++e) {
              double dot = 0.0;  // differences of these are what counts
              for (int64_t j = 0; j < s.k; ++j) dot += double(vi[e * s.k + j]) * ti[j];
              dw[e] = static_cast<float>(factor * dot);
            }
            softmax_backward(wi, dw.data(), 1.0f, E, dlogits_data + (row + i) * E);
            if (!u) continue;
            float* ui = u + i * uk;
            for (int64_t j = 0; j < s.k; ++j) {
              float sum = 0.0f;
              for (int64_t e = 0; e < E; ++e) sum += wi[e] * vi[e * s.k + j];
              ui[j] = factor * sum;
            }
            finish_row(row + i, ui);
          }
        });
  } else {
    const Tensor w = w_tensor.to(at::kFloat).contiguous().view({s.samples, E});
    const Tensor bank = flat_bank(B);
    const bool major = rank_major(B), need_G = !trained.empty() || route || needs.dweights;
    const Tensor mix = at::mm(w, bank);
    Tensor G = need_G ? at::empty({s.samples, s.k * s.d_out}, t.options()) : Tensor();
    Tensor v = inputs.wanted() ? at::empty({s.count, s.k}, t.options()) : Tensor();
    for_samples(s, [&](int64_t sample, int64_t begin, int64_t tokens) {
      const Rows part = g.slice(begin, tokens);
      const PanelSource panel(flat_factor(mix, sample, s, major), s.dtype, Use::shrink);
      std::vector<Factor> target;
      if (need_G) target.push_back(flat_factor(G, sample, s, major));
      const ShrinkOuter first{part, v.defined() ? &panel : nullptr, target, s.k, s.k};
      backward(
          tokens, &first, nullptr,
          [&](int64_t row, int64_t rows, float* z) {
            scaled(t_data + (begin + row) * s.k, s.k, rows, s.k, factor, z, tk);
          },
          [&](int64_t row, int64_t rows, const float* from, float*) {
            if (from) scaled(from, tk, rows, s.k, factor, v.data_ptr<float>() + (begin + row) * s.k, s.k);
          });
    });
    if (!trained.empty()) {
      const Tensor chosen = at::tensor(trained, at::kLong);
      const Tensor flat = at::mm(w.index_select(1, chosen).t(), G);  // [trained, r d_out]
      for (size_t i = 0; i < trained.size(); ++i) {
        const Tensor from = flat.select(0, i);
        dB.select(0, trained[i]).copy_(major ? from.view({s.k, s.d_out}).t() : from.view({s.d_out, s.k}));
      }
    }
    Tensor dw;  // [samples, E]; for one expert BLAS would add the r d_out terms one after the other
    if (route || needs.dweights) dw = E == 1 ? (G * bank).sum(1, true) : at::mm(G, bank.t()).contiguous();
    if (needs.dweights) dweights = dw.view({E}).clone();
    if (route) {
      const Means means = means_of(token_mask, s);
      const int64_t tokens = s.samples ? s.count / s.samples : 0;
      for (int64_t row = 0; row < s.count; ++row) {
        const int64_t sample = row / tokens;
        softmax_backward(p_data + row * E, dw.data_ptr<float>() + sample * E, means.weight(row, sample), E,
                         dlogits_data + row * E);
      }
    }
    if (inputs.wanted()) {
      const ExpandOuter second = inputs.pass();
      backward(
          s.count, nullptr, &second, [](int64_t, int64_t, float*) {},
          [&](int64_t row, int64_t rows, const float*, float* u) {
            for (int64_t i = 0; i < rows; ++i) {
              std::copy_n(v.data_ptr<float>() + (row + i) * s.k, s.k, u + i * uk);
              if (route)
                finish_row(row + i, u + i * uk);
              else
                std::fill(u + i * uk + s.k, u + (i + 1) * uk, 0.0f);
            }
          });
    }
  }
  if (route) {
    inputs.router_on_its_own(dlogits_data);
    if (needs.dR && !s.router_on_x) dR.copy_(at::mm(dlogits.t(), t.view({s.count, s.k})));
  }
  return {dx_tensor, dA, dB, dR, dweights};
}

}  // namespace

TORCH_LIBRARY_IMPL(lowrank_fast, CPU, m) {
  m.impl("routed_projection", routed_projection);
  m.impl("routed_projection_", routed_projection_);
  m.impl("routed_projection_backward", routed_projection_backward);
}

}  // namespace lowrank
