"""The search for schedules: what it may choose from, what it chooses, and what it remembers."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import make_classification
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import mlec
from mlec import processor
from mlec.backends.base import CompiledModule
from mlec.backends.tvm import tuning
from mlec.backends.tvm.backend import TVMBackend
from mlec.backends.tvm.kernels.schedule import alternating, around, variations
from mlec.backends.tvm.lowering import Lowering
from mlec.backends.tvm.target import TargetInfo
from mlec.backends.tvm.tuning import KernelBench, Subject, Tuner, race, sample
from mlec.ir import GraphBuilder, TensorType
from mlec.ir.dim import SymDim
from mlec.ir.dtype import DType
from mlec.measuring.tuning import Memory, Tuning

HOST = TargetInfo.host()


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "mlec" / "tuned"


# -- spaces ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    a: int
    b: int


def test_variations_differ_in_one_field_first_and_come_once() -> None:
    found = list(variations(Pair(1, 1), lambda p: p != Pair(2, 3), a=(1, 2, 2), b=(3, 4)))
    assert found == [Pair(1, 1), Pair(2, 1), Pair(1, 3), Pair(1, 4), Pair(2, 4)]
    assert list(alternating("ab", "1", "xyz")) == ["a", "1", "x", "b", "y", "z"]
    assert around(4, most=8) == [2, 8, 1]
    assert around(1) == [2, 4]


class SameAnswers(KernelBench):
    """A bench that calls every schedule once, and holds its results against the default's."""

    seen: Sequence[str] = ()

    def __call__(self, schedules, seconds):
        times = super().__call__(schedules, 0)
        for binding in self.extents:
            want = None
            for schedule in schedules:
                _, draft = self._kernels[schedule]
                results = [self._array(("result", i), t, binding, np.zeros) for i, t in enumerate(draft.results)]
                for array in results:
                    array.copyfrom(np.full(array.shape, 99, array.dtype))
                self._call(schedule, binding)()
                got = [array.numpy() for array in results]
                want = want or got
                for mine, theirs in zip(got, want, strict=True):
                    scale = np.abs(theirs).max(initial=1)
                    np.testing.assert_allclose(
                        mine, theirs, rtol=0, atol=2e-5 * scale, err_msg=f"{schedule} at {binding}"
                    )
        type(self).seen = [*self.seen, *map(repr, schedules)]
        return {schedule: [1.0] * len(values) for schedule, values in times.items()}


class Product(torch.nn.Module):
    def forward(self, x, y):
        return x @ y.transpose(-1, -2) + 1, x.transpose(-1, -2) @ y


def convolution(*args, relu=True, **options):
    layer = torch.nn.Conv2d(*args, **options)
    return torch.nn.Sequential(layer, torch.nn.ReLU()) if relu else layer


class Attention(torch.nn.Module):
    def forward(self, x):
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(
            heads, heads[..., 3:, :], heads[..., 3:, :], is_causal=True
        )


