"""Triton kernels: proved in the interpreter, by machine code and by counted bytes."""
