"""A search for the schedule of each kernel that is fastest on this machine.

The template says which schedules there are (`kernels.schedule`). Some of them, the first ones and a random choice of the others, race the
cost model's: all together for a short while, then the best ones each against it alone, twice. One takes its place only if it is faster
both times by more than the noise, over all extents taken together, and slower at none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from random import Random
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from mlec.backends.tvm.compat import IRModule, tvm
from mlec.backends.tvm.pipeline import compile_for_cpu
from mlec.backends.tvm.target import TargetInfo
from mlec.ir.dim import evaluate
from mlec.ir.op import Array
from mlec.ir.types import TensorType
from mlec.measuring.timing import interleaved
from mlec.measuring.tuning import Finding, Timing, TunedKernel, Tuning, this_installation
from mlec.runtime.library import use_threads
from mlec.runtime.threads import effective_cpu_count

S = TypeVar("S", bound=Hashable)

MARGIN = 0.03
"""Part of the default's time that a schedule must save to take its place."""

SLACK = 0.02
"""Part of the default's time that it may be slower by at one of several extents: less than can be measured."""

FINALISTS = 3
"""Schedules that race the default alone."""

SCREENING, FINAL = 0.02, 0.1
"""Seconds of a race, for each schedule in it and each set of extents."""

LONGEST_CALL = 0.05
"""Seconds of one call of a kernel beyond which extents are left out, unless they are the smallest."""

LARGEST_CALL = 256 << 20
"""The same, in bytes of operands and results."""

SPACE = 4096
"""Schedules of a template that are looked at."""


class Bench(Protocol[S]):
    """Where schedules of one kernel race each other."""

    @property
    def extents(self) -> Sequence[Mapping[str, int]]:
        """Of the symbolic dims, at which calls are timed; known after the first race."""
        ...

    def __call__(self, schedules: Sequence[S], seconds: float) -> Mapping[S, Sequence[float]]:
        """The least seconds of a call at each of the extents; about ``seconds`` are spent on each schedule and each of the extents."""
        ...


@dataclass(frozen=True, eq=False)
class Draft:
    """A kernel as one schedule makes it, to be measured.

    Attributes:
        function: the program; its parameters are the operands, one scalar for each of ``symbols``, the results.
        operands: types, and the elements where they are known.
        results: types.
        symbols: that no buffer's shape tells.
    """

    function: Any
    operands: tuple[tuple[TensorType, Array | None], ...]
    results: tuple[TensorType, ...]
    symbols: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Subject(Generic[S]):
    """A kernel to tune.

    Attributes:
        key: all that its speed depends on, but for the machine, the processor it is made for, and the extents.
        schedules: the default first.
        draft: makes the kernel by a schedule, under a name.
        symbol, op, location: for the report.
        typical: rows for the first operand, of a given number, where random numbers would not do.
    """

    key: str
    schedules: Iterator[S]
    draft: Callable[[S, str], Draft]
    symbol: str
    op: str
    location: str
    typical: Callable[[int], Array] | None = None


MakeBench = Callable[[Subject[Any], Callable[[int], None]], Bench[Any]]
"""Makes the bench of a kernel; it calls the function with the number of kernels that it has made."""


