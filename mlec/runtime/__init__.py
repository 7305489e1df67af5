"""The thin runtime: runs compiled models with neither the compiler nor the training framework."""

from mlec.runtime.executable import Executable
from mlec.runtime.measure import BenchmarkResult, Profile
from mlec.runtime.model import CompiledModel
from mlec.runtime.program import KernelInfo, Program

__all__ = ["BenchmarkResult", "CompiledModel", "Executable", "KernelInfo", "Profile", "Program"]
