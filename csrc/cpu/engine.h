// The two passes that every op is made of. Forward: shrink, a small step in the middle, expand. Backward: shrink_outer,
// the step in the middle, expand_outer. Each reads its activations once; what lies between stays in the caches.
#pragma once

#include "tensors.h"

namespace lowrank {

constexpr int64_t kColumnSplitRows = 256;  // up to here the second half is split over columns, not rows

struct Shrink {  // t = dropout(x) P^T
  const Rows& x;
  PanelSource P;
  int64_t k;
  Dropout drop;
};

struct Expand {  // out = y + z Q; y null: out = z Q, through dropout's mask
  const Rows* y;
  const Rows& out;
  PanelSource Q;
  int64_t k;
  Dropout drop;
};

// middle(row, rows, t, z): from t [rows][pad_rank(k)] (null without `first`) to z (null without `second`), for the rows
// from `row` on. Runs on the thread that holds them; must write the padding of z as zeros.
template <class Middle>
void forward(int64_t count, const Shrink* first, const Expand* second, const Middle& middle) {
  const int64_t tk = first ? pad_rank(first->k) : 0, zk = second ? pad_rank(second->k) : 0;
  const int64_t work = count * ((first ? first->x.matrix.cols * tk : 0) + (second ? second->out.matrix.cols * zk : 0));
  const Kernels& table = kernels(dtype_of(first ? first->x.owner : second->out.owner));
  const int64_t p_floats = first ? first->P.floats() : 0, q_floats = second ? second->Q.floats() : 0;
  const int64_t threads = thread_count(work, (count + 7) / 8);
  const bool split_columns = second && threads > 1 && count <= kColumnSplitRows;
  float* shared_z = split_columns ? workspace(Slot::shared, count * zk) : nullptr;

  split(threads, count, 8, [&](int64_t, int64_t begin, int64_t end) {
    // every thread packs for itself: a panel is small beside the rows, and a second parallel region is not cheap
    float* memory = workspace(Slot::thread, kRowBlock * (tk + zk) + p_floats + q_floats);
    float *t = memory, *z = t + kRowBlock * tk, *p_memory = z + kRowBlock * zk, *q_memory = p_memory + p_floats;
    const Panel P = first ? first->P.pack(p_memory) : Panel{};
    const Panel Q = second && !split_columns ? second->Q.pack(q_memory) : Panel{};
    blocks(begin, end, [&](int64_t row, int64_t rows) {
      if (first)
        table.shrink(first->x.from(row), rows, P, tk, t, second && second->y ? second->y->at(row) : nullptr, first->drop,
                     row);
      float* target = split_columns ? shared_z + row * zk : z;
      middle(row, rows, first ? t : nullptr, second ? target : nullptr);
      if (!second || split_columns) return;
      Matrix y;
      if (second->y) y = second->y->from(row);
      table.expand(second->y ? &y : nullptr, second->out.from(row), rows, target, Q, zk, 0, second->out.matrix.cols,
                   nullptr, second->drop, row);
    });
  });
  if (!split_columns) return;
  split(threads, second->out.matrix.cols, 64, [&](int64_t, int64_t begin, int64_t end) {
    const Panel Q = second->Q.pack(workspace(Slot::thread, q_floats), begin, end);
    blocks(0, count, [&](int64_t row, int64_t rows) {
      Matrix y;
      if (second->y) y = second->y->from(row);
      table.expand(second->y ? &y : nullptr, second->out.from(row), rows, shared_z + row * zk, Q, zk, begin, end, nullptr,
                   second->drop, row);
    });
  });
}

struct ShrinkOuter {  // u = g Q^T (Q null: not needed), dQ = z^T g (dQ empty: not needed)
  const Rows& g;
  const PanelSource* Q;
  std::vector<Factor> dQ;  // stacked along k
  int64_t k;
};

struct ExpandOuter {  // dx = u P (dx null: not needed), dP = u^T dropout(x) (dP empty: not needed)
  const Rows* x;
  const Rows* dx;
  PanelSource P;
  std::vector<Factor> dP;
  int64_t k;
  Dropout drop;
};

// source(row, rows, z): writes z [rows][pad_rank(first.k)] for dQ. middle(row, rows, v, u): from v = g Q^T to u for the
// second half; without `first`, v is null and middle is the source of u.
template <class Source, class Middle>
void backward(int64_t count, const ShrinkOuter* first, const ExpandOuter* second, const Source& source,
              const Middle& middle) {
  const Rows& any = first ? first->g : second->dx ? *second->dx : *second->x;
  const Kernels& table = kernels(dtype_of(any.owner));
  const int64_t vk = first ? pad_rank(first->k) : 0, uk = second ? pad_rank(second->k) : 0;
  const int64_t g_cols = first ? first->g.matrix.cols : 0;
  const int64_t x_cols = second ? (second->dx ? second->dx : second->x)->matrix.cols : 0;
  const int64_t q_ld = first ? table.padded(g_cols) : 0, p_ld = second ? table.padded(x_cols) : 0;
  const int64_t dq_floats = first && !first->dQ.empty() ? vk * q_ld : 0, dp_floats = second && !second->dP.empty() ? uk * p_ld : 0;
  const int64_t q_floats = first && first->Q ? first->Q->floats() : 0;
  const int64_t p_floats = second && second->dx ? second->P.floats() : 0;
  const int64_t work = 2 * count * (g_cols * vk + x_cols * uk);
  const int64_t threads = thread_count(work, (count + 7) / 8);
  float* sums = workspace(Slot::shared, threads * (dq_floats + dp_floats));

  split(threads, count, 8, [&](int64_t thread, int64_t begin, int64_t end) {
    float* memory = workspace(Slot::thread, kRowBlock * (2 * vk + uk) + q_floats + p_floats);
    float *z = memory, *v = z + kRowBlock * vk, *u = v + kRowBlock * vk;
    float *q_memory = u + kRowBlock * uk, *p_memory = q_memory + q_floats;
    float *dq = sums + thread * dq_floats, *dp = sums + threads * dq_floats + thread * dp_floats;
    const Panel Q = first && first->Q ? first->Q->pack(q_memory) : Panel{};
    const Panel P = second && second->dx ? second->P.pack(p_memory) : Panel{};
    blocks(begin, end, [&](int64_t row, int64_t rows) {
      const bool accumulate = row > begin;
      if (first) {
        if (dq_floats) source(row, rows, z);
        table.shrink_outer(first->g.from(row), rows, Q, vk, first->Q ? v : nullptr, z, dq_floats ? dq : nullptr, q_ld,
                           accumulate, nullptr);
      }
      if (!second) return middle(row, rows, first && first->Q ? v : nullptr, nullptr);
      middle(row, rows, first ? v : nullptr, u);
      Matrix x, dx;
      if (second->x) x = second->x->from(row);
      if (second->dx) dx = second->dx->from(row);
      table.expand_outer(u, P, uk, second->dx ? &dx : nullptr, second->x ? &x : nullptr, rows, dp_floats ? dp : nullptr,
                         p_ld, accumulate, nullptr, second->drop, row);
    });
  });
  if (count == 0) std::fill_n(sums, dq_floats + dp_floats, 0.0f);
  auto reduce = [&](const std::vector<Factor>& targets, const float* panels, int64_t step, int64_t ld, int64_t cols) {
    const int64_t helpers = thread_count(threads * step * 8, cols / 64);
    split(helpers, cols, 64, [&](int64_t, int64_t begin, int64_t end) {
      const float* from = panels;
      for (const Factor& target : targets) {
        if (target.data) table.unpack(from, threads, step, ld, target, begin, end);
        from += target.k * ld;
      }
    });
  };
  if (dq_floats) reduce(first->dQ, sums, dq_floats, q_ld, g_cols);
  if (dp_floats) reduce(second->dP, sums + threads * dq_floats, dp_floats, p_ld, x_cols);
}

// ---------------------------------------------------------------------------------------------- small steps

// [rows][k] <- scale * [rows][from_k], zeros in the padding
inline void scaled(const float* from, int64_t from_stride, int64_t rows, int64_t k, float scale, float* to,
                   int64_t to_stride) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t j = 0; j < to_stride; ++j) to[row * to_stride + j] = j < k ? scale * from[row * from_stride + j] : 0.0f;
}

// rows of t as a contiguous float32 [T, k] tensor
inline Tensor hidden_rows(const Tensor& t, int64_t count, int64_t k) {
  TORCH_CHECK(t.numel() == count * k && t.is_cpu(), "lowrank_fast: t must hold ", count, " x ", k, " elements; got ",
              t.sizes());
  return t.to(at::kFloat).contiguous();
}

// The targets of one gradient: none when it is not needed.
inline std::vector<Factor> target(bool needed, const Tensor& gradient, int64_t d_dim, int64_t d) {
  if (!needed) return {};
  return {factor_of(gradient, d_dim, d)};
}

}  // namespace lowrank