class Tuner:
    """Chooses schedules for the kernels of one program.

    Args:
        tuning: what to try, and what is remembered.
        target: that the kernels are made for.
        report: told a stage, what is done of it and how much there is.
        bench: makes the bench of a kernel, in place of `KernelBench`.

    Attributes:
        tuned: one entry for each distinct kernel that had a choice.
    """

    def __init__(
        self,
        tuning: Tuning,
        target: TargetInfo,
        report: Callable[[str, int, int], None],
        bench: MakeBench | None = None,
    ) -> None:
        self.tuned: list[TunedKernel] = []
        self._tuning, self._target, self._report = tuning, target, report
        self._bench: MakeBench = bench or partial(KernelBench, tuning, target)
        self._chosen: dict[str, Any] = {}

    def choose(self, subject: Subject[S]) -> S:
        """The schedule to use: the default, unless another one is known to be faster here."""
        if subject.key not in self._chosen:
            self._chosen[subject.key] = self._find(subject)
        chosen: S = self._chosen[subject.key]
        return chosen

    def _find(self, subject: Subject[S]) -> S:
        default, *others = islice(subject.schedules, 1 + SPACE)
        if not others:
            return default
        named = {repr(schedule): schedule for schedule in (default, *others)}
        trials, memory = min(self._tuning.trials, len(others)), self._tuning.memory
        extents = "; ".join(str(sorted(binding.items())) for binding in self._tuning.extents)
        threads = f"{self._tuning.num_threads} threads"
        last = "\n".join((f"{this_installation()}, tvm {tvm.__version__}", repr(self._target), subject.key))
        key = "\n".join((last, threads, extents)) if trials else last
        finding = memory.recall(key)
        remembered = finding is not None and (
            finding.default == repr(default) and finding.chosen in named and finding.trials >= trials
        )
        if not trials and not remembered:
            return default
        if finding is None or not remembered:
            rivals = sample(others, trials, Random(f"{self._tuning.seed}\n{key}"))
            stage, races = f"tune {subject.symbol}", trials + 1
            self._report(stage, 0, races)
            bench: Bench[S] = self._bench(subject, lambda made: self._report(stage, made, races))
            chosen, times = race(default, rivals, bench)
            timings = [Timing(dict(at), *pair) for at, pair in zip(bench.extents, times, strict=True)]
            finding = Finding(repr(default), repr(chosen), trials, timings)
            memory.keep(key, finding)
        if trials:
            memory.keep(last, finding)
        self.tuned.append(TunedKernel(subject.symbol, subject.op, subject.location, finding, remembered))
        return named[finding.chosen]


def sample(others: Sequence[S], count: int, random: Random) -> list[S]:
    """So many schedules: half of them the first ones, the rest any, in the order in which they stand."""
    first = (count + 1) // 2
    rest = sorted(random.sample(range(first, len(others)), count - first))
    return [*others[:first], *(others[i] for i in rest)]


def race(default: S, rivals: Sequence[S], bench: Bench[S]) -> tuple[S, list[tuple[float, float]]]:
    """The fastest schedule, and for each of the extents the least seconds of the default and of that one.

    The default wins ties, and where there are no extents: see the module for what the others must show.
    """
    screened = bench([default, *rivals], SCREENING)
    if not bench.extents:
        return default, []
    merits = {rival: _ratio(screened[default], screened[rival]) for rival in rivals}
    finalists = sorted((rival for rival in rivals if merits[rival] < 1 - MARGIN), key=lambda rival: merits[rival])
    for rival in finalists[:FINALISTS]:
        heats = [bench([default, rival], FINAL) for _ in range(2)]
        theirs, ours = ([heat[schedule] for heat in heats] for schedule in (default, rival))
        noise = max(_ratio(*pair) - 1 for pair in (theirs, theirs[::-1], ours, ours[::-1]))
        if all(
            _ratio(old, new) < 1 - max(MARGIN, noise)
            and all(b <= a * (1 + SLACK) for a, b in zip(old, new, strict=True))
            for old, new in zip(theirs, ours, strict=True)
        ):
            least = [[min(pair) for pair in zip(*times, strict=True)] for times in (theirs, ours)]
            return rival, list(zip(*least, strict=True))
    return default, [(seconds, seconds) for seconds in screened[default]]


def _ratio(old: Sequence[float], new: Sequence[float]) -> float:
    """Time after by time before: the geometric mean over the extents."""
    return math.exp(sum(math.log(b / a) for a, b in zip(old, new, strict=True)) / len(old))


