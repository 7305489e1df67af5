"""Style, types and tests: `python3 scripts/test.py` (options of pytest may follow)."""

import sys

import environment

if __name__ == "__main__":
    environment.run("-m", "ruff", "check", ".")
    environment.run("-m", "ruff", "format", "--check", ".")
    environment.run("-m", "mypy")
    environment.run("-m", "pytest", "-q", "-n", "auto", "--maxprocesses", "4", "--dist", "loadgroup", *sys.argv[1:])
