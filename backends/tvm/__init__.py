"""The TVM backend: templates of our own for the kernels, a list of calls for the runtime (for GPUs: a Relax function)."""
