// Routed projection beside the row and column kernels, which do all its work on [T, d]: what is [T, E], [T, r] or of
// the size of the bank.
//
//   softmax_kernel          p = softmax(logits), logits = t R^T or given; sums of p over chunks of 256 rows
//   count_kernel            tokens that each mean is over
//   mix_kernel              w = mean of p (or static weights); B_mix = sum_e w_e B_e  [segments, d_out, r]
//   weight_gradient_kernel  dw_e = <G, B_e> by chunks                      (G = s g^T t, shared by all experts)
//   bank_gradient_kernel    dB_e = sum over segments of w_e G, zero where inactive (the mask is read on the device)
//   route_backward_kernel   softmax backward per row: dlogits, and dt with the router's share
//   router_gradient_kernel  dR = dlogits^T t by chunks
//
// Token masks and activity masks stay on the device: nothing here waits for the host.
#pragma once
#include "reduce.cuh"

namespace lowrank {
namespace LOWRANK_ARCH {

constexpr int kChunkRows = 256;  // rows (or elements) whose sum one block makes, with 256 threads

struct SoftmaxParams {
  const float* t;          // [T, rank], or null: p holds the logits already
  Factor R;                // [E, rank] as element (k, expert)
  float* p;                // [T, E]
  float* sums;             // [chunks, segments, E + 1]: sums over kept tokens, and their number; or null
  const bool* token_mask;  // [T] or null
  int64_t segment_rows;
  int rank, experts;
};

// Sum over the warp, the same order in every lane.
SIMT_DEVICE float warp_sum(float v) {
  SIMT_UNROLL
  for (int step = 16; step; step /= 2) v += shuffle_xor(v, step);
  return v;
}

// One thread per row. Grid: (chunks, segments). Shared: 8 * (E + 1) floats.
template <class E>
SIMT_KERNEL(256, 1)
softmax_kernel(const SoftmaxParams a) {
  float* warp_sums = reinterpret_cast<float*>(shared_memory());
  const int64_t in_segment = int64_t(block_id().x) * kChunkRows + thread_id();
  const bool valid = in_segment < a.segment_rows;
  const int64_t row = block_id().y * a.segment_rows + in_segment;
  float* p = a.p + row * a.experts;
  float largest = bits_to_float(0xff800000u), total = 0.0f;
  if (valid) {
    for (int e = 0; e < a.experts; e++) {
      float logit = 0.0f;
      if (a.t) {
        for (int k = 0; k < a.rank; k++) logit += a.t[row * a.rank + k] * factor_value<E>(a.R, k, e);
      } else {
        logit = p[e];
      }
      p[e] = logit;
      largest = logit > largest || logit != logit ? logit : largest;
    }
    for (int e = 0; e < a.experts; e++) {
      float value = exponential(p[e] - largest);
      p[e] = value;
      total += value;
    }
  }
  const float keep = valid && (!a.token_mask || a.token_mask[row]) ? 1.0f : 0.0f;
  for (int e = 0; e <= a.experts; e++) {
    float value = keep;
    if (e < a.experts) {
      float probability = valid ? p[e] / total : 0.0f;
      if (valid) p[e] = probability;
      value = keep != 0.0f ? probability : 0.0f;
    }
    if (!a.sums) continue;
    value = warp_sum(value);
    if (lane_id() == 0) warp_sums[warp_id() * (a.experts + 1) + e] = value;
  }
  if (!a.sums) return;
  sync_block();
  for (int e = thread_id(); e <= a.experts; e += 256) {
    float sum = 0.0f;
    for (int w = 0; w < 8; w++) sum += warp_sums[w * (a.experts + 1) + e];
    a.sums[(int64_t(block_id().x) * grid_blocks().y + block_id().y) * (a.experts + 1) + e] = sum;
  }
}

struct CountParams {
  const bool* token_mask;  // [T] or null
  float* counts;           // [segments]: kept tokens, at least 1
  int64_t segment_rows;
};

// One block of 256 threads per segment. Shared: 8 floats.
template <class E>
SIMT_KERNEL(256, 1)
count_kernel(const CountParams a) {
  float* warp_sums = reinterpret_cast<float*>(shared_memory());
  float count = 0.0f;
  for (int64_t i = thread_id(); i < a.segment_rows; i += 256)
    count += !a.token_mask || a.token_mask[block_id().x * a.segment_rows + i] ? 1.0f : 0.0f;
  count = warp_sum(count);
  if (lane_id() == 0) warp_sums[warp_id()] = count;
  sync_block();
  if (thread_id() != 0) return;
  for (int w = 1; w < 8; w++) count += warp_sums[w];
  a.counts[block_id().x] = count > 1.0f ? count : 1.0f;
}

struct MixParams {
  const float* sums;       // [chunks, segments, E + 1] from softmax_kernel, or null
  const float* weights;    // static: [E]; backward: [segments, E]; read when sums is null
  int64_t weights_stride;  // between segments
  float* w;                // [segments, E], or null
  Factor B;                // group = rank of one expert
  float* mix;              // [segments, d_out, rank]
  int chunks, experts, rank, d_out;
};

// One thread per element of B_mix; 256 threads. Grid: (element blocks, segments). Shared: E floats.
template <class E>
SIMT_KERNEL(256, 1)
mix_kernel(const MixParams a) {
  float* w = reinterpret_cast<float*>(shared_memory());
  const int segment = block_id().y, segments = grid_blocks().y;
  float count = 0.0f;
  if (a.sums)
    for (int c = 0; c < a.chunks; c++) count += a.sums[(int64_t(c) * segments + segment) * (a.experts + 1) + a.experts];
  count = count > 1.0f ? count : 1.0f;
  for (int e = thread_id(); e < a.experts; e += 256) {
    float value = 0.0f;
    if (a.sums) {
      for (int c = 0; c < a.chunks; c++) value += a.sums[(int64_t(c) * segments + segment) * (a.experts + 1) + e];
      value /= count;
    } else {
      value = a.weights[segment * a.weights_stride + e];
    }
    w[e] = value;
    if (a.w && block_id().x == 0) a.w[segment * a.experts + e] = value;
  }
  sync_block();
  const int64_t i = int64_t(block_id().x) * 256 + thread_id(), elements = int64_t(a.d_out) * a.rank;
  if (i >= elements) return;
  const int n = static_cast<int>(i / a.rank), k = static_cast<int>(i % a.rank);
  float sum = 0.0f;
  for (int e = 0; e < a.experts; e++) sum += w[e] * factor_value<E>(a.B, e * a.rank + k, n);
  a.mix[segment * elements + i] = sum;
}

struct BankParams {
  const float* G;  // [segments, d_out, rank], scale included
  const float* w;  // [segments, E]
  Factor B;        // group = rank
  float* dw;       // weight_gradient: [chunks, segments, E]
  MutableFactor dB;
  const bool* active;  // [E] or null
  int segments, experts, rank, d_out;
};

// Grid: (chunks of 2048 elements, segments). 256 threads. Shared: 8 floats per expert.
template <class E>
SIMT_KERNEL(256, 1)
weight_gradient_kernel(const BankParams a) {
  float* warp_sums = reinterpret_cast<float*>(shared_memory());
  const int64_t elements = int64_t(a.d_out) * a.rank, begin = int64_t(block_id().x) * 8 * kChunkRows;
  const float* G = a.G + block_id().y * elements;
  for (int e = 0; e < a.experts; e++) {
    float value = 0.0f;
    for (int j = 0; j < 8; j++) {
      const int64_t i = begin + j * kChunkRows + thread_id();
      if (i < elements)
        value += G[i] * factor_value<E>(a.B, e * a.rank + static_cast<int>(i % a.rank), static_cast<int>(i / a.rank));
    }
    value = warp_sum(value);
    if (lane_id() == 0) warp_sums[e * 8 + warp_id()] = value;
  }
  sync_block();
  for (int e = thread_id(); e < a.experts; e += 256) {
    float sum = 0.0f;
    for (int w = 0; w < 8; w++) sum += warp_sums[e * 8 + w];
    a.dw[(int64_t(block_id().x) * a.segments + block_id().y) * a.experts + e] = sum;
  }
}

// One thread per element of [E, d_out, rank]; grid: (element blocks, E). 256 threads.
template <class E>
SIMT_KERNEL(256, 1)
bank_gradient_kernel(const BankParams a) {
  const int64_t elements = int64_t(a.d_out) * a.rank, i = int64_t(block_id().x) * 256 + thread_id();
  const int e = block_id().y;
  if (i >= elements) return;
  float sum = 0.0f;
  if (!a.active || a.active[e])
    for (int s = 0; s < a.segments; s++) sum += a.w[s * a.experts + e] * a.G[s * elements + i];
  write_element<E>(a.dB, e * a.rank + static_cast<int>(i % a.rank), static_cast<int>(i / a.rank), sum);
}

struct RouteBackwardParams {
  const float* u;          // mixed: [T, rank]; token: [T, E * rank] = dz; scale included
  const float* t;          // token: [T, rank]
  const float* p;          // [T, E], or null (static)
  const float* dw;         // mixed: [segments, E]
  const float* counts;     // mixed: [segments]: tokens averaged over
  const bool* token_mask;  // mixed
  Factor R;                // router on t: [E, rank] as (k, expert); data null otherwise
  float* dt;               // [T, rank], or null
  float* dlogits;          // [T, E], or null (static)
  int64_t tokens, segment_rows;
  int rank, experts, token_routing;
};

// dlogits = p (dp - <p, dp>); dt = u (mixed) or sum_e p_e dz_e (token), plus dlogits R. One thread per row, 256
// threads.
template <class E>
SIMT_KERNEL(256, 1)
route_backward_kernel(const RouteBackwardParams a) {
  const int64_t row = int64_t(block_id().x) * 256 + thread_id();
  if (row >= a.tokens) return;
  const int experts = a.p ? a.experts : 0;
  const float* u = a.u + row * (a.token_routing ? a.rank * a.experts : a.rank);
  const float* p = a.p + row * experts;
  float* dlogits = a.dlogits + row * experts;
  const int64_t segment = a.token_routing ? 0 : row / a.segment_rows;
  const float keep = !a.token_routing && a.p && (!a.token_mask || a.token_mask[row]) ? 1.0f / a.counts[segment] : 0.0f;
  float mean = 0.0f;
  for (int e = 0; e < experts; e++) {
    float dp = 0.0f;
    if (a.token_routing) {
      for (int k = 0; k < a.rank; k++) dp += u[e * a.rank + k] * a.t[row * a.rank + k];
    } else if (keep != 0.0f) {
      dp = a.dw[segment * experts + e] * keep;
    }
    dlogits[e] = dp;
    mean += p[e] * dp;
  }
  for (int e = 0; e < experts; e++) dlogits[e] = p[e] * (dlogits[e] - mean);
  if (!a.dt) return;
  for (int k = 0; k < a.rank; k++) {
    float dt = a.token_routing ? 0.0f : u[k];
    if (a.token_routing)
      for (int e = 0; e < experts; e++) dt += p[e] * u[e * a.rank + k];
    if (a.R.data)
      for (int e = 0; e < experts; e++) dt += dlogits[e] * factor_value<E>(a.R, k, e);
    a.dt[row * a.rank + k] = dt;
  }
}

struct RouterGradientParams {
  const float* dlogits;  // [T, E]
  const float* t;        // [T, rank]
  float* partials;       // [chunks, E, rank]
  int64_t tokens;
  int rank, experts;
};

// One thread per (expert, k), a chunk of 256 rows per block. 256 threads.
template <class E>
SIMT_KERNEL(256, 1)
router_gradient_kernel(const RouterGradientParams a) {
  const int64_t begin = int64_t(block_id().x) * kChunkRows;
  const int64_t end = begin + kChunkRows < a.tokens ? begin + kChunkRows : a.tokens;
  for (int i = thread_id(); i < a.experts * a.rank; i += 256) {
    float sum = 0.0f;
    for (int64_t row = begin; row < end; row++)
      sum += a.dlogits[row * a.experts + i / a.rank] * a.t[row * a.rank + i % a.rank];
    a.partials[int64_t(block_id().x) * a.experts * a.rank + i] = sum;
  }
}

}  // namespace LOWRANK_ARCH
}  // namespace lowrank
