// What launch plans are made of: the workspace, and each kernel with its tiles and its grid. Plans (residual_plan.cuh,
// routed_plan.cuh) say which run for an operation. Host code, compiled with the kernels for each architecture and for
// the CPU harness, which so tests the same sequences that a GPU runs.
#pragma once
#include <atomic>

#include "column_pass.cuh"
#include "reduce.cuh"
#include "residual_add.cuh"
#include "routed_projection.cuh"

namespace lowrank {
namespace LOWRANK_ARCH {

// Carves the workspace and launches. Without a base address it only adds up sizes (and hands out addresses nobody
// reads).
class Context {
 public:
  Context(void* base, void* stream) : base_(static_cast<char*>(base)), stream_(stream) {}
  bool dry() const { return !base_; }

  template <class T>
  T* take(int64_t count) {
    size_t bytes = count * sizeof(T), at = used_;
    used_ += (bytes + 255) / 256 * 256;
    if (dry()) return reinterpret_cast<T*>(uintptr_t(256));
#if !SIMT_GPU
    simt::workspace(base_ + at, bytes);
#endif
    return reinterpret_cast<T*>(base_ + at);
  }
  template <class Params>
  void run(void (*kernel)(Params), const Launch& l, const Params& params) {
    if (!dry() && !error_) error_ = launch(kernel, l, stream_, params);
  }
  size_t finish(int* error) const {
    if (error) *error = error_;
    return used_;
  }

