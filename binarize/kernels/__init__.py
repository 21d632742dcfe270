"""1-bit kernels: C source, its compilation, the same arithmetic in plain torch, and the operators that choose."""
