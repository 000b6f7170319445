// Binds the CUDA kernels of routed_projection to its ops. Masks stay on the device: nothing here reads a tensor's
// values.
#include "cuda_binding.h"

namespace lowrank {
namespace {

using Optional = optional<Tensor>;

int32_t routing_code(c10::string_view name) {
  const int32_t code = name == "batch" ? kBatch : name == "sample" ? kSample : name == "token" ? kToken : kStatic;
  TORCH_CHECK(code != kStatic || name == "static",
              "lowrank_fast: routing must be 'batch', 'sample', 'token' or 'static'; got '", name, "'");
  return code;
}

// The rank of the widest factor that the kernels would see.
int64_t widest(const Tensor& A, const Tensor& B, int32_t routing, bool router_on_x) {
  const int64_t rank = A.size(0), experts = B.size(0);
  const int64_t stacked = routing != kStatic && router_on_x ? rank + experts : rank;
  return routing == kToken ? std::max(stacked, rank * experts) : stacked;
}

bool routed_fits(const Tensor& like, const Tensor& A, const Tensor& B, int32_t routing, bool router_on_x) {
  const int64_t segments = routing == kSample ? like.size(0) : 1;
  return like.dim() && segments <= kMaxSegments && B.size(0) <= 1024 &&
         fits(like.scalar_type(), like.numel(), {A.size(1), B.size(1), B.size(0)}, widest(A, B, routing, router_on_x));
}

struct Common {  // tensors that must outlive the launch
  RoutedArgs args;
  RowsRead x;
  Tensor token_mask;
};

Common common(const Tensor& like, const Tensor& x, const Tensor& A, const Tensor& B, const Optional& R,
              const Optional& token_mask, double scale, int32_t routing, bool router_on_x, double p,
              const Optional& seed) {
  Common c = {{}, RowsRead(x), token_mask ? token_mask->contiguous() : Tensor()};
  RoutedArgs& a = c.args;
  const auto type = like.scalar_type();
  const int64_t tokens = like.numel() / like.size(-1), experts = B.size(0), rank = A.size(0);
  check_factor("A", A, {rank, x.defined() ? x.size(-1) : A.size(1)}, like, type);
  check_factor("B", B, {experts, B.size(1), rank}, like, type);
  if (routing != kStatic) {
    check_factor("R", R.value_or(Tensor()), {experts, router_on_x ? A.size(1) : rank}, like, type);
  }
  if (token_mask) check_flat("token_mask", *token_mask, tokens, at::kBool, like);
  a.tokens = tokens;
  a.segments = routing == kSample ? like.size(0) : 1;
  a.dtype = code(type);
  a.d_in = static_cast<int32_t>(A.size(1));
  a.d_out = static_cast<int32_t>(B.size(1));
  a.rank = static_cast<int32_t>(rank);
  a.experts = static_cast<int32_t>(experts);
  a.routing = routing;
  a.router_on_x = router_on_x;
  a.scale = static_cast<float>(scale);
  a.x = c.x.rows();
  a.A = factor(A, type, kDown);
  a.B = factor(B, type, kBank);
  a.R = factor(R.value_or(Tensor()), type, kUp);
  a.token_mask = flags(c.token_mask);
  a.dropout = dropout_of(p, seed, like);
  return c;
}

Tensors3 routed_into(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B, const Optional& R,
                     const Optional& weights, const Optional& token_mask, double scale, int32_t routing,
                     bool router_on_x, double p, const Optional& seed, const Tensor& out) {
  const c10::DeviceGuard guard(x.device());
  Common c = common(x, x, A, B, R, token_mask, scale, routing, router_on_x, p, seed);
  check_factor("B", B, {B.size(0), y.size(-1), A.size(0)}, x, x.scalar_type());
  check_rows("y", y, x, B.size(1), x.scalar_type());
  if (routing == kStatic) {
    const Tensor given = weights.value_or(Tensor());
    check_flat("weights", given, B.size(0), given.defined() ? given.scalar_type() : at::kFloat, x);
  }
  const auto wide = x.options().dtype(at::kFloat);
  Tensor t = hidden_like(x, A.size(0)), probabilities = routing == kStatic ? none(t) : hidden_like(x, B.size(0));
  Tensor w = routing == kToken    ? none(t)
             : routing == kSample ? at::empty({x.size(0), B.size(0)}, wide)
                                  : at::empty({B.size(0)}, wide);
  const RowsRead y_rows(y);
  const RowsWritten target(out);
  const Tensor static_weights = weights ? fp32_rows(*weights) : Tensor();
  c.args.y = y_rows.rows();
  c.args.out = target.rows();
  c.args.weights = floats(static_weights);
  c.args.t_out = floats(t);
  c.args.p_out = floats(probabilities);
  c.args.w_out = floats(w);
  launch(&KernelTable::routed_forward, c.args, x);
  target.finish();
  return {t, probabilities, w};
}

#define LOWRANK_ROUTED                                                                                             \
  const Tensor &x, const Tensor &A, const Tensor &B, const Optional &R, const Optional &weights,                   \
      const Optional &token_mask, double scale, c10::string_view routing, c10::string_view router_input, double p, \
      const Optional &seed
#define LOWRANK_ROUTED_TYPES                                                                              \
  const Tensor&, const Tensor&, const Tensor&, const Optional&, const Optional&, const Optional&, double, \
      c10::string_view, c10::string_view, double, const Optional&

Tensors4 routed_projection(const Tensor& y, LOWRANK_ROUTED) {
  const int32_t kind = routing_code(routing);
  if (!routed_fits(x, A, B, kind, router_input == "x"))
    return fallback<Tensors4, const Tensor&, LOWRANK_ROUTED_TYPES>("routed_projection", y, x, A, B, R, weights,
                                                                   token_mask, scale, routing, router_input, p, seed);
  Tensor out = at::empty(y.sizes(), y.options());
  auto [t, probabilities, w] =
      routed_into(y, x, A, B, R, weights, token_mask, scale, kind, router_input == "x", p, seed, out);
  return {out, t, probabilities, w};
}
Tensors3 routed_projection_(Tensor& y, LOWRANK_ROUTED) {
  const int32_t kind = routing_code(routing);
  if (!routed_fits(x, A, B, kind, router_input == "x"))
    return fallback<Tensors3, Tensor&, LOWRANK_ROUTED_TYPES>("routed_projection_", y, x, A, B, R, weights, token_mask,
                                                             scale, routing, router_input, p, seed);
  return routed_into(y, x, A, B, R, weights, token_mask, scale, kind, router_input == "x", p, seed, y);
}

Tensors5 routed_projection_backward(const Tensor& g, const Optional& x, const Tensor& t, const Tensor& probabilities,
                                    const Tensor& w, const Tensor& A, const Tensor& B, const Optional& R,
                                    const Optional& token_mask, const Optional& active, double scale,
                                    c10::string_view routing, c10::string_view router_input, double p,
                                    const Optional& seed, std::array<bool, 5> needs) {
  const int32_t kind = routing_code(routing);
  const bool on_x = router_input == "x";
  if (!routed_fits(g, A, B, kind, on_x))
    return fallback<Tensors5, const Tensor&, const Optional&, const Tensor&, const Tensor&, const Tensor&,
                    const Tensor&, const Tensor&, const Optional&, const Optional&, const Optional&, double,
                    c10::string_view, c10::string_view, double, const Optional&, std::array<bool, 5>>(
        "routed_projection_backward", g, x, t, probabilities, w, A, B, R, token_mask, active, scale, routing,
        router_input, p, seed, needs);
  const bool need_dx = needs[0], need_dA = needs[1], need_dB = needs[2], need_dR = needs[3], need_dweights = needs[4];
  const c10::DeviceGuard guard(g.device());
  const bool keep_x = need_dA || (need_dR && on_x);
  if (keep_x) check_rows("x", x.value_or(Tensor()), g, A.size(1), g.scalar_type());
  Common c = common(g, keep_x ? x.value_or(Tensor()) : Tensor(), A, B, R, token_mask, scale, kind, on_x, p, seed);
  RoutedArgs& a = c.args;
  const auto type = g.scalar_type();
  check_rows("g", g, g, B.size(1), type);
  check_rows("t", t, g, A.size(0), t.scalar_type());
  if (kind != kStatic) check_rows("p", probabilities, g, B.size(0), probabilities.scalar_type());
  if (kind != kToken) check_flat("w", w, a.segments * B.size(0), w.scalar_type(), g);
  if (active) check_flat("active", *active, B.size(0), at::kBool, g);
  auto leading = g.sizes().vec();
  leading.back() = A.size(1);
  Tensor dx = need_dx ? at::empty(leading, g.options()) : none(g);
  Tensor dA = need_dA ? at::empty_like(A) : none(A), dB = need_dB ? at::empty_like(B) : none(B);
  Tensor dR = need_dR ? at::empty_like(*R) : none(A);
  Tensor dweights = need_dweights ? at::empty({B.size(0)}, g.options().dtype(at::kFloat)) : none(w);
  const RowsRead g_rows(g);
  Tensor t_rows = fp32_rows(t), p_rows = fp32_rows(probabilities), w_rows = fp32_rows(w);
  Tensor active_flags = active ? active->contiguous() : Tensor();
  a.g = g_rows.rows();
  if (need_dx) a.dx = RowsWritten(dx).rows();
  a.t = floats(t_rows);
  a.p = floats(p_rows);
  a.w = floats(w_rows);
  a.active = flags(active_flags);
  if (need_dA) a.dA = target(dA, type, kDown);
  if (need_dB) a.dB = target(dB, type, kBank);
  if (need_dR) a.dR = target(dR, type, kUp);
  a.dweights = need_dweights ? floats(dweights) : nullptr;
  launch(&KernelTable::routed_backward, a, g);
  return {dx, dA, dB, dR, dweights};
}

}  // namespace

void register_routed(torch::Library& m) {
  m.impl("routed_projection", &routed_projection);
  m.impl("routed_projection_", &routed_projection_);
  m.impl("routed_projection_backward", &routed_projection_backward);
}

}  // namespace lowrank