class Calls(torch.nn.Module):
    """A function as a module, of the first result where there are several."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        y = self.function(x)
        return y if isinstance(y, torch.Tensor) else y[0]


NETWORKS = {
    "linear": (torch.nn.Sequential(torch.nn.Linear(37, 171), torch.nn.ReLU()), (37,), "GemmSchedule"),
    "narrow linear": (torch.nn.Linear(70, 5), (70,), "GemmSchedule"),
    "pointwise": (torch.nn.Sequential(convolution(3, 48, 5), convolution(48, 48, 1)), (3, 9, 11), "ConvTile"),
    "plain pointwise": (convolution(16, 32, 1), (16, 9, 11), "MatmulSchedule"),
    "strided": (convolution(16, 96, 3, stride=2, padding=1), (16, 11, 21), "ConvTile"),
    "stem": (convolution(3, 16, 5, padding=(1, 0)), (3, 12, 17), "ConvTile"),
    "winograd": (
        torch.nn.Sequential(convolution(3, 32, 1), convolution(32, 32, 3, padding=1)),
        (3, 13, 11),
        "WinogradSchedule",
    ),
    "depthwise": (
        torch.nn.Sequential(
            convolution(3, 32, 3, padding=1), convolution(32, 32, 3, padding=1, groups=32), convolution(32, 48, 1)
        ),
        (3, 9, 25),
        "DepthwiseSchedule",
    ),
    "groups": (convolution(12, 18, 3, groups=3, relu=False), (12, 8, 23), "ConvSchedule"),
    "attention": (Attention(), (21, 38), "AttentionSchedule"),
    "lstm": (Calls(torch.nn.LSTM(7, 37, batch_first=True)), (19, 7), "RecurrentSchedule"),
    "gru": (Calls(torch.nn.GRU(7, 70, batch_first=True)), (5, 7), "RecurrentSchedule"),
    "layer norm": (torch.nn.LayerNorm(171), (3, 171), "FoldSchedule"),
    "group norm": (torch.nn.GroupNorm(3, 12), (12, 5, 7), "FoldSchedule"),
    "softmax": (torch.nn.Softmax(-1), (77,), "SoftmaxSchedule(vectors=4, kept=False)"),
    "softmax of columns": (torch.nn.Softmax(1), (9, 77), "SoftmaxSchedule(vectors=4, kept=False)"),
    "logsumexp": (Calls(lambda x: torch.logsumexp(x, 1)), (9, 77), "SoftmaxSchedule"),
    "sum along memory": (Calls(lambda x: x.mean(-1)), (3, 150), "FoldSchedule"),
    "windows of blocks": (
        torch.nn.Sequential(convolution(3, 16, 3, padding=1), torch.nn.MaxPool2d(3, 1, 1), convolution(16, 32, 3)),
        (3, 9, 13),
        "PoolSchedule(columns=8)",
    ),
    "windows": (torch.nn.AvgPool1d(3, 2, 1), (3, 150), "PoolSchedule"),
    "transpose": (Calls(lambda x: x.transpose(1, 2).contiguous()), (37, 45), "TransposeSchedule"),
    "sum across memory": (Calls(lambda x: x.amax(1) + 1), (6, 150), "FoldSchedule"),
}


@pytest.mark.parametrize(
    ("name", "cpu"),
    [
        *((name, "host") for name in NETWORKS),
        *((name, "x86-64-v3") for name in ("linear", "depthwise", "attention", "lstm", "sum across memory")),
    ],
)
def test_all_schedules_give_the_same_answers(name: str, cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network, shape, schedule = NETWORKS[name]
    monkeypatch.setattr(tuning, "KernelBench", SameAnswers)
    monkeypatch.setattr(SameAnswers, "seen", ())
    target = "cpu" if cpu == "host" else f"cpu:{cpu}"
    compiled = mlec.compile(network.eval(), (torch.randn(7, *shape),), target=target, tune=5)
    assert any(text.startswith(schedule) for text in SameAnswers.seen)
    assert len(SameAnswers.seen) > 2
    assert all(c["excess"] <= 1 for c in compiled.report.parity["methods"].values()), "the default against the source"


def test_all_schedules_of_bytes_give_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "KernelBench", SameAnswers)
    monkeypatch.setattr(SameAnswers, "seen", ())
    rng, b = np.random.default_rng(0), GraphBuilder("bytes")

    def weights(*shape: int) -> Any:
        return b.constant(rng.integers(-128, 128, shape).astype(np.int8))

    images = b.input("images", TensorType((SymDim.named("n"), 4, 5, 16), DType.U8))
    products = b("matmul_int8", images, weights(16, 70), zero_point=3)
    convolved = b("conv_int8", images, weights(3, 3, 16, 33), zero_point=3, pads=(1, 1, 1, 1))
    depthwise = b("conv_int8", images, weights(3, 3, 1, 16), zero_point=3, groups=16, strides=(2, 2))
    mlec.compile(b.finish([products, convolved, depthwise]), tune=4)
    for schedule in ("Int8Schedule", "NarrowConvSchedule", "DepthwiseSchedule"):
        assert sum(text.startswith(schedule + "(") for text in SameAnswers.seen) > 1


def test_all_schedules_of_products_of_two_inputs_give_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "KernelBench", SameAnswers)
    monkeypatch.setattr(SameAnswers, "seen", ())
    x = torch.randn(3, 19, 21)
    mlec.compile(Product(), (x, x + 1), tune=5)
    assert sum(text.startswith("MatmulSchedule") for text in SameAnswers.seen) > 10


def test_all_schedules_of_row_programs_give_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "KernelBench", SameAnswers)
    monkeypatch.setattr(SameAnswers, "seen", ())
    x, y = make_classification(300, 9, n_informative=5, n_classes=3, random_state=0)
    mlec.compile(make_pipeline(StandardScaler(), LogisticRegression()).fit(x, y), x[:37], tune=8)
    assert sum(text.startswith("RowSchedule") for text in SameAnswers.seen) > 5


@pytest.mark.parametrize(
    "model",
    [KNeighborsClassifier(3, metric="manhattan"), KMeans(5, n_init=1, random_state=0)],
    ids=["nearest", "pairwise"],
)
def test_all_schedules_of_distances_give_the_same_answers(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "KernelBench", SameAnswers)
    monkeypatch.setattr(SameAnswers, "seen", ())
    x, y = make_classification(150, 9, random_state=0)
    mlec.compile(model.fit(x, y), x[:37], tune=8)
    assert sum(text.startswith("PairwiseSchedule") for text in SameAnswers.seen) > 5


def test_all_schedules_of_trees_give_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "KernelBench", SameAnswers)
    monkeypatch.setattr(SameAnswers, "seen", ())
    x, y = make_classification(300, 9, random_state=0)
    model = GradientBoostingClassifier(n_estimators=12, max_depth=4, random_state=0).fit(x, y)
    mlec.compile(model, x[:37], tune=12)
    texts = "\n".join(SameAnswers.seen)
    assert all(part in texts for part in ("strategy='walk'", "strategy='sliced'", "ranked=True", "ranked=False"))


# -- the race ----------------------------------------------------------------------------------------------------------


class Stopwatch:
    """A bench with made-up times: for each race the next entry of a list, or the last one again.

    Args:
        times: of each schedule in each race, at each of the extents.
    """

    def __init__(self, *times: Mapping[str, Sequence[float]]) -> None:
        self.times = times
        self.races: list[tuple[str, ...]] = []
        self.extents = [{"n": n} for n in range(len(next(iter(times[0].values()))))]

    def __call__(self, schedules: Sequence[str], seconds: float) -> dict[str, Sequence[float]]:
        now = self.times[min(len(self.races), len(self.times) - 1)]
        self.races.append(tuple(schedules))
        return {schedule: now[schedule] for schedule in schedules}


def test_the_fastest_wins_with_the_times_of_both() -> None:
    bench = Stopwatch({"d": [10.0, 80.0], "a": [9.0, 70.0], "b": [8.0, 60.0]})
    assert race("d", ["a", "b"], bench) == ("b", [(10.0, 8.0), (80.0, 60.0)])
    assert bench.races == [("d", "a", "b"), ("d", "b"), ("d", "b")]


@pytest.mark.parametrize(
    "times",
    [
        [{"d": [10.0], "a": [10.0]}],
        [{"d": [10.0], "a": [9.8]}],
        [{"d": [10.0], "a": [5.0]}, {"d": [10.0], "a": [10.0]}],
        [{"d": [10.0], "a": [5.0]}, {"d": [10.0], "a": [9.0]}, {"d": [10.0], "a": [9.9]}],
        [{"d": [10.0], "a": [5.0]}, {"d": [10.0], "a": [9.0]}, {"d": [12.0], "a": [9.0]}],
        [{"d": [10.0, 10.0], "a": [2.0, 10.5]}],
    ],
    ids=["tie", "within the margin", "a lucky start", "once only", "within the noise", "slower at one of the extents"],
)
def test_the_default_stays_unless_another_is_clearly_faster(times: list[dict[str, list[float]]]) -> None:
    chosen, found = race("d", ["a"], Stopwatch(*times))
    assert chosen == "d"
    assert all(old == new for old, new in found)


def test_the_second_best_wins_where_the_best_was_lucky() -> None:
    bench = Stopwatch(
        {"d": [10.0], "a": [5.0], "b": [6.0]}, {"d": [10.0], "a": [11.0]}, {"d": [10.0], "a": [11.0]}, {"d": [10.0], "b": [6.0]}
    )  # fmt: skip
    assert race("d", ["a", "b"], bench)[0] == "b"


def test_the_default_stays_where_there_is_nothing_to_measure() -> None:
    assert race("d", "ab", Stopwatch({"d": [], "a": [], "b": []})) == ("d", [])


def test_half_of_a_sample_comes_first_and_the_seed_decides_the_rest() -> None:
    others = list(range(100))
    found = sample(others, 8, Random(1))
    assert found == sample(others, 8, Random(1)) != sample(others, 8, Random(2))
    assert found[:4] == [0, 1, 2, 3]
    assert found == sorted(set(found))
    assert sample(others[:3], 3, Random(1)) == [0, 1, 2]


# -- the tuner and its memory ------------------------------------------------------------------------------------------


def subject(key: str = "kernel", schedules: str = "dabcefgh") -> Subject[str]:
    return Subject(key, iter(schedules), lambda schedule, name: pytest.fail("not made"), "k_1", "op", "here")


def tuner(bench: Stopwatch, **options: object) -> Tuner:
    return Tuner(Tuning(**{"trials": 4, **options}), HOST, lambda *progress: None, lambda subject, made: bench)


FAST_A = {name: [9.0 if name == "a" else 10.0] for name in "dabcefgh"}
FAST_H = {name: [9.0 if name == "h" else 10.0] for name in "dabcefgh"}


def test_a_finding_is_remembered(state: Path) -> None:
    first = tuner(Stopwatch(FAST_A))
    assert first.choose(subject()) == "a"
    assert first.choose(subject()) == "a", "once for each distinct kernel"
    (found,) = first.tuned
    assert (found.symbol, found.op, found.location, found.remembered) == ("k_1", "op", "here", False)
    assert (found.finding.default, found.finding.chosen, found.finding.trials) == ("'d'", "'a'", 4)
    assert [(t.extents, t.default, t.chosen) for t in found.finding.timings] == [({"n": 0}, 10.0, 9.0)]
    assert len(list(state.iterdir())) == 2, "at these extents, and the last of all"

    bench = Stopwatch(FAST_H)
    second = tuner(bench)
    assert second.choose(subject()) == "a"
    assert bench.races == []
    assert second.tuned[0].remembered
    assert second.tuned[0].finding == found.finding


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        (subject("another"), {}),
        (subject(), {"num_threads": 2}),
        (subject(), {"extents": ({"n": 3},)}),
        (subject(), {"trials": 7}),
        (subject(schedules="abcefgh"), {}),
        (subject(schedules="dbcefgh"), {}),
    ],
    ids=["kernel", "threads", "extents", "more trials", "another default", "a schedule that is gone"],
)
def test_what_a_measurement_depends_on_is_measured_anew(kernel: Subject[str], options: dict[str, object]) -> None:
    tuner(Stopwatch(FAST_A)).choose(subject())
    bench = Stopwatch(FAST_A)
    tuner(bench, **options).choose(kernel)
    assert bench.races


def test_another_processor_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner(Stopwatch(FAST_A)).choose(subject())
    bench = Stopwatch(FAST_A)
    monkeypatch.setattr(tuning, "this_installation", lambda: "mlec 0.1.0, 4 x another one")
    tuner(bench).choose(subject())
    assert bench.races


def test_a_kernel_with_one_schedule_is_not_measured(state: Path) -> None:
    only = tuner(Stopwatch(FAST_A))
    assert only.choose(subject(schedules="d")) == "d"
    assert only.tuned == []
    assert not state.exists()


def test_the_same_seed_and_the_same_times_give_the_same_choice() -> None:
    names = [f"s{i}" for i in range(500)]
    bench_of = {
        seed: Stopwatch({name: [10 + Random(name).random()] for name in names}) for seed in ("5", "5 again", "6")
    }
    chosen = {}
    for seed, bench in bench_of.items():
        search = tuner(bench, memory=Memory(None), seed=int(seed[0]), trials=40)
        kernel = Subject("kernel", iter(names), lambda schedule, name: pytest.fail("not made"), "k_1", "op", "here")
        chosen[seed] = search.choose(kernel)
        tried = bench.races[0]
        assert len(tried) == 41
        assert chosen[seed] == min(tried, key=lambda name: Random(name).random())
    assert chosen["5"] == chosen["5 again"]
    assert bench_of["5"].races == bench_of["5 again"].races
    assert bench_of["5"].races[0] != bench_of["6"].races[0]


def test_without_trials_the_last_finding_counts_and_nothing_is_measured() -> None:
    bench = Stopwatch(FAST_A)
    assert tuner(bench, trials=0).choose(subject()) == "d"
    tuner(Stopwatch(FAST_A), num_threads=2, extents=({"n": 7},)).choose(subject())
    assert tuner(bench, trials=0).choose(subject()) == "a"
    tuner(Stopwatch(FAST_H), trials=7).choose(subject())
    assert tuner(bench, trials=0).choose(subject()) == "h"
    assert tuner(bench, trials=0).choose(subject(schedules="dabc")) == "d", "a schedule that is gone"
    assert bench.races == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"default": "\xff"}',
        b'{"more": ' + b"[" * 10_000,
        b"[]",
        b'{"default": "\'d\'", "chosen": "\'a\'", "trials": -1, "timings": []}',
        b" " * 100_000,
    ],
    ids=["empty", "cut off", "no text", "no text in JSON", "too deep", "another thing", "out of range", "too long"],
)
def test_a_damaged_file_is_written_anew(state: Path, content: bytes) -> None:
    tuner(Stopwatch(FAST_H)).choose(subject())
    for file in state.iterdir():
        file.write_bytes(content)
    found = tuner(Stopwatch(FAST_A))
    assert found.choose(subject()) == "a"
    assert not found.tuned[0].remembered
    again = tuner(Stopwatch(FAST_H))
    assert again.choose(subject()) == "a"
    assert again.tuned[0].remembered


def test_a_memory_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    found = tuner(Stopwatch(FAST_A))
    assert found.choose(subject()) == "a"


def test_an_interruption_keeps_what_was_found(state: Path) -> None:
    class Interrupted(Stopwatch):
        def __call__(self, schedules: Sequence[str], seconds: float) -> dict[str, Sequence[float]]:
            raise KeyboardInterrupt

    tuner(Stopwatch(FAST_A)).choose(subject("first"))
    with pytest.raises(KeyboardInterrupt):
        tuner(Interrupted(FAST_A)).choose(subject("second"))
    assert len(list(state.iterdir())) == 2
    again = tuner(Stopwatch(FAST_H))
    again.choose(subject("first"))
    assert again.tuned[0].remembered


# -- as users see it ---------------------------------------------------------------------------------------------------


class LastWins(KernelBench):
    """A bench whose times say that the last schedule is the fastest."""

    def __call__(self, schedules, seconds):
        super().__call__(schedules[:1], 0)
        last = max(schedules[1:], key=repr, default=schedules[0])
        return {schedule: [1.0 if schedule == last else 2.0 for _ in self.extents] for schedule in schedules}


def test_a_model_with_chosen_schedules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tuning, "KernelBench", LastWins)
    torch.manual_seed(0)
    network = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.ReLU()) for _ in range(2)))
    x = torch.randn(2, 40)
    compiled = mlec.compile(network, (x,), tune=5)
    report = compiled.report
    (entry,) = report.tuning  # the two layers are one kernel
    assert entry["op"] == "matmul_packed"
    assert entry["default"].startswith("GemmSchedule(mr=")
    assert entry["chosen"] != entry["default"]
    assert (entry["trials"], entry["remembered"]) == (5, False)
    assert [t["extents"]["n"] for t in entry["timings"]] == [1, 2, 64]
    np.testing.assert_allclose(compiled.run([x.numpy()])[0], network(x).detach().numpy(), rtol=1e-4, atol=1e-5)

    text = report.to_text()
    assert "tuning: 1 distinct kernel measured, 1 with another schedule" in text
    assert f"{entry['symbol']}: 2.00x as fast, measured in 5 trials" in text
    assert "chosen " in text
    assert "2.00 s -> 1.00 s at n = 1" in text
    assert 'id="tuning"' in report.to_html()
    assert entry["chosen"] in report.to_html()
    compiled.save(tmp_path / "m.mle")
    assert mlec.load(tmp_path / "m.mle").report.tuning == [entry]

    monkeypatch.setattr(tuning, "KernelBench", lambda *args: pytest.fail("measured again"))
    again = mlec.compile(network, (x,), tune=5).report
    assert again.tuning == [{**entry, "remembered": True}]
    assert "remembered" in again.to_text()
    assert mlec.compile(network, (x,)).report.tuning == []


def test_a_file_that_is_compiled_again_keeps_its_schedules(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: Path
) -> None:
    modules: list[CompiledModule] = []

    def compile_and_note(backend: TVMBackend, *args: Any) -> CompiledModule:
        modules.append(original(backend, *args))
        return modules[-1]

    original = TVMBackend.compile
    monkeypatch.setattr(tuning, "KernelBench", LastWins)
    network, x = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.LayerNorm(40)).eval(), torch.randn(2, 40)
    for name, trials in (("tuned", 5), ("plain", 0)):
        mlec.compile(network, (x,), tune=trials).save(tmp_path / name)
    shutil.rmtree(state.parent / "built")  # as if another user had made the files
    monkeypatch.setattr(tuning, "KernelBench", lambda *args: pytest.fail("measured again"))
    monkeypatch.setattr(TVMBackend, "compile", compile_and_note)

    again = mlec.load(tmp_path / "tuned", num_threads=1)
    np.testing.assert_allclose(again.run([x.numpy()])[0], network(x).detach().numpy(), rtol=1e-4, atol=1e-5)
    found = {kernel.op: kernel.finding.chosen for kernel in modules[0].tuned}
    assert found == {entry["op"]: entry["chosen"] for entry in again.report.tuning}
    assert all(kernel.remembered and kernel.finding.chosen != kernel.finding.default for kernel in modules[0].tuned)
    assert len(found) == 2

    mlec.load(tmp_path / "plain")
    assert modules[1].tuned == (), "a file that was not tuned is compiled as it was"
    for file in state.iterdir():
        file.unlink()
    mlec.load(tmp_path / "tuned")
    assert modules[2].tuned == (), "nothing is known: the default"


def test_a_kernel_of_a_program_with_more_weights_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether all weights of the program are in L2 at the next call decides how a product of one row is shared out."""
    monkeypatch.setattr(tuning, "KernelBench", LastWins)
    layer, x = torch.nn.Linear(40, 40).eval(), (torch.randn(2, 40),)
    mlec.compile(layer, x, tune=1)
    (same,) = mlec.compile(layer, x, tune=1).report.tuning
    monkeypatch.setattr(Lowering, "weights_nbytes", 1 << 40)
    (other,) = mlec.compile(layer, x, tune=1).report.tuning
    assert (same["remembered"], other["remembered"]) == (True, False)


