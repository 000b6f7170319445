// What kernels, launch plans and the torch binding share: plain structs of pointers and strides, no CUDA, no torch.
#pragma once
#include <cstddef>
#include <cstdint>

namespace lowrank {

enum DType : int32_t { kF32 = 0, kBf16 = 1, kF16 = 2 };

// A low-rank factor [rank, n]: A [r, d_in], B [d_out, r] or a bank [E, d_out, r] seen as one factor of rank E r.
//   element (k, n) = data[(k / group) * group_stride + (k % group) * rank_stride + n * n_stride]
// Strides are in elements; `group` is r for a bank and at least the rank otherwise.
struct Factor {
  const void* data;
  int64_t rank_stride, n_stride, group_stride;
  int32_t group;
  int32_t wide;  // 1: float32; 0: the dtype of the activations
};

// Inverted dropout of x: an element is kept when its Philox word is at least `threshold` (reference.dropout_mask).
struct Dropout {
  const int64_t* seed;  // [2] on the device: key, stream; null for no dropout
  uint32_t threshold;
  float keep_scale;  // 1 / (1 - p)
};

struct MutableFactor {  // a Factor that is written; data null: not asked for
  void* data;
  int64_t rank_stride, n_stride, group_stride;
  int32_t group, wide;
};

struct Rows {  // an activation tensor [T, d]: unit inner stride, `stride` elements between rows; data null: absent
  void* data;
  int64_t stride;
};

enum Routing : int32_t { kBatch = 0, kSample = 1, kToken = 2, kStatic = 3 };

// out = y + scale * t B^T with t = drop(x) A^T. x absent: t_in is read (expand_add). out absent: only t (shrink).
struct ForwardArgs {
  int64_t tokens;
  int32_t dtype, d_in, d_out, rank;
  float scale;
  Rows x, y, out;
  Factor A, B;
  const float* t_in;  // [T, rank]
  float* t_out;       // [T, rank], or null
  Dropout dropout;
};

// u = scale * g B (or dt_in), dB = scale * g^T t, dx = drop(u A), dA = u^T drop(x). What is absent is not computed.
struct BackwardArgs {
  int64_t tokens;
  int32_t dtype, d_in, d_out, rank;
  float scale;
  Rows g, x, dx;
  const float* t;      // [T, rank], for dB
  const float* dt_in;  // [T, rank]: u is given (shrink_backward)
  float* dt_out;       // [T, rank]: u is wanted (expand_add_backward), or null
  Factor A, B;
  MutableFactor dA, dB;
  Dropout dropout;
};

// Forward and backward of the routed projection; the first block is common to both.
struct RoutedArgs {
  int64_t tokens, segments;  // segments: samples for kSample, else 1
  int32_t dtype, d_in, d_out, rank, experts, routing, router_on_x;
  float scale;
  Rows x;
  Factor A, B, R;          // B: group = rank of one expert; R: element (k, expert) [r or d_in, E]
  const bool* token_mask;  // [T] or null
  Dropout dropout;
  // forward
  Rows y, out;
  const float* weights;          // kStatic: [E]
  float *t_out, *p_out, *w_out;  // [T, rank], [T, E] (not kStatic), [segments, E] (not kToken)
  // backward
  Rows g, dx;
  const float *t, *p, *w;
  const bool* active;  // [E] or null
  MutableFactor dA, dB, dR;
  float* dweights;  // kStatic: [E], or null
};

constexpr int kMaxRank = 128;  // of the widest factor in the call: rank, rank + E (router on x) or E * rank (kToken)
constexpr int kMaxSegments = 65535;

// One set per architecture. A function with a null workspace only reports its size; else it launches on `stream` and
// returns a cudaError_t (0: success). Nothing synchronises or allocates.
struct KernelTable {
  size_t (*forward)(const ForwardArgs&, void* workspace, void* stream, int* error);  // needs no workspace
  size_t (*backward)(const BackwardArgs&, void* workspace, void* stream, int* error);
  size_t (*routed_forward)(const RoutedArgs&, void* workspace, void* stream, int* error);
  size_t (*routed_backward)(const RoutedArgs&, void* workspace, void* stream, int* error);
};

}  // namespace lowrank
