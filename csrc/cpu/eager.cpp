// The public `residual_add` in eager mode on plain CPU tensors: the checks, the kernel and autograd's node without
// Python in between, which for one token takes longer than the kernel. Whatever is not plain (a wrong argument, another
// device, a tensor subclass, a mode that wants to see the call) is left to `lowrank_fast/functional.py`, which computes
// the same by the same ops and has the sentences for errors.
//
// One translation unit for every autograd node: the headers of torch's autograd take a compiler longer than the rest.
#include "eager.h"

#include <torch/csrc/Exceptions.h>

#include "autograd.h"
#include "checks.h"
#include "frozen_impl.h"
#include "mixing_impl.h"

namespace lowrank {
namespace {

std::tuple<Tensor, Tensor> forward_op(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B, double scale,
                                      bool save_t) {
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double,
                                               double, const MaybeTensor&, bool);
  static const auto op = find_op<Signature>("lowrank_fast::residual_add");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(y, x, A, B, scale, 0.0, std::nullopt, save_t);
}

// `out` may be y itself.
void forward_into(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B, double scale, Tensor out) {
  using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, double,
                           const MaybeTensor&, bool, Tensor&);
  static const auto op = find_op<Signature>("lowrank_fast::residual_add_out");
  const at::AutoDispatchBelowADInplaceOrView guard;
  op.call(y, x, A, B, scale, 0.0, std::nullopt, false, out);
}

std::tuple<Tensor, Tensor, Tensor> backward_op(const Tensor& g, const MaybeTensor& x, const Tensor& t, const Tensor& A,
                                               const Tensor& B, double scale, bool dx, bool dA, bool dB) {
  using Signature =
      std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const MaybeTensor&, const Tensor&, const Tensor&, const Tensor&,
                                         double, double, const MaybeTensor&, bool, bool, bool);
  static const auto op = find_op<Signature>("lowrank_fast::residual_add_backward");
  return op.call(g, x, t, A, B, scale, 0.0, std::nullopt, dx, dA, dB);
}

struct ResidualAdd : torch::autograd::Function<ResidualAdd> {
  static constexpr bool is_traceable = true;  // the backward is one op: compiled autograd may trace it

  static Tensor forward(AutogradContext* context, const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B,
                        double scale) {
    const bool need_A = A.requires_grad(), need_B = B.requires_grad();
    auto [out, t] = forward_op(y, x, A, B, scale, need_B);
    context->save_for_backward({need_A ? x : Tensor(), need_B ? t : Tensor(), A, B});
    context->saved_data["scale"] = scale;
    return out;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const Tensor& g = gradients[0];
    const bool need_x = context->needs_input_grad(1), need_A = context->needs_input_grad(2),
               need_B = context->needs_input_grad(3);
    variable_list found(5);
    if (context->needs_input_grad(0)) found[0] = g;
    if (!need_x && !need_A && !need_B) return found;
    const variable_list saved = context->get_saved_variables();
    const Tensor &x = saved[0], &t = saved[1], &A = saved[2], &B = saved[3];
    {
      const at::AutoGradMode off(false);
      auto [dx, dA, dB] = backward_op(g, x.defined() ? MaybeTensor(x) : std::nullopt, need_B ? t : B, A, B,
                                      context->saved_data["scale"].toDouble(), need_x, need_A, need_B);
      if (need_x) found[1] = dx;
      if (need_A) found[2] = dA;
      if (need_B) found[3] = dB;
    }
    return differentiable_once("residual_add", found, g);
  }
};

// Whether two contiguous tensors have no byte in common.
bool apart(const Tensor& a, const Tensor& b) {
  const auto *from = static_cast<const char*>(a.const_data_ptr()),
             *other = static_cast<const char*>(b.const_data_ptr());
  return from + a.nbytes() <= other || other + b.nbytes() <= from;
}

// The usual case of what `checks.inplace` and `checks.out_buffer` allow.
bool overwritable(const Tensor& out, const Tensor& y, std::initializer_list<const Tensor*> read) {
  if (out.requires_grad() || out.is_neg() || (out.is_inference() && !c10::InferenceMode::is_enabled()) ||
      out.sizes() != y.sizes() || out.scalar_type() != y.scalar_type() || !out.is_cpu() || !out.is_contiguous() ||
      !y.is_contiguous() || !(out.const_data_ptr() == y.const_data_ptr() || apart(out, y)))
    return false;
  for (const Tensor* input : read)
    if (!input->is_contiguous() || !apart(out, *input)) return false;
  return true;
}

PyObject* residual_add(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 7 || !PyFloat_CheckExact(arguments[4]) || !PyBool_Check(arguments[5]) || !plain(arguments, 4))
    Py_RETURN_NONE;
  const Tensor &y = THPVariable_Unpack(arguments[0]), &x = THPVariable_Unpack(arguments[1]),
               &A = THPVariable_Unpack(arguments[2]), &B = THPVariable_Unpack(arguments[3]);
  if (!is_update(y, x, A, B)) Py_RETURN_NONE;
  const double scale = PyFloat_AS_DOUBLE(arguments[4]);
  const bool inplace = arguments[5] == Py_True;
  const bool recorded =
      at::GradMode::is_enabled() && (y.requires_grad() || x.requires_grad() || A.requires_grad() || B.requires_grad());
  if (inplace || arguments[6] != Py_None) {
    PyObject* written = inplace ? arguments[0] : arguments[6];
    if (recorded || (inplace && arguments[6] != Py_None) || !THPVariable_CheckExact(written)) Py_RETURN_NONE;
    const Tensor& into = THPVariable_Unpack(written);
    if (!overwritable(into, y, {&x, &A, &B})) Py_RETURN_NONE;
    {
      const pybind11::gil_scoped_release release;
      forward_into(y, x, A, B, scale, into);
    }
    if (!into.is_inference()) into.unsafeGetTensorImpl()->bump_version();
    Py_INCREF(written);
    return written;
  }
  Tensor out;
  {
    const pybind11::gil_scoped_release release;
    out = recorded ? ResidualAdd::apply(y, x, A, B, scale) : std::get<0>(forward_op(y, x, A, B, scale, false));
  }
  return THPVariable_Wrap(std::move(out));
  END_HANDLE_TH_ERRORS
}

template <class F>
PyMethodDef fastcall(const char* name, F function, const char* text) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, text};
}

// METH_FASTCALL, each None where the call is not plain.
PyMethodDef methods[] = {
    fastcall("residual_add", residual_add,
             "residual_add(y, x, A, B, scale, inplace, out): the result, or None where this is not a plain call."),
    fastcall("shrink_rows", shrink_rows,
             "shrink_rows(x, *blocks): t and the alias of x, or None where this is not a plain call."),
    fastcall("frozen_linear", frozen_linear,
             "frozen_linear(x, hidden, up, weight, bias, scale): y and the alias of x, or None where this is not a "
             "plain call."),
    fastcall("mixed_bank", mixed_bank,
             "mixed_bank(t, R, B, mask): the mixed bank, or None where this is not a plain call."),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_eager_functions(PyObject* module) {
  if (PyModule_AddFunctions(module, methods) < 0) throw pybind11::error_already_set();
}

}  // namespace lowrank
