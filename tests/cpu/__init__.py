"""What only the C++ CPU kernels must do."""
