// The autograd node of `lowrank_fast/nn/mixing.py` without Python between its small steps: the same operations in the
// same order, so the same bits. The mathematics stand there.
#pragma once

#include <ATen/ops/matmul.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/softmax.h>
#include <torch/csrc/Exceptions.h>

#include <algorithm>

#include "autograd.h"

namespace lowrank {
namespace {

using Guard = c10::impl::ExcludeDispatchKeyGuard;

// Whether B [E, d_out, r] lies in memory as [E, r, d_out], as PEFT's Lily stores it.
bool rank_major(const Tensor& B) { return B.mT().is_contiguous(); }

// [.., d_out, r] -> [.., d_out r] in the order of memory
Tensor flat(const Tensor& B, bool major) { return (major ? B.mT() : B).flatten(-2); }

// the inverse of `flat` for a bank `like`
Tensor unflat(const Tensor& flattened, const Tensor& like, bool major) {
  const int64_t d_out = like.size(-2), r = like.size(-1);
  return major ? flattened.unflatten(-1, {r, d_out}).mT() : flattened.unflatten(-1, {d_out, r});
}

struct MixedBank : torch::autograd::Function<MixedBank> {
  static Tensor forward(AutogradContext* context, const Tensor& t, const Tensor& R, const Tensor& B,
                        const MaybeTensor& mask) {
    const Guard no_autocast(c10::autocast_dispatch_keyset);
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor rows = t.reshape({-1, t.size(-1)});
    const Tensor p = at::softmax(at::matmul(rows, R.mT()), -1);
    Tensor kept, w, keep;
    if (mask.has_value()) {
      keep = mask->reshape(-1).to(t.scalar_type());
      kept = keep.sum().clamp_min(1.0);
      w = at::matmul(keep, p).div(kept);
    } else {
      kept = at::scalar_tensor(static_cast<double>(std::max<int64_t>(rows.size(0), 1)), t.options());
      w = p.sum(0).div(kept);
    }
    context->save_for_backward({t, R, B, keep, p, w, kept});  // t itself, whose version autograd compares
    const bool major = rank_major(B);
    return unflat(at::matmul(w, flat(B, major).to(t.scalar_type())), B, major);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const bool need_t = context->needs_input_grad(0), need_R = context->needs_input_grad(1),
               need_B = context->needs_input_grad(2);
    const variable_list saved = context->get_saved_variables();
    const Tensor &t = saved[0], &R = saved[1], &B = saved[2], &keep = saved[3], &p = saved[4], &w = saved[5];
    variable_list found(4);
    {
      const at::AutoGradMode off(false);
      const Guard no_autocast(c10::autocast_dispatch_keyset);
      const bool major = rank_major(B);
      const Tensor d = flat(gradients[0], major);
      if (need_B) found[2] = unflat(at::outer(w, d).to(B.scalar_type()), B, major);
      if (need_t || need_R) {
        const Tensor dp = at::matmul(flat(B, major).to(d.scalar_type()), d).div(saved[6]);
        Tensor dlogits = p.mul(dp.sub(at::matmul(p, dp).unsqueeze(1)));
        if (keep.defined()) dlogits.mul_(keep.unsqueeze(1));
        if (need_t) found[0] = at::matmul(dlogits, R).view(t.sizes());
        if (need_R) found[1] = at::matmul(dlogits.mT(), t.reshape({-1, t.size(-1)}));
      }
    }
    return differentiable_once("mixed_bank", found);
  }
};

PyObject* mixed_bank(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 4 || !plain(arguments, arguments[3] == Py_None ? 3 : 4)) Py_RETURN_NONE;
  const Tensor &t = THPVariable_Unpack(arguments[0]), &R = THPVariable_Unpack(arguments[1]),
               &B = THPVariable_Unpack(arguments[2]);
  const MaybeTensor mask = arguments[3] == Py_None ? MaybeTensor() : MaybeTensor(THPVariable_Unpack(arguments[3]));
  Tensor up;
  {
    const pybind11::gil_scoped_release release;
    up = MixedBank::apply(t, R, B, mask);
  }
  return THPVariable_Wrap(std::move(up));
  END_HANDLE_TH_ERRORS
}

}  // namespace
}  // namespace lowrank
