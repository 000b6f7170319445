// Functions of the module `lowrank_fast._C` that stand in for public ones in eager mode.
#pragma once

#include <Python.h>

namespace lowrank {

void add_eager_functions(PyObject* module);   // residual_add
void add_frozen_functions(PyObject* module);  // what lowrank_fast/nn/frozen.py is made of

}  // namespace lowrank
