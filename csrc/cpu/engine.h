// The two passes that every op is made of. Forward: shrink, a small step in the middle, expand. Backward: shrink_outer,
// the step in the middle, expand_outer. Each reads its activations once; what lies between stays in the caches.
#pragma once

#include <atomic>

#include "tensors.h"

namespace lowrank {

constexpr int64_t kFewRows = 256;       // up to here both halves read their parameters once, a piece at a time
constexpr int64_t kPackColumns = 1024;  // columns of such a piece, which stays in the second-level cache
constexpr int64_t kSumsPiece = 256;     // columns of a piece of sums, which stays in the first

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

  // rows [row, row + rows) of columns [begin, end), from z [rows][pad_rank(k)]
  void block(const Kernels& table, int64_t row, int64_t rows, const float* z, Panel panel, int64_t begin,
             int64_t end) const {
    Matrix from;
    if (y) from = y->from(row);
    table.expand(y ? &from : nullptr, out.from(row), rows, z, panel, pad_rank(k), begin, end, drop, row);
  }
  // the only row, without a panel; false where these factors or columns need one
  bool only_row(const Kernels& table, const float* z, int64_t begin, int64_t end) const {
    if (drop.on) return false;
    Matrix from;
    if (y) from = y->from(0);
    return table.expand_row(y ? &from : nullptr, out.from(0), z, Q.stack().data(),
                            static_cast<int64_t>(Q.stack().size()), begin, end);
  }
};

// f(panel, begin, end) over pieces of columns [begin, end) of the source, packed as they come, for `rows` rows.
template <class F>
void pieces(const PanelSource& source, int64_t rows, int64_t begin, int64_t end, const F& f) {
  if (source.direct(rows)) return f(source.in_place(), begin, end);
  float* memory = workspace(Slot::piece, source.floats(kPackColumns));
  for (; begin < end; begin += kPackColumns) {
    const int64_t stop = std::min(begin + kPackColumns, end);
    f(source.pack(memory, begin, stop), begin, stop);
  }
}

// Ranks [begin, end) of factors stacked along k.
inline std::vector<Factor> stacked_ranks(const std::vector<Factor>& stack, int64_t begin, int64_t end) {
  std::vector<Factor> part;
  for (Factor f : stack) {
    const int64_t from = std::max<int64_t>(begin, 0), to = std::min(end, f.k);
    begin -= f.k, end -= f.k;
    if (from >= to) continue;
    f.data = static_cast<char*>(f.data) + from * f.stride_k * (f.dtype == Dtype::f32 ? 4 : 2);
    f.k = to - from;
    part.push_back(f);
  }
  return part;
}

// t of one row, without a panel; threads share the ranks. False where these factors need a panel.
inline bool shrink_one_row(const Kernels& table, const Matrix& row, const PanelSource& P, int64_t k, float* t) {
  constexpr int64_t kFromMemory = 16;  // multiply-adds that a parameter's way from memory costs
  const int64_t step = k % 8 ? k : 8;
  std::atomic<bool> done{true};
  split(thread_count(kFromMemory * k * row.cols, k / step), k, step, [&](int64_t, int64_t begin, int64_t end) {
    const std::vector<Factor> part = stacked_ranks(P.stack(), begin, end);
    if (!table.shrink_row(row, part.data(), static_cast<int64_t>(part.size()), t + begin)) done = false;
  });
  return done;
}

// t of the rows [begin, end), for few of them: t [end - begin][pad_rank(k)].
inline void shrink_few(const Kernels& table, const Rows& x, const PanelSource& P, int64_t k, const Dropout& drop,
                       int64_t begin, int64_t end, float* t) {
  const int64_t tk = pad_rank(k), cols = x.matrix.cols;
  if (end - begin == 1 && !drop.on && shrink_one_row(table, x.from(begin), P, k, t)) return;
  if (P.direct(end - begin) || (tk <= kRankBlock && end - begin <= table.most_rows)) {
    pieces(P, end - begin, 0, cols, [&](Panel panel, int64_t from, int64_t to) {
      blocks(begin, end, table.most_rows, [&](int64_t row, int64_t rows) {
        table.shrink(x.from(row), rows, panel, tk, t + (row - begin) * tk, drop, row, from, to);
      });
    });
    return;
  }
  const Panel panel = P.pack(workspace(Slot::thread, P.floats(cols)), 0, cols);
  blocks(begin, end, table.most_rows, [&](int64_t row, int64_t rows) {
    table.shrink(x.from(row), rows, panel, tk, t + (row - begin) * tk, drop, row, 0, cols);
  });
}

