// The interface between the ops (which know tensors) and the block kernels (which know registers).
//
// Everything here is free of torch. Each instruction set compiles `kernels_impl.h` once and exports one `Kernels` per
// activation dtype; `dispatch.cpp` picks at run time.
//
// A *panel* is a factor laid out for the kernels: float32, k padded with zeros to a multiple of 4, columns to a
// multiple of `unit`. A [r, d] is its own panel when it is float32 and d is a multiple of `unit`; read by many rows it
// is packed like every other factor, so that a kernel walks through the panel from end to end: ranks that lie a row of
// A apart lie in pages of their own, more than the first-level TLB holds. For bfloat16 activations each unit holds its
// even columns first, then its odd ones: the order in which two shifts widen a register of bfloat16 pairs. `amx` has
// formats of its own (isa_amx.cpp).
//
// t, u, z below are float32 [rows][k] with k padded to a multiple of 4 (`pad_rank`) and zeros in the padding.
#pragma once

#include <cstdint>

namespace lowrank {

enum class Dtype : int { f32, bf16, f16 };

struct Matrix {  // [rows][cols], unit inner stride, rows `stride` elements apart
  void* data;
  int64_t stride;
  int64_t cols;
};

template <class T>
struct PanelOf {
  const T* data;              // where column 0 is or would be: a panel may hold columns [begin, end) only
  int64_t step, group, unit;  // elements from rank to rank in a group of four, from group to group, from unit to unit
};
using Panel = PanelOf<float>;
struct Sums {  // of products along the rows, float32 [k][d], as a panel is stored but in tiles of `sum_columns` columns
  float* data;
  int64_t step, group, tile;
};
template <class T>  // a parameter as it is: each rank in turn, `ld` elements apart
PanelOf<T> rows_of_ranks(const T* data, int64_t ld, int64_t unit) {
  return {data, ld, 4 * ld, unit};
}
inline Sums rows_of_sums(float* data, int64_t ld, int64_t columns) { return {data, ld, 4 * ld, columns}; }

// A parameter or its gradient: element (i, j) of the [k][d] factor is data[i * stride_k + j * stride_d].
struct Factor {
  void* data;
  Dtype dtype;
  int64_t k, d, stride_k, stride_d;
};

struct Dropout {  // Philox key and stream as in reference.dropout_mask; p = 0: none
  uint64_t key;
  uint32_t stream;
  uint32_t threshold;
  float keep_scale;  // 1 / (1 - p)
  bool on;
};

// Rows so many floats apart fall into the same sets of the first-level cache: few of them stay there together.
constexpr bool pages_apart(int64_t stride) { return stride % 1024 == 0; }

constexpr int64_t pad_rank(int64_t k) { return (k + 3) / 4 * 4; }
constexpr int kRowBlock = 64;    // rows that a kernel below takes at most per call
constexpr int kRankBlock = 64;   // ranks whose partial sums a kernel keeps at once
constexpr int kMaxLanes = 16;    // floats in the widest register
constexpr int kMaxChunk = 1024;  // columns that a kernel walks at most between two looks at the panel

struct Scratch {  // one per thread; what a call touches of it stays in the second-level cache
  alignas(64) float lanes[kRowBlock * kRankBlock * kMaxLanes];
  alignas(64) float rows[kRowBlock * kMaxChunk];
  alignas(64) float multipliers[kMaxChunk];
};
Scratch& scratch();
float* grouped_scratch(int64_t floats);  // per thread, for z in the order that `expand` reads it; any k

struct PanelFormat {
  int64_t (*floats)(int64_t k, int64_t columns);  // memory for `pack`, in floats
  // columns [begin, end) of `count` factors stacked along k, begin a multiple of `unit`
  Panel (*pack)(const Factor* stack, int64_t count, int64_t begin, int64_t end, float* memory);
  bool natural;  // float32 [k][ld] in the order of the columns: a parameter stored so needs no packing
};

struct Kernels {
  int64_t unit;                            // columns that one step of a kernel covers
  int64_t forward_rows, backward_rows;     // of a block, whose streams stay in the second-level cache
  int64_t most_rows;                       // that a kernel takes
  PanelFormat shrink_panel, expand_panel;  // of the P that `shrink` and `expand` (and their pairs) take
  int64_t sum_columns;                     // of a tile of sums
  int64_t (*sum_floats)(int64_t k, int64_t d);
  Sums (*sums_in)(float* memory, int64_t k, int64_t d);

  // the total of `count` sums, `distance` floats apart, in that order: ranks from `rank` on -> columns [begin, end) of
  // `target`
  void (*unpack)(const Sums& sums, int64_t rank, int64_t count, int64_t distance, const Factor& target, int64_t begin,
                 int64_t end);

  // t = x P^T, summed over columns [begin, end): adds to what the thread's scratch holds from [0, begin), and writes t
  // when end is the last column. More than kRankBlock ranks take all columns in one call. first_row is the absolute row
  // of x, for dropout.
  void (*shrink)(const Matrix& x, int64_t rows, Panel P, int64_t k, float* t, const Dropout& drop, int64_t first_row,
                 int64_t begin, int64_t end);
  // the same for one row, without dropout, over all columns of `count` factors stacked along k, which it reads where
  // they are, with the same bits; false: not for these factors or columns
  bool (*shrink_row)(const Matrix& x, const Factor* stack, int64_t count, float* t);
  // out = y + z P over columns [begin, end); y null: out = z P
  void (*expand)(const Matrix* y, const Matrix& out, int64_t rows, const float* z, Panel P, int64_t k, int64_t begin,
                 int64_t end, const Dropout& drop, int64_t first_row);
  // the same for one row and `count` factors stacked along k, whose ranks are next to each other in memory, without a
  // panel and with the same bits; false: not for these factors or columns
  bool (*expand_row)(const Matrix* y, const Matrix& out, const float* z, const Factor* stack, int64_t count,
                     int64_t begin, int64_t end);
  // sums (+)= z^T x over columns [begin, end)
  void (*outer)(const Matrix& x, int64_t rows, const float* z, int64_t k, const Sums& sums, bool accumulate,
                int64_t begin, int64_t end, const Dropout& drop, int64_t first_row);
  // the same for all rows of a call at once, straight into a parameter's gradient, and with the same bits; false: not
  // for this gradient
  bool (*outer_direct)(const Matrix& x, int64_t rows, const float* z, const Factor& f, int64_t begin, int64_t end);
  // shrink and outer over one read of g: u = g P^T (skipped when u is null), sums (+)= z^T g (skipped without memory)
  void (*shrink_outer)(const Matrix& g, int64_t rows, Panel P, int64_t k, float* u, const float* z, int64_t z_k,
                       const Sums& sums, bool accumulate);
  // expand and outer over one pass: dx = z P (skipped when dx is null), sums (+)= z^T x (skipped without memory)
  void (*expand_outer)(const float* z, Panel P, int64_t k, const Matrix* dx, const Matrix* x, int64_t rows,
                       const Sums& sums, bool accumulate, const Dropout& drop, int64_t first_row);
  // row-wise softmax of [rows][stride] over the first `experts` columns, in place
  void (*softmax)(float* logits, int64_t rows, int64_t experts, int64_t stride);
  // at least `count` multiply-adds on registers alone: what a kernel's arithmetic costs where nothing else does. Null
  // where the kernels multiply with more than vector registers.
  void (*multiply_add)(int64_t count);
};

}  // namespace lowrank
