// What the torch bindings share: tensors to pointers and strides, the launch, and the way out for what no kernel takes.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <string>
#include <type_traits>

#include "../row_stride.h"
#include "types.h"

namespace lowrank {

using at::Tensor;
using std::optional;
using Tensors2 = std::tuple<Tensor, Tensor>;
using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;
using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The kernels compiled for a device's compute capability, torch's current stream, and cudaGetErrorString.
const KernelTable& kernels_for(int device);
void* current_stream(int device);
const char* error_text(int error);

// Put the kernels behind the ops, for the key of `library`.
void register_adds(torch::Library& library);
void register_routed(torch::Library& library);

// Sizes the workspace, takes it from torch's caching allocator, launches. `forward` is known to need none.
template <class Args>
void launch(size_t (*KernelTable::*plan)(const Args&, void*, void*, int*), const Args& args, const Tensor& like) {
  const int device = like.device().index();
  const KernelTable& table = kernels_for(device);
  int error = 0;
  Tensor workspace;
  void* base = reinterpret_cast<void*>(uintptr_t(256));  // not null, never read: this plan needs no workspace
  if constexpr (!std::is_same_v<Args, ForwardArgs>) {
    if (const auto bytes = static_cast<int64_t>((table.*plan)(args, nullptr, nullptr, &error))) {
      workspace = at::empty({bytes}, like.options().dtype(at::kByte));
      base = workspace.mutable_data_ptr();
    }
  }
  (table.*plan)(args, base, current_stream(device), &error);
  TORCH_CHECK(error == 0, "lowrank_fast: CUDA launch failed: ", error_text(error));
}

// The Python fallback of an op, which ops.py registers for every backend: it is looked up under the key of a backend
// that has no kernels of its own, so that the dispatcher does not come back here.
template <class Result, class... Args>
Result fallback(const char* op, Args... args) {  // the types of the schema, spelled out by the caller
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow((std::string("lowrank_fast::") + op).c_str(), "");
  return handle.typed<Result(Args...)>().redispatch(c10::DispatchKeySet(c10::DispatchKey::PrivateUse3), args...);
}

// ------------------------------------------------------------------------------------------------ checks

// Only what a kernel would otherwise read or write out of bounds; functional.py explains arguments to users.

inline std::string described(const Tensor& t) {
  if (!t.defined()) return "nothing";
  return c10::str(t.sizes(), " ", t.scalar_type(), " on ", t.device());
}
// `rows` [.., width] has the tokens of `like`.
inline void check_rows(const char* name, const Tensor& rows, const Tensor& like, int64_t width, at::ScalarType type) {
  const int64_t tokens = like.numel() / like.size(-1);
  TORCH_CHECK(rows.defined() && rows.dim() && rows.size(-1) == width && rows.numel() == tokens * width &&
                  rows.scalar_type() == type && rows.device() == like.device(),
              "lowrank_fast: ", name, " must be ", tokens, " rows of ", width, " ", type, " on ", like.device(),
              "; got ", described(rows));
}
// A parameter: of the dtype of the activations, or float32.
inline void check_factor(const char* name, const Tensor& f, at::IntArrayRef sizes, const Tensor& like,
                         at::ScalarType type) {
  TORCH_CHECK(f.defined() && f.sizes() == sizes && (f.scalar_type() == type || f.scalar_type() == at::kFloat) &&
                  f.device() == like.device(),
              "lowrank_fast: ", name, " must be ", sizes, " ", type, " or Float on ", like.device(), "; got ",
              described(f));
}
// Elements that are read one after the other.
inline void check_flat(const char* name, const Tensor& t, int64_t count, at::ScalarType type, const Tensor& like) {
  TORCH_CHECK(t.defined() && t.numel() == count && t.scalar_type() == type && t.device() == like.device(),
              "lowrank_fast: ", name, " must be ", count, " elements of ", type, " on ", like.device(), "; got ",
              described(t));
}

// ------------------------------------------------------------------------------------------------ arguments

inline bool takes(at::ScalarType type) { return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf; }
inline int32_t code(at::ScalarType type) { return type == at::kFloat ? kF32 : type == at::kBFloat16 ? kBf16 : kF16; }

// The rows of an activation tensor [.., d] that is read, absent where it is undefined or empty: its own memory (no view
// is made of it), or a copy, kept as long as this lives, where no row stride fits.
class RowsRead {
 public:
  explicit RowsRead(const Tensor& x) {
    if (!x.defined() || !x.numel()) return;
    int64_t stride;
    const bool direct = single_row_stride(x, stride);
    if (!direct) copy_ = x.contiguous();
    rows_ = {const_cast<void*>((direct ? x : copy_).const_data_ptr()), direct ? stride : x.size(-1)};
  }
  const Rows& rows() const { return rows_; }

