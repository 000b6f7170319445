// The two autograd nodes of `lowrank_fast/nn/frozen.py` without Python in between, which is slow beside the GEMM of a
// frozen layer: that leaves every cache cold. The mathematics, and why `dx` may be written in place, stand there;
// whatever is not plain is left to its functions, which compute the same by the same ops.
#pragma once

#include <ATen/ops/cat.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/object_ptr.h>

#include "autograd.h"
#include "checks.h"

namespace lowrank {
namespace {

Tensor shrink_op(const Tensor& x, const Tensor& A) {
  using Signature = Tensor(const Tensor&, const Tensor&, double, const MaybeTensor&);
  static const auto op = find_op<Signature>("lowrank_fast::shrink");
  return op.call(x, A, 0.0, std::nullopt);
}

std::tuple<Tensor, Tensor> shrink_backward_op(const Tensor& dt, const MaybeTensor& x, const Tensor& A,
                                              at::ScalarType dtype, bool dx, bool dA) {
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const MaybeTensor&, const Tensor&, double,
                                               const MaybeTensor&, at::ScalarType, bool, bool);
  static const auto op = find_op<Signature>("lowrank_fast::shrink_backward");
  return op.call(dt, x, A, 0.0, std::nullopt, dtype, dx, dA);
}

void expand_op(Tensor y, const Tensor& t, const Tensor& B, double scale) {
  using Signature = void(Tensor&, const Tensor&, const Tensor&, double);
  static const auto op = find_op<Signature>("lowrank_fast::expand_add_");
  op.call(y, t, B, scale);
}

std::tuple<Tensor, Tensor> expand_backward_op(const Tensor& g, const Tensor& t, const Tensor& B, double scale, bool dt,
                                              bool dB) {
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, double, bool, bool);
  static const auto op = find_op<Signature>("lowrank_fast::expand_add_backward");
  return op.call(g, t, B, scale, dt, dB);
}

Tensor stacked(at::TensorList blocks) { return blocks.size() == 1 ? blocks[0] : at::cat(blocks); }

struct Tap : torch::autograd::Function<Tap> {
  static variable_list forward(AutogradContext* context, const Tensor& x, at::TensorList blocks) {
    bool trained = false;
    for (const Tensor& block : blocks) trained |= block.requires_grad();
    variable_list saved{trained ? x : Tensor()};
    saved.insert(saved.end(), blocks.begin(), blocks.end());
    context->save_for_backward(std::move(saved));
    context->saved_data["dtype"] = static_cast<int64_t>(x.scalar_type());
    context->set_materialize_grads(false);
    const at::AutoDispatchBelowADInplaceOrView guard;
    return {shrink_op(x, stacked(blocks)), x};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const Tensor& dt = gradients[0];
    Tensor dx = gradients[1];
    const variable_list saved = context->get_saved_variables();
    const at::TensorList blocks = at::TensorList(saved).slice(1);
    variable_list found(saved.size());
    if (dt.defined()) {
      const at::AutoGradMode off(false);
      const Tensor& x = saved[0];
      const auto dtype = static_cast<at::ScalarType>(context->saved_data["dtype"].toInt());
      const bool need_x = context->needs_input_grad(0), apart = need_x && !dx.defined();
      bool need_A = false;
      for (size_t i = 0; i < blocks.size(); ++i) need_A |= context->needs_input_grad(i + 1);
      const Tensor A = stacked(blocks);
      if (apart || need_A) {
        auto [own, dA] = shrink_backward_op(dt, x.defined() ? MaybeTensor(x) : std::nullopt, A, dtype, apart, need_A);
        if (apart) dx = own;
        int64_t row = 0;
        for (size_t i = 0; i < blocks.size(); row += blocks[i++].size(0))
          if (context->needs_input_grad(i + 1)) found[i + 1] = dA.narrow(0, row, blocks[i].size(0));
      }
      if (need_x && !apart) expand_op(dx, dt, A.mT(), 1.0);
    }
    if (context->needs_input_grad(0)) found[0] = dx;
    return differentiable_once("shrink", found);
  }
};

