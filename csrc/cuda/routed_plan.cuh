// Launch plans of the routed projection (algebra: design section 4, reference.py).
//
//   batch, sample, static   t and logits -> p -> w -> B_mix [segments, d_out, r] -> out = y + s t B_mix^T
//   token                   t and logits -> p -> out = y + s (p (x) t) B_cat^T, one factor of rank E r
//
// Backward shares G = s g^T t among the experts and never makes E copies of it. A router on x is stacked under A (one
// read of x), except with dropout, which it does not see: then it has passes of its own.
#pragma once
#include "residual_plan.cuh"

namespace lowrank {
namespace LOWRANK_ARCH {

inline Factor transposed(Factor f) { return {f.data, f.n_stride, f.rank_stride, 0, 1 << 30, f.wide}; }
inline MutableFactor transposed(const MutableFactor& f) {
  return {f.data, f.n_stride, f.rank_stride, 0, 1 << 30, f.wide};
}

inline Launch small_launch(int64_t blocks, int64_t across, size_t shared_bytes, const char* name) {
  return {static_cast<int>(blocks), static_cast<int>(across), 1, 256, 1, shared_bytes, name};
}

inline bool has_router(const RoutedArgs& a) { return a.routing != kStatic; }

// B_mix of every segment, from sums of p (forward), static weights, or the saved w (backward).
template <class E>
Factor mix_bank(Context& c, const RoutedArgs& a, const float* sums, int chunks, const float* weights, float* w_out) {
  MixParams m = {};
  m.sums = sums;
  m.chunks = chunks;
  m.weights = weights;
  m.weights_stride = a.experts;
  m.w = w_out;
  m.B = narrowed<E>(a.B);
  m.experts = a.experts;
  m.rank = a.rank;
  m.d_out = a.d_out;
  m.mix = c.take<float>(a.segments * a.d_out * a.rank);
  c.run(mix_kernel<E>,
        small_launch(ceil_div(int64_t(a.d_out) * a.rank, 256), a.segments, a.experts * sizeof(float), "mix"), m);
  return {m.mix, 1, a.rank, 0, 1 << 30, 1};
}

template <class E>
void hidden_and_logits(Context& c, const RoutedArgs& a) {
  const bool on_x = has_router(a) && a.router_on_x, stacked = on_x && !a.dropout.seed;
  RowParams p = row_params(a.tokens, a.rank);
  set_x(p, a.x, a.d_in, a.A);
  p.t_out = a.t_out;
  p.drop_x = a.dropout;
  if (a.dropout.seed) p.t_scale = a.dropout.keep_scale;
  if (stacked) {
    p.A_upper = transposed(a.R);
    p.rank = p.t_rank = a.rank + a.experts;
    p.upper_out = a.p_out;
  }
  run_rows<E>(c, p, 1, "shrink");
  if (on_x && !stacked) {
    RowParams logits = row_params(a.tokens, a.experts);
    set_x(logits, a.x, a.d_in, transposed(a.R));
    logits.t_out = a.p_out;
    run_rows<E>(c, logits, 1, "logits");
  }
}

inline size_t routed_forward(const RoutedArgs& a, void* workspace, void* stream, int* error) {
  Context c(workspace, stream);
  with_element(a.dtype, [&](auto e) {
    using E = decltype(e);
    hidden_and_logits<E>(c, a);
    const int64_t segment_rows = a.segments ? a.tokens / a.segments : 0;
    const int chunks = static_cast<int>(ceil_div(segment_rows, kChunkRows));
    float* sums = nullptr;
    if (has_router(a)) {
      SoftmaxParams s = {};
      s.t = a.router_on_x ? nullptr : a.t_out;
      s.R = narrowed<E>(a.R);
      s.p = a.p_out;
      s.token_mask = a.token_mask;
      s.segment_rows = segment_rows;
      s.rank = a.rank;
      s.experts = a.experts;
      if (a.routing != kToken) s.sums = sums = c.take<float>(chunks * a.segments * (a.experts + 1));
      c.run(softmax_kernel<E>, small_launch(chunks, a.segments, 8 * (a.experts + 1) * sizeof(float), "softmax"), s);
    }
    RowParams p = row_params(segment_rows, a.rank);
    p.t_in = a.t_out;
    p.scale = a.scale;
    if (a.routing == kToken) {
      set_out(p, a.y, a.out, a.d_out, a.B);
      p.rank = p.A_split = a.rank * a.experts;
      p.w_in = a.p_out;
    } else {
      set_out(p, a.y, a.out, a.d_out, mix_bank<E>(c, a, sums, chunks, a.weights, a.w_out));
      p.B_segment_stride = int64_t(a.d_out) * a.rank;
    }
    run_rows<E>(c, p, a.segments, "expand");
  });
  return c.finish(error);
}

// ------------------------------------------------------------------------------------------------ backward

struct RoutedNeeds {
  bool dt, logits, weights;  // u -> dt; dlogits; dw
};

inline RoutedNeeds routed_needs(const RoutedArgs& a) {
  const bool inputs = a.dx.data || a.dA.data;
  const bool logits = has_router(a) && (a.dR.data || inputs);
  return {inputs || (logits && a.routing == kToken), logits, (logits && a.routing != kToken) || a.dweights};
}

// dw [segments, E] = <G, B_e>.
template <class E>
void weight_gradient(Context& c, const RoutedArgs& a, const float* G, float* dw) {
  BankParams b = {};
  b.G = G;
  b.B = narrowed<E>(a.B);
  b.segments = static_cast<int>(a.segments);
  b.experts = a.experts;
  b.rank = a.rank;
  b.d_out = a.d_out;
  const int chunks = static_cast<int>(ceil_div(int64_t(a.d_out) * a.rank, 8 * kChunkRows));
  const int64_t count = a.segments * a.experts;
  b.dw = c.take<float>(chunks * count);
  c.run(weight_gradient_kernel<E>, small_launch(chunks, a.segments, a.experts * 8 * sizeof(float), "dw"), b);
  run_sum<E>(c, sum_to(dw, b.dw, count, 1, chunks, 1.0f));
}

// dw and dB, whichever are wanted, from the partials of g^T t.
template <class E>
void expert_gradients(Context& c, const RoutedArgs& a, const float* partials, int splits, float* dw) {
  const int64_t elements = int64_t(a.d_out) * a.rank;
  float* G = c.take<float>(a.segments * elements);
  if (a.segments) run_sum<E>(c, sum_to(G, partials, elements, static_cast<int>(a.segments), splits, a.scale));
  if (dw) weight_gradient<E>(c, a, G, dw);
  if (!a.dB.data) return;
  BankParams b = {};
  b.G = G;
  b.w = a.w;
  b.dB = a.dB;
  if (sizeof(E) == 4) b.dB.wide = 1;
  b.active = a.active;
  b.segments = static_cast<int>(a.segments);
  b.experts = a.experts;
  b.rank = a.rank;
  b.d_out = a.d_out;
  c.run(bank_gradient_kernel<E>, small_launch(ceil_div(elements, 256), a.experts, 0, "dB"), b);
}

// Mixed routing: u [T, r] if wanted, dw if wanted, dB if wanted, from one gradient pass over g.
template <class E>
void mixed_gradients(Context& c, const RoutedArgs& a, float* u, float* dw) {
  const int64_t segment_rows = a.segments ? a.tokens / a.segments : 0;
  ColumnParams p = column_params(segment_rows, a.g, a.d_out, a.t, a.rank);
  p.W = p.W_upper = u ? mix_bank<E>(c, a, nullptr, 0, a.w, nullptr) : a.B;
  p.W_segment_stride = u ? int64_t(a.d_out) * a.rank : 0;
  const bool need_G = a.dB.data || dw;
  const Partials partials = gradient_pass<E>(c, p, a.segments, a.scale, u, need_G);
  if (need_G) expert_gradients<E>(c, a, partials.grad, partials.splits, dw);
}

// Static routing with every gradient: the backward of a residual add with the mixed bank, in one launch.
template <class E>
void static_cluster_backward(Context& c, const RoutedArgs& a) {
  BackwardArgs mixed = {a.tokens, a.dtype, a.d_in,  a.d_out, a.rank, a.scale, a.g, a.x,      a.dx,
                        a.t,      nullptr, nullptr, a.A,     {},     a.dA,    {},  a.dropout};
  mixed.B = mix_bank<E>(c, a, nullptr, 0, a.w, nullptr);
  const ClusterSums sums = cluster_backward<E>(c, mixed);
  expert_gradients<E>(c, a, sums.dB, sums.clusters, a.dweights);
}

// Token routing: dz [T, E r] if wanted and dB_cat = s g^T (p (x) t), one factor of rank E r.
template <class E>
void token_gradients(Context& c, const RoutedArgs& a, float* dz) {
  ColumnParams p = column_params(a.tokens, a.g, a.d_out, a.t, a.rank);
  p.rank = p.W_split = a.rank * a.experts;
  p.z_weights = a.p;
  p.W = p.W_upper = a.B;
  Partials partials = gradient_pass<E>(c, p, 1, a.scale, dz, a.dB.data != nullptr);
  if (!a.dB.data) return;
  SumParams sum = sum_into(a.dB, partials.grad, a.d_out, p.rank, partials.splits, a.scale);
  sum.active = a.active;
  run_sum<E>(c, sum);
}

// dlogits [T, E], and dt [T, r] from u or dz.
template <class E>
void route_backward(Context& c, const RoutedArgs& a, const float* u, const float* dw, float* dt, float* dlogits) {
  RouteBackwardParams b = {};
  b.u = u;
  b.t = a.t;
  b.p = a.p;
  b.dw = dw;
  b.token_mask = a.token_mask;
  if (!a.router_on_x) b.R = narrowed<E>(a.R);
  b.dt = dt;
  b.dlogits = dlogits;
  b.tokens = a.tokens;
  b.segment_rows = a.segments ? a.tokens / a.segments : 1;
  b.rank = a.rank;
  b.experts = a.experts;
  b.token_routing = a.routing == kToken;
  if (!b.token_routing) {
    CountParams count = {a.token_mask, c.take<float>(a.segments), b.segment_rows};
    c.run(count_kernel<E>, small_launch(a.segments, 1, 8 * sizeof(float), "count"), count);
    b.counts = count.counts;
  }
  c.run(route_backward_kernel<E>, small_launch(ceil_div(a.tokens, 256), 1, 0, "route backward"), b);
  if (!a.dR.data || a.router_on_x) return;
  RouterGradientParams r = {dlogits, a.t, nullptr, a.tokens, a.rank, a.experts};
  const int chunks = static_cast<int>(ceil_div(a.tokens, kChunkRows));
  r.partials = c.take<float>(int64_t(chunks) * a.experts * a.rank);
  c.run(router_gradient_kernel<E>, small_launch(chunks, 1, 0, "dR"), r);
  run_sum<E>(c, sum_into(a.dR, r.partials, a.experts, a.rank, chunks, 1.0f));
}

template <class E>
void routed_inputs(Context& c, const RoutedArgs& a, const float* dt, const float* dlogits) {
  const bool inputs = a.dx.data || a.dA.data, on_x = has_router(a) && a.router_on_x;
  const Factor router = transposed(a.R);
  ColumnParams p = column_params(a.tokens, a.x, a.d_in, dt, a.rank);
  p.W = p.W_upper = a.A;
  if (on_x && inputs && !a.dropout.seed) {
    p.W_upper = router;
    p.z_upper = dlogits;
    p.rank = a.rank + a.experts;
    input_pass<E>(c, p, a.dx, a.dA, transposed(a.dR), a.dropout);
    return;
  }
  if (inputs) input_pass<E>(c, p, a.dx, a.dA, {}, a.dropout);
  if (!on_x || !(a.dx.data || a.dR.data)) return;
  ColumnParams q = column_params(a.tokens, a.x, a.d_in, dlogits, a.experts);
  q.W = q.W_upper = router;
  q.accumulate = a.dx.data != nullptr;
  input_pass<E>(c, q, a.dx, transposed(a.dR), {}, Dropout{});
}

inline size_t routed_backward(const RoutedArgs& a, void* workspace, void* stream, int* error) {
  Context c(workspace, stream);
  with_element(a.dtype, [&](auto e) {
    using E = decltype(e);
    const bool all = a.dx.data && a.dA.data && (a.dB.data || a.dweights);
    if (a.routing == kStatic && all && one_cluster<E>(a.d_in, a.d_out, a.rank)) return static_cluster_backward<E>(c, a);
    const RoutedNeeds needs = routed_needs(a);
    const int width = a.routing == kToken ? a.rank * a.experts : a.rank;
    float* u = needs.dt ? c.take<float>(a.tokens * width) : nullptr;
    float* dw = a.dweights ? a.dweights : needs.weights ? c.take<float>(a.segments * a.experts) : nullptr;
    if (a.routing == kToken) {
      token_gradients<E>(c, a, u);
    } else {
      mixed_gradients<E>(c, a, u, dw);
    }
    float* dt = u;
    float* dlogits = nullptr;
    if (needs.logits) {
      dlogits = c.take<float>(a.tokens * a.experts);
      dt = needs.dt ? c.take<float>(a.tokens * a.rank) : nullptr;
      route_backward<E>(c, a, u, dw, dt, dlogits);
    }
    routed_inputs<E>(c, a, dt, dlogits);
  });
  return c.finish(error);
}

}  // namespace LOWRANK_ARCH
}  // namespace lowrank