 private:
  Tensor copy_;
  Rows rows_ = {};
};

enum Kind { kDown, kUp, kBank };  // A [r, n]; B [n, r] (or R [E, n]: element (n, E)); [E, n, r]

template <class F>
F factor_of(const Tensor& f, at::ScalarType like, Kind kind) {
  F result = {};
  result.group = 1 << 30;
  if (!f.defined() || f.numel() == 0) return result;
  result.data = f.data_ptr();
  result.wide = f.scalar_type() == at::kFloat && like != at::kFloat;
  if (kind == kBank) {
    result.rank_stride = f.stride(2);
    result.n_stride = f.stride(1);
    result.group_stride = f.stride(0);
    result.group = static_cast<int32_t>(f.size(2));
  } else {
    result.rank_stride = f.stride(kind == kDown ? 0 : 1);
    result.n_stride = f.stride(kind == kDown ? 1 : 0);
  }
  return result;
}
inline Factor factor(const Tensor& f, at::ScalarType like, Kind kind) { return factor_of<Factor>(f, like, kind); }
inline MutableFactor target(const Tensor& f, at::ScalarType like, Kind kind) {
  return factor_of<MutableFactor>(f, like, kind);
}

inline Dropout dropout_of(double p, const optional<Tensor>& seed, const Tensor& like) {
  if (p == 0.0 || !seed) return {};
  check_flat("seed", *seed, 2, at::kLong, like);
  const double threshold = p * 4294967296.0;
  return {static_cast<const int64_t*>(seed->data_ptr()),
          threshold >= 4294967295.0 ? 4294967295u : static_cast<uint32_t>(threshold),
          static_cast<float>(1.0 / (1.0 - p))};
}

inline Tensor hidden_like(const Tensor& x, int64_t width) {
  auto shape = x.sizes().vec();
  shape.back() = width;
  return at::empty(shape, x.options().dtype(at::kFloat));
}
inline Tensor fp32_rows(const Tensor& t) { return t.to(at::kFloat).contiguous(); }
inline float* floats(const Tensor& t) { return t.defined() && t.numel() ? static_cast<float*>(t.data_ptr()) : nullptr; }
inline const bool* flags(const Tensor& t) {
  return t.defined() && t.numel() ? static_cast<const bool*>(t.data_ptr()) : nullptr;
}

// What an op returns in the place of a result that was not asked for: [0], made without the dispatcher, which an empty
// tensor on the device would take half of the way to a launch.
inline Tensor none(const Tensor& like, at::ScalarType type) {
  c10::Storage nothing(c10::Storage::use_byte_size_t(), 0, c10::DataPtr(nullptr, like.device()), nullptr, false);
  const c10::DispatchKeySet key(c10::computeDispatchKey(type, c10::kStrided, like.device()));
  return Tensor(c10::make_intrusive<c10::TensorImpl>(std::move(nothing), key, c10::scalarTypeToTypeMeta(type)));
}
inline Tensor none(const Tensor& like) { return none(like, like.scalar_type()); }

// Whether the kernels take a call: float32, bfloat16 or float16, `rank` (of the widest factor) within the templates, no
// empty dimension. Everything else is the fallback's.
inline bool fits(at::ScalarType type, int64_t tokens, std::initializer_list<int64_t> dims, int64_t rank) {
  for (int64_t d : dims)
    if (d <= 0 || d >= (int64_t(1) << 31)) return false;
  return takes(type) && tokens > 0 && rank > 0 && rank <= kMaxRank;
}

// The rows of a tensor [.., d] that is written: its own memory, or where no row stride fits, rows that `finish` copies.
class RowsWritten {
 public:
  explicit RowsWritten(const Tensor& out) : out_(out) {
    int64_t stride;
    const bool direct = single_row_stride(out, stride);
    if (!direct) copy_ = at::empty(out.sizes(), out.options());
    rows_ = {(direct ? out : copy_).mutable_data_ptr(), direct ? stride : out.size(-1)};
  }
  const Rows& rows() const { return rows_; }
  void finish() const {
    if (copy_.defined()) out_.copy_(copy_);
  }

 private:
  const Tensor& out_;
  Tensor copy_;
  Rows rows_;
};

}  // namespace lowrank
