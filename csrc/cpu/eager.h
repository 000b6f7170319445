// Functions of the module `lowrank_fast._C` that stand in for public ones in eager mode.
#pragma once

#include <Python.h>

namespace lowrank {

void add_eager_functions(PyObject* module);   // residual_add
void add_frozen_functions(PyObject* module);  // the nodes of lowrank_fast/nn/frozen.py
void add_mixing_functions(PyObject* module);  // and of lowrank_fast/nn/mixing.py

}  // namespace lowrank
