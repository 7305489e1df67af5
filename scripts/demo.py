"""Compiles, verifies and times real models: `python3 scripts/demo.py` (options of `mlec demo` may follow)."""

import sys

import environment

if __name__ == "__main__":
    environment.run("-m", "mlec", "demo", *sys.argv[1:])
