// The second stage of every sum: partials are added in index order, so results do not depend on scheduling.
#pragma once
#include "tile.cuh"

namespace lowrank {
namespace LOWRANK_ARCH {

template <class E>
SIMT_DEVICE void write_element(const MutableFactor& f, int k, int n, float value) {
  int64_t at = (k / f.group) * f.group_stride + (k % f.group) * f.rank_stride + n * f.n_stride;
  if (f.wide) {
    static_cast<float*>(f.data)[at] = value;
  } else {
    static_cast<E*>(f.data)[at] = rounded<E>(value);
  }
}

struct SumParams {
  const float* partials;  // [outputs, count, elements]
  int64_t elements;
  int outputs, count;
  float scale;
  float* sums;  // [outputs, elements] = scale * sum over count, or null
  // or, with outputs = 1 and elements = n * rank: element (n, k) into a factor (k < split) or the one stacked above it
  MutableFactor target, upper;
  int rank, split;
  const bool* active;  // [rank / target.group], or null: a group that is not active gets zero and is not summed
};

// One thread per element; 256 threads.
template <class E>
SIMT_KERNEL(256, 1)
sum_kernel(const SumParams p) {
  const int64_t i = int64_t(block_id().x) * 256 + thread_id();
  if (i >= p.elements) return;
  const int output = block_id().y;
  const int n = p.sums ? 0 : static_cast<int>(i / p.rank), k = p.sums ? 0 : static_cast<int>(i % p.rank);
  const bool is_active = p.sums || k >= p.split || !p.active || p.active[k / p.target.group];
  float sum = 0.0f;
  if (is_active)
    for (int s = 0; s < p.count; s++) sum += p.partials[(int64_t(output) * p.count + s) * p.elements + i];
  sum *= p.scale;
  if (p.sums) {
    p.sums[output * p.elements + i] = sum;
  } else if (k < p.split) {
    if (p.target.data) write_element<E>(p.target, k, n, sum);
  } else if (p.upper.data) {
    write_element<E>(p.upper, k - p.split, n, sum);
  }
}

}  // namespace LOWRANK_ARCH
}  // namespace lowrank