def test_sizes_that_a_kernel_cannot_have_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Behind(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x[3:])

    monkeypatch.setattr(tuning, "KernelBench", LastWins)
    (entry,) = mlec.compile(Behind().eval(), (torch.randn(20, 8),), tune=1).report.tuning
    assert [t["extents"]["n"] for t in entry["timings"]] == [20, 64]


def test_a_real_measurement() -> None:
    compiled = mlec.compile(torch.nn.Linear(64, 64).eval(), (torch.randn(3, 64),), tune=2, num_threads=1)
    (entry,) = compiled.report.tuning
    assert sorted(t["extents"]["n"] for t in entry["timings"]) == [1, 3, 64]
    assert all(0 < t["chosen"] <= t["default"] * (1 + tuning.SLACK) for t in entry["timings"])


def test_a_kernel_has_the_same_key_in_every_process(state: Path) -> None:

    script = (
        "import numpy, mlec\n"
        "from mlec.ir import parse_graph\n"
        "graph = parse_graph('graph @g(%x: f32[n, 8], %w: f32[8, 8]) -> (f32[n, 8]) {\\n"
        "  %h = matmul(%x, %w) : f32[n, 8]\\n  %y = tanh(%h) : f32[n, 8]\\n  return %y\\n}')\n"
        "x = numpy.ones((2, 8), 'float32')\n"
        "mlec.compile(graph, (x, numpy.ones((8, 8), 'float32')), tune=1, num_threads=1)"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONHASHSEED": "random"})
        assert len(list(state.iterdir())) == 2


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("cuda", "not for GPUs"),
        ("cpu:x86-64-v3", "this processor lacks .*avx2"),
        ("cpu:x86-64,x86-64-v4", "this processor lacks"),
        ("numpy", "can't be tuned"),
    ],
)
def test_a_target_that_does_not_run_here(target: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "host_flags", lambda: frozenset({"x86_64", "cx16", "lahf_lm"}))
    with pytest.raises(mlec.TargetError, match=message) as caught:
        mlec.compile(torch.nn.Linear(2, 2), (torch.ones(1, 2),), target=target, tune=2)
    assert "leave tune at 0" in (caught.value.hint or "")


@pytest.mark.parametrize("tune", [-1, True, 2.5, "8", None])
def test_trials_that_are_no_number(tune: object) -> None:
    with pytest.raises(mlec.UsageError, match="tune takes") as caught:
        mlec.compile(torch.nn.Linear(2, 2), (torch.ones(1, 2),), tune=tune)
    assert caught.value.hint
