// What the autograd nodes written in C++ and their Python functions share.
#pragma once

#include <Python.h>

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/python_variable.h>

#include <memory>
#include <optional>
#include <string>

namespace lowrank {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// No mode, transform or tracer between the caller and the kernels.
inline bool nothing_watches() {
  constexpr c10::DispatchKeySet usual(
      {c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutocastCPU});
  return (c10::impl::tls_local_dispatch_key_set().included_ - usual).empty() &&
         at::impl::PythonTorchFunctionTLS::stack_len() == 0;
}

// Tensors of no subclass, on one device, without a tangent (forward-mode differentiation), and nothing watches.
inline bool plain(PyObject* const* arguments, Py_ssize_t count) {
  for (Py_ssize_t i = 0; i < count; ++i)
    if (!THPVariable_CheckExact(arguments[i]) ||
        THPVariable_Unpack(arguments[i]).device() != THPVariable_Unpack(arguments[0]).device() ||
        THPVariable_Unpack(arguments[i])._fw_grad(0).defined())
      return false;
  return nothing_watches();
}

// What a backward found, which raises when it is differentiated; `handed_on`, an incoming gradient that is among it,
// stays what it is. `lowrank_fast/autograd.py` says why this is not `once_differentiable`.
inline variable_list differentiable_once(const char* name, const variable_list& found, const Tensor& handed_on = {}) {
  if (!at::GradMode::is_enabled()) return found;
  variable_list refusing;
  for (const Tensor& value : found) {
    if (!value.defined() || value.is_same(handed_on)) {
      refusing.push_back(value);
      continue;
    }
    const auto error = std::make_shared<torch::autograd::DelayedError>(
        std::string("trying to differentiate twice a function that is differentiable once: ") + name, 1);
    refusing.push_back((*error)({value.detach().requires_grad_()})[0]);
  }
  return refusing;
}

}  // namespace lowrank