template <class Middle>
void forward_few(const Kernels& table, int64_t threads, int64_t count, const Shrink* first, const Expand* second,
                 const Middle& middle) {
  const int64_t tk = first ? pad_rank(first->k) : 0, zk = second ? pad_rank(second->k) : 0;
  float* t = workspace(Slot::shared, count * (tk + zk));
  float* z = t + count * tk;
  split(threads, count, 8, [&](int64_t, int64_t begin, int64_t end) {
    if (first) shrink_few(table, first->x, first->P, first->k, first->drop, begin, end, t + begin * tk);
    middle(begin, end - begin, first ? t + begin * tk : nullptr, second ? z + begin * zk : nullptr);
  });
  if (!second) return;
  const int64_t cols = second->out.matrix.cols,
                row_equivalents = count + 16;  // packing a column costs about 16 rows of it
  split(thread_count(row_equivalents * zk * cols, cols / 64), cols, 64, [&](int64_t, int64_t begin, int64_t end) {
    if (count == 1 && second->only_row(table, z, begin, end)) return;
    pieces(second->Q, count, begin, end, [&](Panel panel, int64_t from, int64_t to) {
      blocks(0, count, table.most_rows,
             [&](int64_t row, int64_t rows) { second->block(table, row, rows, z + row * zk, panel, from, to); });
    });
  });
}

// middle(row, rows, t, z): from t [rows][pad_rank(k)] (null without `first`) to z (null without `second`), for the rows
// from `row` on. Runs on the thread that holds them; must write the padding of z as zeros.
template <class Middle>
void forward(int64_t count, const Shrink* first, const Expand* second, const Middle& middle) {
  const int64_t tk = first ? pad_rank(first->k) : 0, zk = second ? pad_rank(second->k) : 0;
  const int64_t x_cols = first ? first->x.matrix.cols : 0, y_cols = second ? second->out.matrix.cols : 0;
  const Kernels& table = kernels(dtype_of(first ? first->x.owner : second->out.owner));
  const int64_t threads = thread_count(count * (x_cols * tk + y_cols * zk), (count + 7) / 8);
  if (count <= kFewRows) return forward_few(table, threads, count, first, second, middle);

  const int64_t p_floats = first ? first->P.floats(x_cols) : 0, q_floats = second ? second->Q.floats(y_cols) : 0;
  const int64_t block = table.forward_rows;
  split(threads, count, 8, [&](int64_t, int64_t begin, int64_t end) {
    // every thread packs for itself: a panel is small beside the rows, and a second parallel region is not cheap
    float* memory = workspace(Slot::thread, block * (tk + zk) + p_floats + q_floats);
    float *t = memory, *z = t + block * tk, *p_memory = z + block * zk;
    const Panel P = first ? first->P.pack(p_memory, 0, x_cols) : Panel{};
    const Panel Q = second ? second->Q.pack(p_memory + p_floats, 0, y_cols) : Panel{};
    blocks(begin, end, block, [&](int64_t row, int64_t rows) {
      if (first) table.shrink(first->x.from(row), rows, P, tk, t, first->drop, row, 0, x_cols);
      middle(row, rows, first ? t : nullptr, second ? z : nullptr);
      if (second) second->block(table, row, rows, z, Q, 0, y_cols);
    });
  });
}

struct ShrinkOuter {  // u = g Q^T (Q null: not needed), dQ = z^T g (dQ empty: not needed)
  const Rows& g;
  const PanelSource* Q;
  std::vector<Factor> dQ;  // stacked along z_k
  int64_t k, z_k;          // the ranks of u; of z
};

struct ExpandOuter {  // dx = u P (dx null: not needed), dP = u^T dropout(x) (dP empty: not needed)
  const Rows* x;
  const Rows* dx;
  PanelSource P;
  std::vector<Factor> dP;
  int64_t k;
  Dropout drop;
};

