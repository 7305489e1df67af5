"""Benchmarks: mlec beside its peers, on the same models and inputs, in one run."""