 private:
  char* base_;
  void* stream_;
  size_t used_ = 0;
  int error_ = 0;
};

#if !SIMT_GPU
// What a host build takes the device to be. Few processors, so that small test shapes reach every grid form.
inline int host_processors = 4;
inline size_t host_shared_limit = simt::kSharedLimit;
#endif

// Whether the kernels of thread block clusters are compiled, and whether they run (the harness runs both forms).
#if !SIMT_GPU
constexpr bool has_clusters = true;
inline bool use_clusters = false;
#elif defined(LOWRANK_CLUSTERS)
constexpr bool has_clusters = true, use_clusters = true;
#else
constexpr bool has_clusters = false, use_clusters = false;
#endif
constexpr int kMaxCluster = 8;  // blocks, on every GPU that has clusters

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#if SIMT_GPU
// An attribute of the current device, asked of the driver once: every call makes a plan. 0: unknown.
template <cudaDeviceAttr attribute>
int device_attribute() {
  static std::atomic<int> known[64];
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (device < 64 && (value = known[device].load(std::memory_order_relaxed)) != 0) return value;
  if (cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) return 0;
  if (device < 64) known[device].store(value, std::memory_order_relaxed);
  return value;
}
#endif

inline int processors() {
#if SIMT_GPU
  const int count = device_attribute<cudaDevAttrMultiProcessorCount>();
  return count > 0 ? count : 1;
#else
  return host_processors;
#endif
}

// Dynamic shared memory that a block may have on this device.
inline size_t shared_limit() {
#if SIMT_GPU
  return static_cast<size_t>(device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>());
#else
  return host_shared_limit;
#endif
}

// Calls f(E{}) / f(integral constant R) for the run-time dtype and rank. LOWRANK_SMALL_BUILD (mutation tests, quick
// looks at machine code) leaves out all but bfloat16 and rank <= 16.
template <class F>
void with_element(int dtype, F f) {
#ifndef LOWRANK_SMALL_BUILD
  if (dtype == kF32) f(float{});
  if (dtype == kF16) f(F16{});
#endif
  if (dtype == kBf16) f(Bf16{});
}
template <int value_>
struct Int {
  static constexpr int value = value_;
};
template <class F>
void with_rank(int rank, F f) {
#ifdef LOWRANK_SMALL_BUILD
  f(Int<16>{});
  (void)rank;
#else
  if (rank <= 16) {
    f(Int<16>{});
  } else if (rank <= 32) {
    f(Int<32>{});
  } else if (rank <= 64) {
    f(Int<64>{});
  } else {
    f(Int<128>{});
  }
#endif
}

// ------------------------------------------------------------------------------------------------ memory access

inline bool aligned(const void* p, int64_t stride_bytes) {
  return (reinterpret_cast<uintptr_t>(p) | stride_bytes) % 16 == 0;
}

template <class E>
int vectors(const Rows& rows) {
  return aligned(rows.data, rows.stride * static_cast<int64_t>(sizeof(E)));
}

template <class E>
Factor narrowed(Factor f) {  // float32 activations: a float32 factor has their dtype
  if (sizeof(E) == 4) f.wide = 0;
  return f;
}

// FactorAccess for tiles whose rows run along the rank (expand's B) or along n (shrink's A).
template <class E>
int factor_access(const Factor& f, int rank, bool along_rank) {
  const int64_t inner = along_rank ? f.rank_stride : f.n_stride, outer = along_rank ? f.n_stride : f.rank_stride;
  if (inner != 1) return outer == 1 ? kAcrossTile : kAlongTile;
  const int64_t size = f.wide ? 4 : sizeof(E), chunk = 16 / size;
  const bool grouped = f.group < rank;
  const bool whole = !along_rank || !grouped || f.group % chunk == 0;
  if (!whole || !aligned(f.data, outer * size) || (grouped && f.group_stride * size % 16)) return kAlongTile;
  return f.wide ? kConvert : kAsync;
}

// ------------------------------------------------------------------------------------------------ row kernel

template <class E, int R>
constexpr int large_block_m() {
  return R <= 32 ? 64 : R == 128 && sizeof(E) == 4 ? 16 : 32;
}

// Fills the tiling fields of `p` and launches it over `segments` segments. Large T: one block per 16..64 rows, all
// columns. Fewer row blocks than processors: 16 rows, and the columns of out are divided too.
template <class E>
void run_rows(Context& c, RowParams p, int64_t segments, const char* name) {
  p.A = narrowed<E>(p.A);
  p.A_upper = narrowed<E>(p.A_upper);
  p.B = narrowed<E>(p.B);
  if (p.x) {
    p.A_access = factor_access<E>(p.A, p.rank, false);
    if (segments > 1 && p.A_segment_stride * (p.A.wide ? 4 : sizeof(E)) % 16) p.A_access = kAlongTile;
    if (p.A_split < p.rank && factor_access<E>(p.A_upper, p.rank, false) != p.A_access) p.A_access = kAlongTile;
    p.x_vec = vectors<E>({const_cast<void*>(p.x), p.x_stride});
  }
  if (p.out) {
    p.B_access = factor_access<E>(p.B, p.rank, true);
    if (segments > 1 && p.B_segment_stride * (p.B.wide ? 4 : sizeof(E)) % 16) p.B_access = kAlongTile;
    p.y_vec = vectors<E>({const_cast<void*>(p.y), p.y_stride});
    p.out_vec = vectors<E>({p.out, p.out_stride});
  }
  with_rank(p.rank, [&](auto r) {
    constexpr int R = decltype(r)::value, large = large_block_m<E, R>();
    const int tiles = static_cast<int>(ceil_div(p.d_out, RowTuning<E, R, 16>::block_n)), sm = processors();
    const bool small = ceil_div(p.segment_rows, large) * segments < sm;
    const int64_t blocks = ceil_div(p.segment_rows, small ? 16 : large);
    int64_t splits = p.out && blocks * segments < sm ? sm / (blocks * segments) : 1;
    splits = splits > tiles ? (tiles ? tiles : 1) : splits;
    p.column_tiles = static_cast<int>(ceil_div(tiles, splits));
    Launch l{static_cast<int>(blocks),
             static_cast<int>(p.out ? ceil_div(tiles, p.column_tiles ? p.column_tiles : 1) : 1),
             static_cast<int>(segments),
             128,
             1,
             0,
             name};
    if (l.grid_y == 0) l.grid_y = 1;
    if (small || large == 16) {
      l.shared_bytes = RowTuning<E, R, 16>::shared_bytes;
      c.run(row_kernel<E, R, 16>, l, p);
    } else {
      l.shared_bytes = RowTuning<E, R, large>::shared_bytes;
      c.run(row_kernel<E, R, large>, l, p);
    }
  });
}

inline void set_x(RowParams& p, const Rows& x, int d_in, const Factor& A) {
  p.x = x.data;
  p.x_stride = x.stride;
  p.d_in = d_in;
  p.A = p.A_upper = A;
}
inline void set_out(RowParams& p, const Rows& y, const Rows& out, int d_out, const Factor& B) {
  p.y = y.data;
  p.y_stride = y.stride;
  p.out = out.data;
  p.out_stride = out.stride;
  p.d_out = d_out;
  p.B = B;
}
inline RowParams row_params(int64_t segment_rows, int rank) {
  RowParams p = {};
  p.segment_rows = segment_rows;
  p.rank = p.t_rank = p.A_split = rank;
  p.t_scale = p.scale = 1.0f;
  return p;
}

// ------------------------------------------------------------------------------------------------ sums

template <class E>
void run_sum(Context& c, SumParams p) {
  if (sizeof(E) == 4) p.target.wide = p.upper.wide = 1;
  Launch l{static_cast<int>(ceil_div(p.elements, 256)), p.outputs, 1, 256, 1, 0, "sum"};
  c.run(sum_kernel<E>, l, p);
}

inline SumParams sum_to(float* sums, const float* partials, int64_t elements, int outputs, int count, float scale) {
  SumParams p = {};
  p.partials = partials;
  p.elements = elements;
  p.outputs = outputs;
  p.count = count;
  p.scale = scale;
  p.sums = sums;
  return p;
}
inline SumParams sum_into(const MutableFactor& target, const float* partials, int64_t n, int rank, int count,
                          float scale) {
  SumParams p = sum_to(nullptr, partials, n * rank, 1, count, scale);
  p.target = p.upper = target;
  p.rank = p.split = rank;
  return p;
}

// ------------------------------------------------------------------------------------------------ column kernel

// Row splits of the column kernel: about 256 blocks in all, by the shape alone, so that sums have the same order
// everywhere.
template <class E, int R, int mode>
int row_splits(int64_t segment_rows, int cols, int64_t segments) {
  int64_t blocks = ceil_div(cols, ColumnTuning<E, R, mode>::block_n) * (segments > 0 ? segments : 1);
  int64_t splits = 256 / (blocks > 0 ? blocks : 1), most = ceil_div(segment_rows, 128);
  splits = splits > most ? most : splits;
  return static_cast<int>(splits < 1 ? 1 : splits > 64 ? 64 : splits);
}

struct Partials {
  float* grad;  // [segments * splits, cols, rank]
  float* rows;  // [slices, T, rank], or in clusters [clusters, T, rank]
  int splits, slices;
};

// Launches a column pass; its partials stay in the workspace, or go to `u` [T, rank] where there is only one.
template <class E, int mode>
Partials run_columns(Context& c, ColumnParams p, int64_t segments, bool need_grad, float* u, const char* name) {
  Partials result = {};
  p.W = narrowed<E>(p.W);
  p.W_upper = narrowed<E>(p.W_upper);
  p.W_access = factor_access<E>(p.W, p.rank, true);
  if (p.W_split < p.rank) p.W_access = kAlongTile;  // a 16-byte chunk could straddle the two factors
  if (segments > 1 && p.W_segment_stride * (p.W.wide ? 4 : sizeof(E)) % 16) p.W_access = kAlongTile;
  p.x_vec = vectors<E>({const_cast<void*>(p.x), p.x_stride});
  p.out_vec = vectors<E>({p.out, p.out_stride});
  p.tokens = p.segment_rows * segments;
  with_rank(p.rank, [&](auto r) {
    constexpr int R = decltype(r)::value;
    using C = ColumnTuning<E, R, mode>;
    const int slices = static_cast<int>(ceil_div(p.cols, C::block_n));
    result.slices = mode == kClusterRows ? static_cast<int>(ceil_div(slices, kMaxCluster)) : slices;
    p.blocks = static_cast<int>(ceil_div(slices, result.slices));
    result.splits = row_splits<E, R, mode>(p.segment_rows, p.cols, segments);
    if (need_grad) p.grad = result.grad = c.take<float>(segments * result.splits * p.cols * p.rank);
    if (u)
      p.row_sums = result.rows = result.slices == 1 ? u : c.take<float>(int64_t(result.slices) * p.tokens * p.rank);
    p.split_rows = ceil_div(ceil_div(p.segment_rows, result.splits), C::block_m) * C::block_m;
    Launch l{result.slices * p.blocks, result.splits, static_cast<int>(segments), C::threads, p.blocks,
             C::shared_bytes,          name};
    c.run(column_kernel<E, R, mode>, l, p);
  });
  return result;
}

inline ColumnParams column_params(int64_t segment_rows, const Rows& x, int cols, const float* z, int rank) {
  ColumnParams p = {};
  p.segment_rows = segment_rows;
  p.x = x.data;
  p.x_stride = x.stride;
  p.cols = cols;
  p.z = z;
  p.rank = p.z_rank = p.W_split = rank;
  p.scale = 1.0f;
  return p;
}

// Whether the gradient pass of this rank runs in clusters: not, for one, on sm_120, whose blocks have 99 KiB.
template <class E>
bool in_clusters(int rank) {
  bool fits = false;
  if constexpr (has_clusters)
    with_rank(rank, [&](auto r) {
      fits = use_clusters && ColumnTuning<E, decltype(r)::value, kClusterRows>::shared_bytes <= shared_limit();
    });
  return fits;
}

// u [T, rank] = scale * g W, and the partial sums of g^T Z in `grad`, whichever are wanted: one read of g for both
// where that pays, in clusters always.
template <class E>
Partials gradient_pass(Context& c, ColumnParams p, int64_t segments, float scale, float* u, bool need_grad) {
  const bool clusters = u && need_grad && in_clusters<E>(p.rank);
  const bool fused = clusters || (u && need_grad && p.rank <= 32);
  if (u && !fused) {
    RowParams row = row_params(p.segment_rows, p.rank);
    set_x(row, {const_cast<void*>(p.x), p.x_stride}, p.cols, p.W);
    row.A_segment_stride = p.W_segment_stride;
    row.t_scale = scale;
    row.t_out = u;
    run_rows<E>(c, row, segments, "u");
  }
  if (!need_grad) return {};
  p.scale = scale;
  Partials partials;
  if constexpr (has_clusters)
    if (clusters) partials = run_columns<E, kClusterRows>(c, p, segments, true, u, "cluster gradient pass");
  if (!clusters) partials = run_columns<E, kRows>(c, p, segments, true, fused ? u : nullptr, "gradient pass");
  if (fused && partials.rows != u) {
    const int64_t elements = p.segment_rows * segments * p.rank;
    run_sum<E>(c, sum_to(u, partials.rows, elements, 1, partials.slices, 1.0f));
  }
  return partials;
}

// dx = drop(u A), dA = u^T drop(x); with a stacked factor (A_upper, u_upper) also the upper one's gradient.
template <class E>
void input_pass(Context& c, ColumnParams p, const Rows& dx, const MutableFactor& dA, const MutableFactor& dA_upper,
                const Dropout& dropout) {
  p.out = dx.data;
  p.out_stride = dx.stride;
  p.drop_x = p.drop_out = dropout;
  p.scale = dropout.seed ? dropout.keep_scale : 1.0f;
  const bool need_grad = dA.data || dA_upper.data;
  if (need_grad || p.accumulate || p.W_split < p.rank) {
    Partials partials = run_columns<E, kOut>(c, p, 1, need_grad, nullptr, "input pass");
    if (!need_grad) return;
    SumParams sum = sum_into(dA, partials.grad, p.cols, p.rank, partials.splits, p.scale);
    sum.upper = dA_upper;
    sum.split = p.W_split;
    run_sum<E>(c, sum);
  } else if (dx.data) {
    RowParams row = row_params(p.segment_rows, p.rank);
    row.t_in = p.z;
    set_out(row, {}, dx, p.cols, p.W);
    row.scale = p.scale;
    row.drop_out = dropout;
    run_rows<E>(c, row, 1, "dx");
  }
}

}  // namespace LOWRANK_ARCH
}  // namespace lowrank
