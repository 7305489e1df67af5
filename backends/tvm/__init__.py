"""The TVM backend: Relax for the call sequence, templates of our own for the kernels."""
