"""Tuning: which schedules of kernels were tried on this machine, and what is remembered of it.

The search itself belongs to the backend. Here is what it shares with the rest: how much to try and at which extents, the record of one
kernel for the report, and the memory, a directory ``$XDG_STATE_HOME/mlec/tuned`` with one small file for each kernel. The processor and
the versions of mlec and of its compiler are part of what a measurement depends on. A file is written when its kernel has been measured,
so that work which is interrupted loses one kernel. Of each kernel the last finding is kept under a name that leaves out extents and
threads as well: where a file that was tuned is compiled again, these are not known.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated

import msgspec

from mlec.artifact.trust import state_directory
from mlec.measuring.state_files import StateFiles
from mlec.processor import described

Seconds = Annotated[float, msgspec.Meta(gt=0)]


class Timing(msgspec.Struct, frozen=True):
    """One call of a kernel, at some extents of the symbolic dims.

    Attributes:
        extents: by symbol; empty where all shapes are known.
        default, chosen: seconds of one call, the least of many.
    """

    extents: dict[str, int]
    default: Seconds
    chosen: Seconds


class Finding(msgspec.Struct, frozen=True):
    """What measuring one kernel gave.

    Attributes:
        default, chosen: the texts of two schedules: of the cost model's, and of the one that is used.
        trials: schedules that were measured beside the default.
        timings: of both, one for each set of extents.
    """

    default: str
    chosen: str
    trials: Annotated[int, msgspec.Meta(ge=0)]
    timings: list[Timing]


@dataclass(frozen=True)
class TunedKernel:
    """A kernel that was tuned, for the report.

    Attributes:
        symbol: of the first call that the kernel serves.
        op: the IR op.
        location: in the source of the model.
        finding: what is known of it.
        remembered: the finding comes from the memory.
    """

    symbol: str
    op: str
    location: str
    finding: Finding
    remembered: bool


class Memory(StateFiles[Finding]):
    """Findings by the text of what they depend on.

    Args:
        folder: where the files lie; None remembers nothing. By default below the user's state directory.
    """

    def __init__(self, folder: Path | None) -> None:
        super().__init__(folder, Finding)

    @staticmethod
    def of_user() -> Memory:
        state = state_directory()
        return Memory(None if state is None else state / "tuned")


@dataclass(frozen=True)
class Tuning:
    """What to try.

    Attributes:
        trials: schedules of each distinct kernel to measure beside the default. With 0 nothing is measured: what was found last of a
            kernel counts, at whichever extents and by however many threads.
        extents: of the symbolic dims to measure at, one mapping for each measurement.
        num_threads: of one call.
        memory: of earlier measurements.
        seed: decides, with the kernel, which schedules are tried.
    """

    trials: int
    extents: tuple[Mapping[str, int], ...] = ({},)
    num_threads: int = 1
    memory: Memory = field(default_factory=Memory.of_user)
    seed: int = 0


@cache
def this_installation() -> str:
    """The processor as the system names it, how many there are, and the version of mlec."""
    told = dict.fromkeys(described("model name", "stepping", "CPU part"))
    version = sys.modules["mlec"].__version__  # the package that this module is part of is imported by then
    return f"mlec {version}, {os.cpu_count()} x {platform.machine()} {' '.join(told)}"
