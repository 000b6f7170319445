// Functions of the module `lowrank_fast._C` that stand in for public ones in eager mode.
#pragma once

#include <Python.h>

namespace lowrank {

void add_eager_functions(PyObject* module);

}  // namespace lowrank