// The total of `count` sums, `distance` floats apart, columns [begin, end), into the stacked factors (data null:
// skipped).
inline void store_factors(const Kernels& table, const std::vector<Factor>& targets, const Sums& sums, int64_t count,
                          int64_t distance, int64_t begin, int64_t end) {
  int64_t rank = 0;
  for (const Factor& target : targets) {
    if (target.data) table.unpack(sums, rank, count, distance, target, begin, end);
    rank += target.k;
  }
}

// z^T x for few rows, a piece of columns at a time, straight into the factors.
inline void outer_few(const Kernels& table, const Rows& x, int64_t count, const float* z, int64_t k,
                      const std::vector<Factor>& targets, const Dropout& drop, int64_t begin, int64_t end) {
  auto add_up = [&](const Sums& sums, int64_t from, int64_t to) {
    blocks(0, count, table.most_rows, [&](int64_t row, int64_t rows) {
      table.outer(x.from(row), rows, z + row * pad_rank(k), pad_rank(k), sums, row > 0, from, to, drop, row);
    });
  };
  if (count > 0 && targets.size() == 1 && targets[0].data && targets[0].k == k && table.shrink_panel.natural &&
      is_panel(targets[0], table.unit))
    return add_up(rows_of_sums(static_cast<float*>(targets[0].data), targets[0].stride_k, table.sum_columns), begin,
                  end);
  if (count > 0 && !drop.on && targets.size() == 1 && targets[0].data && targets[0].k == k &&
      table.outer_direct(x.from(0), count, z, targets[0], begin, end))
    return;
  constexpr int64_t ld = kSumsPiece + 16;  // not a power of two: the ranks of a column fall into different sets
  float* memory = workspace(Slot::piece, pad_rank(k) * ld);
  if (count == 0) std::fill_n(memory, pad_rank(k) * ld, 0.0f);
  for (; begin < end; begin += kSumsPiece) {
    const int64_t stop = std::min(begin + kSumsPiece, end);
    const Sums sums = rows_of_sums(memory - begin, ld, table.sum_columns);
    add_up(sums, begin, stop);
    store_factors(table, targets, sums, 1, 0, begin, stop);
  }
}

template <class Source, class Middle>
void backward_few(const Kernels& table, int64_t threads, int64_t count, const ShrinkOuter* first,
                  const ExpandOuter* second, int64_t g_cols, int64_t x_cols, const Source& source,
                  const Middle& middle) {
  const int64_t vk = first ? pad_rank(first->k) : 0, uk = second ? pad_rank(second->k) : 0;
  const int64_t zk = first ? pad_rank(first->z_k) : 0;
  float* z = workspace(Slot::shared, count * (zk + vk + uk));
  float *v = z + count * zk, *u = v + count * vk;
  split(threads, count, 8, [&](int64_t, int64_t begin, int64_t end) {
    if (first && !first->dQ.empty()) source(begin, end - begin, z + begin * zk);
    if (first && first->Q) shrink_few(table, first->g, *first->Q, first->k, {}, begin, end, v + begin * vk);
    middle(begin, end - begin, first && first->Q ? v + begin * vk : nullptr, second ? u + begin * uk : nullptr);
  });
  // both column ranges are cut by the same split, so that one parallel region serves them
  const int64_t cols = std::max(g_cols, x_cols), row_equivalents = count + 16;  // as in forward_few
  split(thread_count(row_equivalents * (g_cols * (vk + zk) + 2 * x_cols * uk), cols / 64), cols, 64,
        [&](int64_t, int64_t begin, int64_t end) {
          if (first && !first->dQ.empty() && begin < g_cols)
            outer_few(table, first->g, count, z, first->z_k, first->dQ, {}, begin, std::min(end, g_cols));
          if (!second || begin >= x_cols) return;
          end = std::min(end, x_cols);
          if (second->dx)
            pieces(second->P, count, begin, end, [&](Panel panel, int64_t from, int64_t to) {
              blocks(0, count, table.most_rows, [&](int64_t row, int64_t rows) {
                table.expand(nullptr, second->dx->from(row), rows, u + row * uk, panel, uk, from, to, second->drop,
                             row);
              });
            });
          if (!second->dP.empty())
            outer_few(table, *second->x, count, u, second->k, second->dP, second->drop, begin, end);
        });
}