struct FrozenLinear : torch::autograd::Function<FrozenLinear> {
  static variable_list forward(AutogradContext* context, const Tensor& x, const Tensor& hidden, const Tensor& up,
                               const Tensor& weight, const MaybeTensor& bias, double scale) {
    context->save_for_backward({up.requires_grad() ? hidden : Tensor(), up, weight});
    context->saved_data["scale"] = scale;
    context->set_materialize_grads(false);
    const at::AutoDispatchBelowADInplaceOrView guard;
    Tensor y = at::linear(x, weight, bias);
    expand_op(y, hidden, up, scale);
    return {y, x};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const Tensor& g = gradients[0];
    Tensor dx = gradients[1];
    const bool need_x = context->needs_input_grad(0), need_hidden = context->needs_input_grad(1),
               need_up = context->needs_input_grad(2);
    variable_list found(6);
    if (g.defined()) {
      const at::AutoGradMode off(false);
      const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
      const variable_list saved = context->get_saved_variables();
      const Tensor &up = saved[1], &weight = saved[2];
      if (need_hidden || need_up) {
        auto [d_hidden, d_up] = expand_backward_op(g, need_up ? saved[0] : up, up,
                                                   context->saved_data["scale"].toDouble(), need_hidden, need_up);
        if (need_hidden) found[1] = d_hidden;
        if (need_up) found[2] = d_up;
      }
      if (need_x) {
        const Tensor rows = g.reshape({-1, g.size(-1)});
        if (dx.defined()) {
          dx.view({-1, weight.size(1)}).addmm_(rows, weight);
        } else {
          std::vector<int64_t> sizes = g.sizes().vec();
          sizes.back() = weight.size(1);
          dx = at::mm(rows, weight).view(sizes);
        }
      }
    }
    if (need_x) found[0] = dx;
    return differentiable_once("frozen_linear", found);
  }
};

bool factor_beside(const Tensor& factor, const Tensor& x) {
  return factor.dim() == 2 && factor.numel() > 0 &&
         (factor.scalar_type() == x.scalar_type() || factor.scalar_type() == at::kFloat);
}

PyObject* pair_of(const variable_list& outputs) {
  const THPObjectPtr first(THPVariable_Wrap(outputs[0])), second(THPVariable_Wrap(outputs[1]));
  return first && second ? PyTuple_Pack(2, first.get(), second.get()) : nullptr;
}

PyObject* shrink_rows(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count < 2 || !at::GradMode::is_enabled() || !plain(arguments, count)) Py_RETURN_NONE;
  const Tensor& x = THPVariable_Unpack(arguments[0]);
  std::vector<Tensor> blocks;
  for (Py_ssize_t i = 1; i < count; ++i) blocks.push_back(THPVariable_Unpack(arguments[i]));
  if (x.dim() < 1 || !kernel_dtype(x)) Py_RETURN_NONE;
  for (const Tensor& block : blocks)
    if (!factor_beside(block, x) || block.size(1) != x.size(-1) || block.scalar_type() != blocks[0].scalar_type())
      Py_RETURN_NONE;
  variable_list outputs;
  {
    const pybind11::gil_scoped_release release;
    outputs = Tap::apply(x, at::TensorList(blocks));
  }
  return pair_of(outputs);
  END_HANDLE_TH_ERRORS
}

PyObject* frozen_linear(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 6 || !PyFloat_CheckExact(arguments[5]) || !at::GradMode::is_enabled() ||
      !plain(arguments, arguments[4] == Py_None ? 4 : 5))
    Py_RETURN_NONE;
  const Tensor &x = THPVariable_Unpack(arguments[0]), &hidden = THPVariable_Unpack(arguments[1]),
               &up = THPVariable_Unpack(arguments[2]), &weight = THPVariable_Unpack(arguments[3]);
  if (x.dim() < 1 || !kernel_dtype(x) || !factor_beside(up, x)) Py_RETURN_NONE;
  const MaybeTensor bias = arguments[4] == Py_None ? MaybeTensor() : MaybeTensor(THPVariable_Unpack(arguments[4]));
  variable_list outputs;
  {
    const pybind11::gil_scoped_release release;
    outputs = FrozenLinear::apply(x, hidden, up, weight, bias, PyFloat_AS_DOUBLE(arguments[5]));
  }
  return pair_of(outputs);
  END_HANDLE_TH_ERRORS
}

}  // namespace
}  // namespace lowrank
