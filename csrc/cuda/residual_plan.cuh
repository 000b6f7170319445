// Launch plans of the residual add and its halves.
//
//   forward    one launch of the row kernel
//   backward   frozen factors: the row kernel on g, roles of the factors swapped
//              sm_90, every gradient, factors that fit a cluster: one launch, then the sums of dA and dB
//              else two passes over columns (g, then x and dx), each followed by its sums
#pragma once
#include "cluster_backward.cuh"
#include "plan.cuh"

namespace lowrank {
namespace LOWRANK_ARCH {

inline size_t forward(const ForwardArgs& a, void* workspace, void* stream, int* error) {
  Context c(workspace, stream);
  with_element(a.dtype, [&](auto e) {
    RowParams p = row_params(a.tokens, a.rank);
    if (a.x.data || !a.t_in) set_x(p, a.x, a.d_in, a.A);
    set_out(p, a.y, a.out, a.d_out, a.B);
    p.t_in = a.t_in;
    p.t_out = a.t_out;
    p.scale = a.scale;
    p.drop_x = a.dropout;
    if (a.dropout.seed) p.t_scale = a.dropout.keep_scale;
    run_rows<decltype(e)>(c, p, 1, "forward");
  });
  return c.finish(error);
}

// ------------------------------------------------------------------------------------------------ one launch

// Whether one cluster's registers hold the sums of dA and dB, and its shared memory the rest, so that a backward that
// needs every gradient is one launch.
template <class E>
bool one_cluster(int d_in, int d_out, int rank) {
  const int width = d_in > d_out ? d_in : d_out;
  const auto holds = [&](auto r) {
    using C = ClusterTuning<E, decltype(r)::value>;
    return rank <= decltype(r)::value && width <= kMaxCluster * C::block_n && C::shared_bytes <= shared_limit();
  };
  return use_clusters && (rank <= 16 ? holds(Int<16>{}) : holds(Int<32>{}));
}

struct ClusterSums {
  float* dB;  // [clusters, d_out, rank]
  int clusters;
};

template <class E, int R>
ClusterSums cluster_backward(Context& c, const BackwardArgs& a) {
  using C = ClusterTuning<E, R>;
  const int blocks = static_cast<int>(ceil_div(a.d_in > a.d_out ? a.d_in : a.d_out, C::block_n));
  ClusterParams p = {};
  p.g = a.g.data;
  p.g_stride = a.g.stride;
  p.x = a.x.data;
  p.x_stride = a.x.stride;
  p.dx = a.dx.data;
  p.dx_stride = a.dx.stride;
  p.t = a.t;
  p.A = narrowed<E>(a.A);
  p.B = narrowed<E>(a.B);
  p.A_access = factor_access<E>(p.A, a.rank, true);
  p.B_access = factor_access<E>(p.B, a.rank, true);
  p.tokens = a.tokens;
  p.d_in = a.d_in;
  p.d_out = a.d_out;
  p.rank = a.rank;
  p.g_vec = vectors<E>(a.g);
  p.x_vec = vectors<E>(a.x);
  p.dx_vec = vectors<E>(a.dx);
  p.u_scale = a.scale;
  p.dx_scale = a.dropout.seed ? a.dropout.keep_scale : 1.0f;
  p.dropout = a.dropout;
  int64_t clusters = 128 / blocks,
          most = ceil_div(a.tokens, C::block_m);  // by the shape alone: the order of sums depends on it
  clusters = clusters > most ? most : clusters;
  clusters = clusters < 1 ? 1 : clusters;
  p.dA = c.take<float>(clusters * a.d_in * a.rank);
  p.dB = c.take<float>(clusters * a.d_out * a.rank);
  Launch l{static_cast<int>(clusters * blocks), 1, 1, C::threads, blocks, C::shared_bytes, "cluster backward"};
  c.run(cluster_backward_kernel<E, R>, l, p);
  run_sum<E>(c, sum_into(a.dA, p.dA, a.d_in, a.rank, static_cast<int>(clusters), p.dx_scale));
  return {p.dB, static_cast<int>(clusters)};
}

// dx, dA and the sums of dB, which the caller adds, where `one_cluster` holds.
template <class E>
ClusterSums cluster_backward(Context& c, const BackwardArgs& a) {
  if constexpr (has_clusters) return a.rank <= 16 ? cluster_backward<E, 16>(c, a) : cluster_backward<E, 32>(c, a);
  return {};
}

// ------------------------------------------------------------------------------------------------ backward

inline size_t backward(const BackwardArgs& a, void* workspace, void* stream, int* error) {
  Context c(workspace, stream);
  with_element(a.dtype, [&](auto e) {
    using E = decltype(e);
    const bool inputs = a.dx.data || a.dA.data;
    if (a.dx.data && !a.dA.data && !a.dB.data && !a.dt_in && !a.dt_out) {  // frozen factors: read g, write dx
      RowParams p = row_params(a.tokens, a.rank);
      set_x(p, a.g, a.d_out, a.B);
      set_out(p, {}, a.dx, a.d_in, a.A);
      p.t_scale = a.scale;
      p.scale = a.dropout.seed ? a.dropout.keep_scale : 1.0f;
      p.drop_out = a.dropout;
      run_rows<E>(c, p, 1, "dx");
      return;
    }
    const bool all = a.g.data && a.dx.data && a.dA.data && a.dB.data && !a.dt_in && !a.dt_out;
    if (all && one_cluster<E>(a.d_in, a.d_out, a.rank)) {
      const ClusterSums sums = cluster_backward<E>(c, a);
      run_sum<E>(c, sum_into(a.dB, sums.dB, a.d_out, a.rank, sums.clusters, a.scale));
      return;
    }
    const float* u = a.dt_in;
    if (!u) {
      float* own = a.dt_out || !inputs ? a.dt_out : c.take<float>(a.tokens * a.rank);
      ColumnParams p = column_params(a.tokens, a.g, a.d_out, a.t, a.rank);
      p.W = p.W_upper = a.B;
      Partials partials = gradient_pass<E>(c, p, 1, a.scale, own, a.dB.data != nullptr);
      if (a.dB.data) run_sum<E>(c, sum_into(a.dB, partials.grad, a.d_out, a.rank, partials.splits, a.scale));
      u = own;
    }
    if (!inputs) return;
    ColumnParams p = column_params(a.tokens, a.x, a.d_in, u, a.rank);
    p.W = p.W_upper = a.A;
    input_pass<E>(c, p, a.dx, a.dA, {}, a.dropout);
  });
  return c.finish(error);
}

}  // namespace LOWRANK_ARCH
}  // namespace lowrank
