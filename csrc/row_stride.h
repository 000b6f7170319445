// What the bindings of all devices ask of an activation tensor.
#pragma once

#include <ATen/core/Tensor.h>

namespace lowrank {

// Whether one stride leads from each row [.., d] of `x` (dim >= 1) to the next, with unit stride within a row; then
// `stride` is that one, in elements.
inline bool single_row_stride(const at::Tensor& x, int64_t& stride) {
  const int64_t last = x.dim() - 1;
  if (x.size(last) > 1 && x.stride(last) != 1) return false;
  stride = x.size(last);
  bool first = true;
  int64_t expected = 0;
  for (int64_t i = last - 1; i >= 0; --i) {
    if (x.size(i) == 1) continue;
    if (first) {
      stride = x.stride(i);
      first = false;
    } else if (x.stride(i) != expected) {
      return false;
    }
    expected = x.stride(i) * x.size(i);
  }
  return true;
}

}  // namespace lowrank