// source(row, rows, z): writes z [rows][pad_rank(first.z_k)] for dQ. middle(row, rows, v, u): from v = g Q^T to u for
// the second half; without `first`, v is null and middle is the source of u.
template <class Source, class Middle>
void backward(int64_t count, const ShrinkOuter* first, const ExpandOuter* second, const Source& source,
              const Middle& middle) {
  const Rows& any = first ? first->g : second->dx ? *second->dx : *second->x;
  const Kernels& table = kernels(dtype_of(any.owner));
  const int64_t vk = first ? pad_rank(first->k) : 0, uk = second ? pad_rank(second->k) : 0;
  const int64_t zk = first ? pad_rank(first->z_k) : 0;
  const int64_t g_cols = first ? first->g.matrix.cols : 0;
  const int64_t x_cols = second ? (second->dx ? second->dx : second->x)->matrix.cols : 0;
  const int64_t threads = thread_count(count * (g_cols * (vk + zk) + 2 * x_cols * uk), (count + 7) / 8);
  if (count <= kFewRows) return backward_few(table, threads, count, first, second, g_cols, x_cols, source, middle);

  const bool need_dQ = first && !first->dQ.empty(), need_dP = second && !second->dP.empty();
  const int64_t dq_floats = need_dQ ? table.sum_floats(zk, g_cols) : 0;
  const int64_t dp_floats = need_dP ? table.sum_floats(uk, x_cols) : 0;
  const int64_t q_floats = first && first->Q ? first->Q->floats(g_cols) : 0;
  const int64_t p_floats = second && second->dx ? second->P.floats(x_cols) : 0;
  float* sums = workspace(Slot::shared, threads * (dq_floats + dp_floats));

  const int64_t block = table.backward_rows;
  split(threads, count, 8, [&](int64_t thread, int64_t begin, int64_t end) {
    float* memory = workspace(Slot::thread, block * (zk + vk + uk) + q_floats + p_floats);
    float *z = memory, *v = z + block * zk, *u = v + block * vk, *q_memory = u + block * uk;
    const Sums dq = need_dQ ? table.sums_in(sums + thread * dq_floats, zk, g_cols) : Sums{};
    const Sums dp = need_dP ? table.sums_in(sums + threads * dq_floats + thread * dp_floats, uk, x_cols) : Sums{};
    const Panel Q = q_floats ? first->Q->pack(q_memory, 0, g_cols) : Panel{};
    const Panel P = p_floats ? second->P.pack(q_memory + q_floats, 0, x_cols) : Panel{};
    blocks(begin, end, block, [&](int64_t row, int64_t rows) {
      const bool accumulate = row > begin;
      if (first) {
        if (need_dQ) source(row, rows, z);
        table.shrink_outer(first->g.from(row), rows, Q, vk, first->Q ? v : nullptr, z, zk, dq, accumulate);
      }
      middle(row, rows, first && first->Q ? v : nullptr, second ? u : nullptr);
      if (!second) return;
      Matrix x, dx;
      if (second->x) x = second->x->from(row);
      if (second->dx) dx = second->dx->from(row);
      table.expand_outer(u, P, uk, second->dx ? &dx : nullptr, second->x ? &x : nullptr, rows, dp, accumulate,
                         second->drop, row);
    });
  });
  // the second stage: threads' sums in the order of their rows
  auto reduce = [&](const std::vector<Factor>& targets, float* from, int64_t distance, int64_t k, int64_t cols) {
    const Sums of_first = table.sums_in(from, k, cols);
    split(thread_count(threads * distance * 8, cols / 64), cols, 64, [&](int64_t, int64_t begin, int64_t end) {
      store_factors(table, targets, of_first, threads, distance, begin, end);
    });
  };
  if (need_dQ) reduce(first->dQ, sums, dq_floats, zk, g_cols);
  if (need_dP) reduce(second->dP, sums + threads * dq_floats, dp_floats, uk, x_cols);
}

// ---------------------------------------------------------------------------------------------- small steps

// [rows][k] <- scale * [rows][from_k], zeros in the padding
inline void scaled(const float* from, int64_t from_stride, int64_t rows, int64_t k, float scale, float* to,
                   int64_t to_stride) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t j = 0; j < to_stride; ++j)
      to[row * to_stride + j] = j < k ? scale * from[row * from_stride + j] : 0.0f;
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
