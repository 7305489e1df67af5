"""CompiledModel on a stand-in for the executable, and its measurements on a real one."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from mlec.errors import InputError, MlecError, UsageError
from mlec.runtime import CompiledModel, Executable
from mlec.runtime.measure import Profile
from mlec.runtime.program import KernelInfo
from mlec.signature import ColumnFeed, Labels, MethodSpec, Signature, TableSpec, TensorSpec

X = np.array([[0.0, 3.0], [5.0, 1.0], [2.0, 2.0]])


class Scores:
    """Gives the class with the larger feature, and the two features as probabilities."""

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        (x,) = inputs
        return [x.argmax(axis=1), x / np.maximum(x.sum(axis=1, keepdims=True), 1e-30)]


def classifier(labels: Labels, *more: MethodSpec) -> CompiledModel:
    methods = (
        MethodSpec("predict", (0,), (labels,)),
        MethodSpec("predict_proba", (1,), dtype="float64"),
        MethodSpec("predict_log_proba", (1,), function="log"),
        *more,
    )
    signature = Signature(
        (TensorSpec("X", "f32", ("n", 2)),),
        (TensorSpec("label", "i64", ("n",)), TensorSpec("probability", "f32", ("n", 2))),
        table=TableSpec(2, (ColumnFeed((0, 1)),)),
        methods=methods,
        run=("predict", "predict_proba"),
        kind="classifier",
    )
    return CompiledModel(signature, Scores())


YES_NO = Labels(("no", "yes"), "<U3")


def test_methods_of_the_source() -> None:
    model = classifier(YES_NO)
    np.testing.assert_array_equal(model.predict(X), ["yes", "no", "no"])
    assert model.predict(X).dtype == np.dtype("<U3")
    assert model.predict_proba(X).dtype == np.float64
    np.testing.assert_allclose(model.predict_proba(X).sum(axis=1), 1)
    log = model.predict_log_proba(X)
    assert log[0, 0] == -np.inf
    assert log.dtype == np.float32
    assert model.predict(X[:0]).shape == (0,)
    assert model.predict(X.tolist()).tolist() == ["yes", "no", "no"]


class Single(Scores):
    """Takes the short way for arrays in row-major order."""

    def __init__(self) -> None:
        self.short = 0

    def run_single(self, x: np.ndarray, out: Any = ()) -> list[np.ndarray] | None:
        if not x.flags.c_contiguous:
            return None
        self.short += 1
        return self.run([x])


def test_results_that_are_outputs_as_they_are_take_a_short_way() -> None:
    slow = classifier(YES_NO)
    executable = Single()
    model = CompiledModel(
        msgspec.structs.replace(slow.signature, methods=(MethodSpec("predict_proba", (1,)),), run=()), executable
    )
    wanted = slow.predict_proba(X)
    predict = model.predict_proba
    for table in (X, X.astype(np.float32), X[::-1][::-1]):
        np.testing.assert_array_equal(predict(table), wanted.astype(np.float32))
    np.testing.assert_array_equal(predict(X=X), wanted.astype(np.float32))
    assert executable.short == 4
    for table in (X.tolist(), np.asfortranarray(X.astype(np.float32)), {"X": X}):  # what has to be looked at
        np.testing.assert_array_equal(predict(table), wanted.astype(np.float32))
    assert predict(np.full((1, 2), 1e30)).dtype == np.float32
    with pytest.raises(InputError, match="X has 1 features"):
        predict(X[:, :1])


def test_run_returns_what_the_main_methods_return() -> None:
    model = classifier(YES_NO)
    for results in (model.run([X]), model.run(X), model.run({"X": X}), model(X), model(X=X), model({"X": X})):
        assert len(results) == 2
        np.testing.assert_array_equal(results[0], ["yes", "no", "no"])
        np.testing.assert_array_equal(results[1], model.predict_proba(X))
    with pytest.raises(UsageError, match="'X' came by position and by name"):
        model(X, X=X)
    for wrong in (lambda: model.run({"zzz": X}), lambda: model(zzz=X), lambda: model.predict({"zzz": X})):
        with pytest.raises(InputError, match="expected the input X; got zzz") as caught:
            wrong()
        assert caught.value.code == "E_INPUT_NAME"


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (Labels((3, 7), "int32"), np.array([7, 3, 3], np.int32)),
        (Labels((False, True), "bool"), np.array([True, False, False])),
        (Labels((0.5, None), "float64"), np.array([np.nan, 0.5, 0.5])),
        (Labels(("a", None), "object"), np.array([None, "a", "a"], object)),
        (Labels(("a", 1), "object"), np.array([1, "a", "a"], object)),
    ],
)
def test_labels_have_the_dtype_of_the_source(labels: Labels, expected: np.ndarray) -> None:
    got = classifier(labels).predict(X)
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)


def test_multi_output() -> None:
    numbers = Labels((10, 20), "int64")
    both = (numbers, numbers)
    model = classifier(
        YES_NO,
        MethodSpec("transform", (0, 0), both, stack=True),
        MethodSpec("score_samples", (1,), as_list=True),
        MethodSpec("decision_function", (1, 1)),
    )
    np.testing.assert_array_equal(model.transform(X), [[20, 20], [10, 10], [10, 10]])
    assert len(model.score_samples(X)) == 1
    assert len(model.decision_function(X)) == 2


def test_methods_the_source_lacks() -> None:
    model = classifier(YES_NO)
    assert hasattr(model, "predict_proba")
    assert not hasattr(model, "transform")
    assert {"predict", "run", "benchmark"} <= set(dir(model))
    with pytest.raises(AttributeError, match="this compiled classifier has no transform; it has predict, "):
        model.transform  # noqa: B018
    with pytest.raises(UsageError) as caught:
        model.transform  # noqa: B018
    assert caught.value.hint
    with pytest.raises(AttributeError):
        copy.copy(CompiledModel.__new__(CompiledModel)).predict  # noqa: B018


def test_wrong_input_names_both_sides() -> None:
    with pytest.raises(InputError, match="X has 3 features, but the model expects 2"):
        classifier(YES_NO).predict(np.ones((2, 3)))


def test_out() -> None:
    model = classifier(Labels((3, 7), "int32"))
    out = [np.empty(3, np.int32), np.empty((3, 2))]
    assert model.run([X], out=out)[1] is out[1]
    assert out[0].tolist() == [7, 3, 3]
    with pytest.raises(InputError, match=r"out\[0\]: expected shape \(3,\) and dtype int32"):
        model.run([X], out=[np.empty(4, np.int32), out[1]])
    with pytest.raises(InputError, match="expected 2 arrays, got 1"):
        model.run([X], out=out[:1])


def test_out_is_refused_where_it_cannot_hold_the_results() -> None:
    model = classifier(YES_NO)
    labels, probabilities = np.empty(3, "<U3"), np.empty((3, 2))
    fixed = np.empty((3, 2))
    fixed.flags.writeable = False
    for out, code, says in (
        ([labels, fixed], "E_OUTPUT_DTYPE", "out[1]: expected a writable array, got a read-only one"),
        ([labels, probabilities.tolist()], "E_OUTPUT_DTYPE", "out[1]: expected a numpy array, got list"),
        (labels, "E_OUTPUT_DTYPE", "out: expected a list of numpy arrays, got ndarray"),
        ([np.empty(3, "<U1"), probabilities], "E_OUTPUT_DTYPE", "dtype <U3, got shape (3,) and dtype <U1"),
        ([labels, np.empty((3, 2), np.float32)], "E_OUTPUT_DTYPE", "dtype float64, got shape (3, 2) and dtype float32"),
        ([labels, np.empty((2, 3))], "E_OUTPUT_SHAPE", "out[1]: expected shape (3, 2)"),
        ([labels], "E_OUTPUT_COUNT", "out: expected 2 arrays, got 1"),
    ):
        with pytest.raises(InputError) as caught:
            model.run([X], out=out)
        assert says in caught.value.message
        assert (caught.value.code, bool(caught.value.hint)) == (code, True)
    wide = [np.empty(3, "<U9"), probabilities]
    assert model.run([X], out=wide)[0] is wide[0]
    assert wide[0].tolist() == ["yes", "no", "no"]


class Sums:
    """Adds its inputs, and notes whether it was given arrays for the results."""

    def __init__(self, takes_out: bool) -> None:
        self.takes_out, self.given = takes_out, 0

    def run(self, inputs: list[np.ndarray], *out: object) -> list[np.ndarray]:
        self.given += len(out)
        return [sum(inputs, np.float32(0))]


def network(*names: str, takes_out: bool = False) -> CompiledModel:
    inputs = tuple(TensorSpec(name, "f32", ("n",)) for name in names)
    return CompiledModel(Signature(inputs, (TensorSpec("y", "f32", ("n",)),)), Sums(takes_out))


def test_out_may_not_overlap_itself() -> None:
    model = classifier(Labels((3, 7), "int64"))
    memory = np.empty(9)
    labels, apart = memory[:3].view(np.int64), memory[3:].reshape(3, 2)
    assert model.run([X], out=[labels, apart])[0].tolist() == [7, 3, 3]
    with pytest.raises(InputError, match="overlap") as caught:
        model.run([X], out=[labels, memory[2:8].reshape(3, 2)])
    assert caught.value.code == "E_OUTPUT_OVERLAP"


@pytest.mark.parametrize("takes_out", [False, True])
def test_only_executables_that_say_so_are_given_out(takes_out: bool) -> None:
    model = network("a", "b", takes_out=takes_out)
    out = [np.empty(2, np.float32)]
    assert model.run([[1, 2], [3, 4]], out=out)[0] is out[0]
    assert out[0].tolist() == [4, 6]
    assert model.executable.given == takes_out


def test_positions_first_then_names() -> None:
    a, b, c = [1.0], [10.0], [100.0]
    assert network("a", "b.x", "b.y")(a, b={"x": b, "y": c})[0].tolist() == [111]
    model = network("a", "b", "c")
    assert model(a, b, c=c)[0].tolist() == [111]
    assert model(a, c=c, b=b)[0].tolist() == [111]
    with pytest.raises(UsageError, match="'a' came by position and by name"):
        model(a, b, a=a)
    with pytest.raises(InputError, match="missing: b"):
        model(a, c=c)
    with pytest.raises(InputError, match="unexpected: d"):
        model(a, b, d=c)
    with pytest.raises(InputError, match="got 4 by position and d by name"):
        model(a, b, c, a, d=a)


def test_what_the_model_was_not_given() -> None:
    model = classifier(YES_NO)
    for use in (lambda: model.graph, lambda: model.report, lambda: model.save("m.mle"), lambda: model.profile([X])):
        with pytest.raises(MlecError):
            use()


def test_providers_are_asked_once_and_late(tmp_path: Path) -> None:
    asked: list[str] = []
    saved: list[Any] = []
    signature = classifier(YES_NO).signature
    model = CompiledModel(
        signature,
        Scores(),
        {"name": "scores"},
        graph=lambda: asked.append("graph") or "the graph",
        report=lambda: asked.append("report") or "the report",
        saver=lambda path, **options: saved.append((path, options)) or "saved",
    )
    assert asked == []
    assert (model.graph, model.graph, model.report) == ("the graph", "the graph", "the report")
    assert asked == ["graph", "report"]
    assert model.metadata == {"name": "scores"}
    assert model.save(str(tmp_path / "m.mle"), metadata={"a": 1}) == "saved"
    assert saved[0][0] == tmp_path / "m.mle"
    assert saved[0][1]["metadata"] == {"a": 1}


@pytest.mark.parametrize(
    "use",
    [lambda m, x: m.run([x]), lambda m, x: m.predict(x), lambda m, x: m.benchmark([x])],
    ids=["run", "method", "benchmark"],
)
def test_too_many_rows_for_the_memory(use: Callable[[CompiledModel, np.ndarray], object]) -> None:
    class Full:
        def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
            raise MemoryError("no room for the results")

    whole = classifier(Labels((0, 1), "int64"))
    model = CompiledModel(whole.signature, Full())
    with pytest.raises(MlecError, match="no room for the results") as caught:
        use(model, np.zeros((1, 2)))
    assert caught.value.code == "E_NO_MEMORY"
    with pytest.raises(MlecError, match="Unable to allocate"):
        use(whole, np.broadcast_to(np.zeros((1, 2)), (10**13, 2)))


def test_benchmark() -> None:
    result = classifier(YES_NO).benchmark([X], num_runs=20)
    assert result.num_runs == 20
    assert result.rows == 3
    assert 0 < result.min <= result.p50 <= result.p95 <= result.p99
    assert result.throughput == pytest.approx(3 / (result.mean / 1e3))
    assert json.loads(json.dumps(result.to_dict()))["unit"] == "ms"
    assert "p95 ms" in str(result)
    assert "20 runs of 3 rows" in str(result)
    with pytest.raises(UsageError, match="num_runs"):
        classifier(YES_NO).benchmark([X], num_runs=0)


def test_peak_memory_without_kernels_is_what_numpy_allocates() -> None:
    model = classifier(YES_NO)
    small = model.peak_memory_usage()
    model.run([np.ones((100_000, 2))])
    # 0.8 MB of input, 0.8 MB of labels and 0.8 MB of probabilities at least.
    assert small < 100_000 < 2_400_000 <= model.peak_memory_usage() < 10_000_000


@pytest.fixture
def real(make_executable: Callable[..., Executable]) -> CompiledModel:
    outputs = (TensorSpec("h", "f32", ("n", 4)), TensorSpec("y", "f32", ("n", 4)))
    return CompiledModel(Signature((TensorSpec("x", "f32", ("n", 8)),), outputs), make_executable())


def test_a_profile_fits_the_screen() -> None:
    kernel = KernelInfo(symbol="s" * 200, op="o" * 200, location="l" * 200)
    profile = Profile.of({kernel.symbol: (1, 1.0)}, [kernel], {}, 2.0)
    assert max(map(len, str(profile).splitlines())) <= 125
    assert profile.to_dict()["kernels"][0]["location"] == kernel.location


def test_profile(real: CompiledModel) -> None:
    profile = real.profile([np.ones((2048, 8))], num_runs=3)
    assert {entry.kernel.op for entry in profile.kernels} == {"matmul", "relu"}
    assert [entry.ms for entry in profile.kernels] == sorted((entry.ms for entry in profile.kernels), reverse=True)
    first = next(entry for entry in profile.kernels if entry.kernel.op == "matmul")
    assert (first.kernel.location, first.calls) == ("net.py:3", 1)
    assert first.gflops == pytest.approx(64 * 2048 / first.ms / 1e6)
    assert sum(entry.share for entry in profile.kernels) == pytest.approx(1)
    assert "net.py:3" in str(profile)
    assert {entry["op"] for entry in json.loads(json.dumps(profile.to_dict()))["kernels"]} == {"matmul", "relu"}


def test_a_profile_of_inputs_of_another_shape_says_so(real: CompiledModel) -> None:
    with pytest.raises(InputError, match="axis 1 must be 8, not 2"):
        real.profile([np.ones((5, 2))])


def test_peak_memory(real: CompiledModel) -> None:
    real.run([np.ones((4096, 8))])
    real.run([np.ones((1, 8))])
    # weights, the largest input, and two intermediate values of the same size as the two outputs
    assert real.peak_memory_usage() == 8 * 4 * 4 + 4096 * 8 * 4 + 2 * 4096 * 4 * 4
    usage = real.memory_usage()
    assert (
        usage["peak"]
        == real.peak_memory_usage()
        == sum(usage[what] for what in ("weights", "inputs", "arena", "outputs"))
    )
    assert usage["live"] <= usage["arena"]
    assert usage["peak_apart"] == usage["peak"]


def test_close_and_context(real: CompiledModel) -> None:
    with real as model:
        assert model([[1.0] * 8])[0].shape == (1, 4)
    with pytest.raises(UsageError, match="closed"):
        real.run([np.ones((1, 8))])


def test_kernel_failures_and_pickling_are_clear(real: CompiledModel) -> None:
    with pytest.raises(InputError, match="expected 1 input"):
        real.run([])
    with pytest.raises(UsageError, match="pickled"):
        pickle.dumps(real)
    assert copy.deepcopy({"model": real})["model"] is real