class KernelBench(Generic[S]):
    """A `Bench` that makes kernels and calls them, on arrays that all of them share.

    Of the extents that the tuning names those are used that the kernel depends on, that leave no axis empty, and that are not too large;
    the smallest of these always is.

    Args:
        made: called with the number of kernels made so far.
    """

    def __init__(self, tuning: Tuning, target: TargetInfo, subject: Subject[S], made: Callable[[int], None]) -> None:
        self._subject, self._target, self._made = subject, target, made
        self._threads = tuning.num_threads
        self._kernels: dict[S, tuple[Any, Draft]] = {}
        self._arrays: dict[Hashable, Any] = {}
        self.extents: list[dict[str, int]] = []
        self._wanted = tuning.extents

    def __call__(self, schedules: Sequence[S], seconds: float) -> dict[S, list[float]]:
        use_threads(self._threads)
        self._make([schedule for schedule in schedules if schedule not in self._kernels])
        if not self.extents:
            self._choose_extents(schedules[0])
        found: dict[S, list[float]] = {schedule: [] for schedule in schedules}
        for binding in self.extents:
            actions = {str(i): self._call(schedule, binding) for i, schedule in enumerate(schedules)}
            for i, times in interleaved(actions, seconds * len(schedules), least=5, enough=10).items():
                found[schedules[int(i)]].append(min(times))
        return found

    def _make(self, schedules: Sequence[S]) -> None:
        """Makes kernels, side by side: TVM holds no lock of Python's while it compiles."""
        drafts = [self._subject.draft(schedule, "tuned") for schedule in schedules]

        def compiled(draft: Draft) -> Any:
            return compile_for_cpu(IRModule({"tuned": draft.function}), self._target.tvm_target())["tuned"]

        with ThreadPoolExecutor(effective_cpu_count()) as pool:
            for schedule, draft, function in zip(schedules, drafts, pool.map(compiled, drafts), strict=True):
                self._kernels[schedule] = function, draft
                self._made(len(self._kernels))

    def _choose_extents(self, schedule: S) -> None:
        draft = self._kernels[schedule][1]
        types = (*(t for t, _ in draft.operands), *draft.results)
        symbols = frozenset(draft.symbols).union(*(t.symbols for t in types))
        distinct = dict.fromkeys(tuple((s, binding[s]) for s in sorted(symbols)) for binding in self._wanted)
        by_size = {}
        for binding in map(dict, distinct):
            if any(evaluate(d, binding) < 1 for t in types for d in t.shape):
                continue  # a call computes nothing, or there is none: an axis less some
            by_size[sum(evaluate(t.nbytes, binding) for t in types), tuple(binding.items())] = binding
        for (size, _), binding in sorted(by_size.items()):
            if self.extents and size > LARGEST_CALL:
                break
            times = interleaved({"default": self._call(schedule, binding)}, 0, least=3, most=3)["default"]
            if self.extents and min(times) > LONGEST_CALL:
                break
            self.extents.append(binding)

    def _call(self, schedule: S, binding: Mapping[str, int]) -> Callable[[], object]:
        function, draft = self._kernels[schedule]
        operands = [self._operand(i, *operand, binding) for i, operand in enumerate(draft.operands)]
        results = [self._array(("result", i), t, binding, np.zeros) for i, t in enumerate(draft.results)]
        return partial(function, *operands, *(binding[s] for s in draft.symbols), *results)

    def _operand(self, number: int, kind: TensorType, known: Array | None, binding: Mapping[str, int]) -> Any:
        if known is not None:
            return self._arrays.setdefault(("known", id(known)), (tvm.runtime.tensor(known), known))[0]
        typical = self._subject.typical if number == 0 else None

        def fill(shape: tuple[int, ...], dtype: Any) -> Array:
            if typical is not None:
                return typical(shape[0]).astype(dtype)
            if kind.dtype.is_float:
                return np.random.default_rng(number).standard_normal(shape).astype(dtype)
            return np.zeros(shape, dtype)

        return self._array(number, kind, binding, fill)

    def _array(self, name: Hashable, kind: TensorType, binding: Mapping[str, int], fill: Callable[..., Array]) -> Any:
        shape = tuple(evaluate(d, binding) for d in kind.shape)
        key = name, shape, kind.dtype
        if key not in self._arrays:
            self._arrays[key] = tvm.runtime.tensor(fill(shape, kind.dtype.numpy))
        return self._arrays[key]
