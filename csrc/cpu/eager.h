// Functions of the module `lowrank_fast._C` that stand in for public ones in eager mode.
#pragma once

#include <Python.h>

namespace lowrank {

void add_eager_functions(PyObject* module);

// METH_FASTCALL, each None where the call is not plain: see the table in eager.cpp.
namespace eager {
PyObject* residual_add(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* shrink_rows(PyObject*, PyObject* const* arguments, Py_ssize_t count);    // frozen.cpp
PyObject* frozen_linear(PyObject*, PyObject* const* arguments, Py_ssize_t count);  // frozen.cpp
PyObject* mixed_bank(PyObject*, PyObject* const* arguments, Py_ssize_t count);     // mixing.cpp
}  // namespace eager

}  // namespace lowrank
