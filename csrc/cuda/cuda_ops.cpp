// Binds the CUDA kernels of residual_add, shrink and expand_add to their ops. Plain C++ with torch's headers and none
// of CUDA's.
#include "cuda_binding.h"

namespace lowrank {
namespace {

using Seed = optional<Tensor>;

// ------------------------------------------------------------------------------------------------ forward

ForwardArgs forward_args(const Tensor& like, int64_t rank, double scale) {
  ForwardArgs a = {};
  a.tokens = like.numel() / like.size(-1);
  a.dtype = code(like.scalar_type());
  a.rank = static_cast<int32_t>(rank);
  a.scale = static_cast<float>(scale);
  return a;
}

bool forward_fits(const Tensor& y, const Tensor& x, int64_t rank) {
  return y.dim() && x.dim() && fits(x.scalar_type(), x.numel(), {x.size(-1), y.size(-1)}, rank);
}

Tensor residual_add_into(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B, double scale, double p,
                         const Seed& seed, bool save_t, const Tensor& out) {
  const c10::DeviceGuard guard(x.device());
  const auto type = x.scalar_type();
  check_rows("y", y, x, y.size(-1), type);
  check_rows("out", out, x, y.size(-1), type);
  check_factor("A", A, {A.size(0), x.size(-1)}, x, type);
  check_factor("B", B, {y.size(-1), A.size(0)}, x, type);
  Tensor t = save_t ? hidden_like(x, A.size(0)) : none(x, at::kFloat);
  const RowsRead x_rows(x), y_rows(y);
  const RowsWritten target(out);
  ForwardArgs a = forward_args(x, A.size(0), scale);
  a.d_in = static_cast<int32_t>(x.size(-1));
  a.d_out = static_cast<int32_t>(y.size(-1));
  a.x = x_rows.rows();
  a.y = y_rows.rows();
  a.out = target.rows();
  a.A = factor(A, type, kDown);
  a.B = factor(B, type, kUp);
  a.t_out = save_t ? floats(t) : nullptr;
  a.dropout = dropout_of(p, seed, x);
  launch(&KernelTable::forward, a, x);
  target.finish();
  return t;
}

Tensors2 residual_add(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B, double scale, double p,
                      const Seed& seed, bool save_t) {
  if (!forward_fits(y, x, A.size(0)))
    return fallback<Tensors2, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, double, const Seed&,
                    bool>("residual_add", y, x, A, B, scale, p, seed, save_t);
  Tensor out = at::empty(y.sizes(), y.options());
  Tensor t = residual_add_into(y, x, A, B, scale, p, seed, save_t, out);
  return {out, t};
}
Tensor residual_add_(Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B, double scale, double p,
                     const Seed& seed, bool save_t) {
  if (!forward_fits(y, x, A.size(0)))
    return fallback<Tensor, Tensor&, const Tensor&, const Tensor&, const Tensor&, double, double, const Seed&, bool>(
        "residual_add_", y, x, A, B, scale, p, seed, save_t);
  return residual_add_into(y, x, A, B, scale, p, seed, save_t, y);
}
Tensor residual_add_out(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B, double scale, double p,
                        const Seed& seed, bool save_t, Tensor& out) {
  if (!forward_fits(y, x, A.size(0)))
    return fallback<Tensor, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, double, const Seed&,
                    bool, Tensor&>("residual_add_out", y, x, A, B, scale, p, seed, save_t, out);
  return residual_add_into(y, x, A, B, scale, p, seed, save_t, out);
}

Tensor shrink(const Tensor& x, const Tensor& A, double p, const Seed& seed) {
  if (!forward_fits(x, x, A.size(0)))
    return fallback<Tensor, const Tensor&, const Tensor&, double, const Seed&>("shrink", x, A, p, seed);
  const c10::DeviceGuard guard(x.device());
  check_factor("A", A, {A.size(0), x.size(-1)}, x, x.scalar_type());
  const RowsRead rows(x);
  Tensor t = hidden_like(x, A.size(0));
  ForwardArgs a = forward_args(x, A.size(0), 1.0);
  a.d_in = static_cast<int32_t>(x.size(-1));
  a.x = rows.rows();
  a.A = factor(A, x.scalar_type(), kDown);
  a.t_out = floats(t);
  a.dropout = dropout_of(p, seed, x);
  launch(&KernelTable::forward, a, x);
  return t;
}

void expand_add_into(const Tensor& y, const Tensor& t, const Tensor& B, double scale, const Tensor& out) {
  const c10::DeviceGuard guard(y.device());
  check_rows("t", t, y, B.size(1), t.scalar_type());
  check_factor("B", B, {y.size(-1), B.size(1)}, y, y.scalar_type());
  const RowsRead y_rows(y);
  const RowsWritten target(out);
  const Tensor t_rows = fp32_rows(t);
  ForwardArgs a = forward_args(y, B.size(1), scale);
  a.d_out = static_cast<int32_t>(y.size(-1));
  a.y = y_rows.rows();
  a.out = target.rows();
  a.B = factor(B, y.scalar_type(), kUp);
  a.t_in = floats(t_rows);
  launch(&KernelTable::forward, a, y);
  target.finish();
}
Tensor expand_add(const Tensor& y, const Tensor& t, const Tensor& B, double scale) {
  if (!forward_fits(y, y, B.size(1)))
    return fallback<Tensor, const Tensor&, const Tensor&, const Tensor&, double>("expand_add", y, t, B, scale);
  Tensor out = at::empty(y.sizes(), y.options());
  expand_add_into(y, t, B, scale, out);
  return out;
}
void expand_add_(Tensor& y, const Tensor& t, const Tensor& B, double scale) {
  if (!forward_fits(y, y, B.size(1)))
    return fallback<void, Tensor&, const Tensor&, const Tensor&, double>("expand_add_", y, t, B, scale);
  expand_add_into(y, t, B, scale, y);
}

// ------------------------------------------------------------------------------------------------ backward

struct BackwardInputs {
  Tensor g, x, t, dt, A, B;  // undefined: absent
  at::ScalarType type;
  double scale, p;
  Seed seed;
  bool dx, dA, dB, want_dt;
};
struct BackwardResults {
  Tensor dx, dA, dB, dt;
};

BackwardResults run_backward(const BackwardInputs& in) {
  const Tensor& like = in.g.defined() ? in.g : in.dt;
  const Tensor& factor_like = in.A.defined() ? in.A : in.B;
  const int64_t rank = in.A.defined() ? in.A.size(0) : in.B.size(1);
  if (in.A.defined()) check_factor("A", in.A, {rank, in.A.size(1)}, like, in.type);
  if (in.B.defined()) check_factor("B", in.B, {in.B.size(0), rank}, like, in.type);
  if (in.g.defined()) check_rows("g", in.g, like, in.B.size(0), in.type);
  if (in.dt.defined()) check_rows("dt", in.dt, like, rank, in.dt.scalar_type());
  if (in.dA) check_rows("x", in.x, like, in.A.size(1), in.type);
  if (in.dB) check_rows("t", in.t, like, rank, in.t.scalar_type());
  auto leading = like.sizes().vec();
  const auto options = like.options().dtype(in.type);
  BackwardResults out = {none(like, in.type), none(factor_like), none(factor_like), none(like, in.type)};
  if (in.dx) {
    leading.back() = in.A.size(1);
    out.dx = at::empty(leading, options);
  }
  if (in.dA) out.dA = at::empty_like(in.A);
  if (in.dB) out.dB = at::empty_like(in.B);
  if (in.want_dt) {
    leading.back() = rank;
    out.dt = at::empty(leading, options.dtype(at::kFloat));
  }
  const c10::DeviceGuard guard(like.device());
  const RowsRead g(in.g), x(in.dA ? in.x : Tensor());
  Tensor t = in.dB ? fp32_rows(in.t) : Tensor(), dt = in.dt.defined() ? fp32_rows(in.dt) : Tensor();
  BackwardArgs a = {};
  a.tokens = like.numel() / like.size(-1);
  a.dtype = code(in.type);
  a.d_in = in.A.defined() ? static_cast<int32_t>(in.A.size(1)) : 0;
  a.d_out = in.B.defined() ? static_cast<int32_t>(in.B.size(0)) : 0;
  a.rank = static_cast<int32_t>(rank);
  a.scale = static_cast<float>(in.scale);
  a.g = g.rows();
  a.x = x.rows();
  if (in.dx) a.dx = RowsWritten(out.dx).rows();
  a.t = floats(t);
  a.dt_in = floats(dt);
  a.dt_out = in.want_dt ? floats(out.dt) : nullptr;
  a.A = factor(in.A, in.type, kDown);
  a.B = factor(in.B, in.type, kUp);
  if (in.dA) a.dA = target(out.dA, in.type, kDown);
  if (in.dB) a.dB = target(out.dB, in.type, kUp);
  a.dropout = dropout_of(in.p, in.seed, like);
  launch(&KernelTable::backward, a, like);
  return out;
}

bool backward_fits(at::ScalarType type, const Tensor& like, const optional<Tensor>& A, const optional<Tensor>& B) {
  const int64_t rank = A ? A->size(0) : B->size(1);
  return like.dim() && fits(type, like.numel(), {A ? A->size(1) : 1, B ? B->size(0) : 1}, rank);
}

Tensors3 residual_add_backward(const Tensor& g, const optional<Tensor>& x, const Tensor& t, const Tensor& A,
                               const Tensor& B, double scale, double p, const Seed& seed, bool need_dx, bool need_dA,
                               bool need_dB) {
  if (!backward_fits(g.scalar_type(), g, A, B))
    return fallback<Tensors3, const Tensor&, const optional<Tensor>&, const Tensor&, const Tensor&, const Tensor&,
                    double, double, const Seed&, bool, bool, bool>("residual_add_backward", g, x, t, A, B, scale, p,
                                                                   seed, need_dx, need_dA, need_dB);
  auto out = run_backward(
      {g, x.value_or(Tensor()), t, {}, A, B, g.scalar_type(), scale, p, seed, need_dx, need_dA, need_dB, false});
  return {out.dx, out.dA, out.dB};
}
Tensors2 shrink_backward(const Tensor& dt, const optional<Tensor>& x, const Tensor& A, double p, const Seed& seed,
                         at::ScalarType dx_type, bool need_dx, bool need_dA) {
  const bool one_type = !need_dA || !x || x->scalar_type() == dx_type;
  if (!one_type || !backward_fits(dx_type, dt, A, {}))
    return fallback<Tensors2, const Tensor&, const optional<Tensor>&, const Tensor&, double, const Seed&,
                    at::ScalarType, bool, bool>("shrink_backward", dt, x, A, p, seed, dx_type, need_dx, need_dA);
  auto out =
      run_backward({{}, x.value_or(Tensor()), {}, dt, A, {}, dx_type, 1.0, p, seed, need_dx, need_dA, false, false});
  return {out.dx, out.dA};
}
Tensors2 expand_add_backward(const Tensor& g, const Tensor& t, const Tensor& B, double scale, bool need_dt,
                             bool need_dB) {
  if (!backward_fits(g.scalar_type(), g, {}, B))
    return fallback<Tensors2, const Tensor&, const Tensor&, const Tensor&, double, bool, bool>(
        "expand_add_backward", g, t, B, scale, need_dt, need_dB);
  auto out = run_backward({g, {}, t, {}, {}, B, g.scalar_type(), scale, 0.0, {}, false, false, need_dB, need_dt});
  return {out.dt, out.dB};
}

}  // namespace

void register_adds(torch::Library& m) {
  m.impl("residual_add", &residual_add);
  m.impl("residual_add_", &residual_add_);
  m.impl("residual_add_out", &residual_add_out);
  m.impl("residual_add_backward", &residual_add_backward);
  m.impl("shrink", &shrink);
  m.impl("shrink_backward", &shrink_backward);
  m.impl("expand_add", &expand_add);
  m.impl("expand_add_", &expand_add_);
  m.impl("expand_add_backward", &expand_add_backward);
}

}  // namespace lowrank
