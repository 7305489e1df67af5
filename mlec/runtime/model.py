"""A compiled model as its user holds it: the source's methods, measurements, saving."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import operator
import os
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, cast

import numpy as np

from mlec.errors import CorruptedFileError, InputError, MlecError, UsageError
from mlec.runtime.device import DLDevice
from mlec.runtime.dims import evaluate, symbols_of
from mlec.runtime.edge import Edge, numpy_dtype
from mlec.runtime.frames import data_frame
from mlec.runtime.program import Array
from mlec.signature import Labels, MethodSpec, Signature, TensorSpec
from mlec.wording import plural

if TYPE_CHECKING:
    from mlec.runtime.measure import BenchmarkResult, Profile
    from mlec.runtime.plan import Plan


_MOST_SHAPES = 1024  # that are remembered as checked


class Runnable(Protocol):
    """What a backend gives for running: an `Executable`, or anything with this method.

    What else it has of an `Executable` is used too: ``num_threads``, ``weights_nbytes``, ``program``, ``time_kernels``,
    ``activation_nbytes``, ``plan``, ``close``. One whose attribute ``takes_out`` is true is called as ``run(inputs, out)`` where the
    user gave arrays for the results; of others the results are copied there.
    """

    def run(self, inputs: list[Array]) -> Sequence[Array]:
        """One array for each graph output."""


class WritingRunnable(Runnable, Protocol):
    """One that can write results to given arrays."""

    def run(self, inputs: list[Array], out: Sequence[Array | None] | None = None) -> Sequence[Array]:
        """One array for each graph output; where ``out`` has one that fits, it may be that one."""


class NoSuchMethodError(UsageError, AttributeError):
    """An estimator method that the source model does not have."""

    code = "E_NO_METHOD"


class CompiledModel:
    """A model ready to run. One instance may be used from several threads at once.

    Beside the methods below it has those of its source (``predict``, ``predict_proba``, ``transform`` ...), which take
    what the source takes and return the same shape, dtype and labels.

    Args:
        signature: inputs, outputs, table and methods.
        executable: runs the graph.
        metadata: facts about the model, ready for JSON.
        graph: gives the graph when it is first asked for.
        report: gives the optimisation report when it is first asked for.
        saver: writes the model to a file; called as ``saver(path, **options of save)``.
        device: where the executable runs, if it takes a `DeviceArray` for an input that lies there.
    """

    def __init__(
        self,
        signature: Signature,
        executable: Runnable,
        metadata: Mapping[str, Any] | None = None,
        *,
        graph: Callable[[], Any] | None = None,
        report: Callable[[], Any] | None = None,
        saver: Callable[..., Any] | None = None,
        device: DLDevice | None = None,
    ) -> None:
        self.signature = signature
        self.metadata: dict[str, Any] = dict(metadata or {})
        self.executable = executable
        self._run_single = getattr(executable, "run_single", _never)
        self._graph = graph
        self._report = report
        self._saver = saver
        self._methods = {spec.name: _Method(spec, signature.outputs) for spec in signature.methods}
        self._run = tuple(self._methods[name] for name in signature.run)
        self._largest: tuple[int, tuple[tuple[int, ...], ...]] | None = None
        self._bound: set[tuple[tuple[int, ...], ...]] = set()
        plain = all(method.plain for method in self._run)
        self._picks = [pick for method in self._run for pick in method.parts] if plain else None
        if not self._run:
            self._picks = [(position, None) for position in range(len(signature.outputs))]
        in_order = all(place == i and labels is None for i, (place, labels) in enumerate(self._picks or ()))
        # Where results are the first outputs as they are, how many.
        self._first = len(self._picks) if self._picks is not None and in_order else None
        # Labels and what else methods do to results is done by the host.
        untouched = self._picks is not None and all(labels is None for _, labels in self._picks)
        self._edge = Edge(signature, device if untouched else None)

    def run(self, inputs: object, out: Sequence[Array] | None = None) -> list[Array]:
        """Run the model once.

        Args:
            inputs: a list with one array-like for each input, a mapping from input names, or the one input itself. The one input of an
                estimator is the table, by name ``X``; a mapping from its feature names to columns is a table too.
            out: a list with one writable numpy array for each result, to write it to: of its shape, and of its dtype or one that holds
                every value of that (``numpy.can_cast(result, out, "safe")``). They may overlap inputs, but not each other. Where they
                have the dtype that kernels compute, lie in one piece and overlap no input, kernels write there directly. After an
                error their contents are undefined.

        Returns:
            The results in order: the graph's outputs, or for an estimator what its main methods return (a classifier:
            labels and probabilities); the arrays of ``out`` where that is given. A module's outputs inside dicts, lists and records
            come flat, in the order of ``signature.outputs``, which has their names.

        A network compiled for CUDA reads tensors on the first device (of torch, cupy, or anything with ``__dlpack__``) where they lie,
        and uploads host arrays. If all inputs lie there and ``out`` is not given, the results stay there too: as tensors of the library
        of the first input (torch for torch), else as objects with ``__dlpack__``. Kernels run on the legacy default stream, after the
        work under way on the stream that is current for the inputs' library, and are done when this returns. Estimators, which look
        at values, and models for the CPU copy torch tensors to the host.

        Raises:
            InputError: the inputs do not fit the signature, or ``out`` not the results; says what was expected and what came.
            MlecError: ``E_NO_MEMORY``: there is not enough memory for so many rows.
        """
        try:
            if out is not None:
                return self._run_into(inputs, out)
            outputs = self._computed(inputs)
            return self._results(outputs, inputs) if self._first is None else outputs[: self._first]
        except MemoryError as error:
            raise _too_large(error) from error

    def _results(self, outputs: Sequence[Array], inputs: object) -> list[Array]:
        """What `run` returns, from the graph's outputs."""
        if self._picks is not None:
            return [outputs[i] if labels is None else _labelled(outputs[i], labels) for i, labels in self._picks]
        results: list[Array] = []
        for method in self._run:
            result = method.result(outputs, inputs[0] if isinstance(inputs, (list, tuple)) and inputs else inputs)
            results.extend(result if isinstance(result, list) else [result])
        return results

    def _run_into(self, inputs: object, out: Sequence[Array]) -> list[Array]:
        """`run` into the caller's arrays: kernels write there themselves where nothing is left to do with a result."""
        if not isinstance(out, list | tuple):
            raise InputError(
                f"out: expected a list of numpy arrays, got {type(out).__name__}", code="E_OUTPUT_DTYPE",
                hint="pass a list with one array for each result, e.g. out=[y]",
            )  # fmt: skip
        x = self._edge.single(inputs)
        if x is not None and len(out) == self._first:
            outputs = self._run_single(x, out)
            if outputs is not None:
                return list(out)
        arrays = self._edge.read_closely(inputs) if x is None else [x]
        wanted: list[Array | None] = [None] * len(self.signature.outputs)
        for target, (position, labels) in zip(out, self._picks or (), strict=False):
            if labels is None and isinstance(target, np.ndarray):
                wanted[position] = target
        results = self._results(self._outputs(arrays, wanted), inputs)
        if len(results) == len(out) and all(map(operator.is_, results, out)):
            return list(out)  # what kernels wrote to is an array that fits and shares no memory with another one
        _check_out(out)
        return _write(results, out)

    def __call__(self, *inputs: object, **named: object) -> list[Array]:
        """`run` with the inputs by position, by keyword, or the first by position and others by keyword; one mapping holds inputs by name.

        Raises:
            UsageError: an input comes both by position and by keyword.
            InputError: as `run`.
        """  # fmt: skip
        if inputs and named:
            return self.run(self._bound_names(inputs, named))
        if len(inputs) == 1 and isinstance(inputs[0], Mapping):
            return self.run(inputs[0])
        return self.run(named if named else inputs)

    def _bound_names(self, inputs: tuple[object, ...], named: dict[str, object]) -> dict[str, object]:
        """All arguments by name, as Python binds them."""
        names = self._edge.arguments
        if len(inputs) > len(names):
            raise InputError(
                f"expected {plural(len(names), 'input')} ({', '.join(names)}), "
                f"got {len(inputs)} by position and {', '.join(named)} by name",
                code="E_INPUT_COUNT",
                hint="pass each input once",
            )
        positional = dict(zip(names, inputs, strict=False))
        twice = [name for name in named if name.split(".")[0] in positional]
        if twice:
            raise UsageError(
                f"the input {twice[0]!r} came by position and by name",
                hint=f"by position come the inputs in the order {', '.join(names)}; pass each once",
            )
        return positional | named

    def __getattr__(self, name: str) -> Callable[[object], Any]:
        # Copying and pickling ask a blank instance, which has neither methods nor a signature.
        if name.startswith("_") or "signature" not in self.__dict__:
            raise AttributeError(name)
        return self.source_method(name)

    def source_method(self, name: str) -> Callable[[object], Any]:
        """The method of the source by its name, which may come from a user; never another one of this class.

        Raises:
            NoSuchMethodError: the source has no method of that name.
        """
        methods = self._methods
        if name in methods:
            method = methods[name]
            call = functools.partial(self._call_method, method)
            return call if method.bare is None or self._edge.quick is None else self._short(method.bare, call)
        has = f"it has {', '.join(methods)}" if methods else "it has no estimator methods; use run(inputs)"
        raise NoSuchMethodError(
            f"this compiled {self.signature.kind} has no {name}; {has}",
            hint="call one of these, or compile a model that has it"
            if methods
            else "a network is called by model.run([x])",
        )

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._methods})

    def __copy__(self) -> CompiledModel:
        return self  # it never changes, and any number of threads may share it

    def __deepcopy__(self, memo: object) -> CompiledModel:
        return self

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            "a compiled model cannot be pickled",
            hint="save it to a file, and load that in the other process: mlec.load",
        )

    def __repr__(self) -> str:
        inputs = ", ".join(
            f"{spec.name}: {spec.dtype}[{', '.join(map(str, spec.shape))}]" for spec in self.signature.inputs
        )
        return f"<CompiledModel {self.signature.kind} ({inputs})>"

    def _call_method(self, method: _Method, X: object) -> Any:
        try:
            outputs = self._computed(X if type(X) is np.ndarray or isinstance(X, Mapping) else (X,))
            return method.framed(outputs, X) if method.bare is None else outputs[method.bare]
        except MemoryError as error:
            raise _too_large(error) from error

    def _short(self, position: int, call: Callable[[object], Any]) -> Callable[[object], Any]:
        """A method whose result is one graph output as it is, for an array with nothing left to decide: three Python calls fewer, which is
        a tenth of the time of a small model at one row.

        Args:
            position: of the output.
            call: the method, for everything else.
        """
        quick, run_single = self._edge.quick, self._run_single
        assert quick is not None

        def short(X: object) -> Any:
            if type(X) is np.ndarray:
                try:
                    x = quick(X)
                except MemoryError as error:
                    raise _too_large(error) from error
                if x is not None:
                    outputs = run_single(x)
                    if outputs is not None:
                        return outputs[position]
            return call(X)

        return short

    def _computed(self, inputs: object) -> list[Array]:
        """The graph's outputs, in new arrays."""
        x = self._edge.single(inputs)
        if x is None:
            return list(self._outputs(self._edge.read_closely(inputs)))
        outputs = self._run_single(x)
        return list(self._outputs([x])) if outputs is None else outputs

    def _outputs(self, arrays: list[Array], out: list[Array | None] | None = None) -> Sequence[Array]:
        shapes = tuple([array.shape for array in arrays])
        if shapes not in self._bound:
            self._bind(arrays, shapes)
        if out is None or not getattr(self.executable, "takes_out", False):
            return self.executable.run(arrays)
        return cast(WritingRunnable, self.executable).run(arrays, out)

    def _bind(self, arrays: list[Array], shapes: tuple[tuple[int, ...], ...]) -> None:
        """Check shapes that did not come before."""
        self._edge.bind(arrays)
        nbytes = sum(array.nbytes for array in arrays)
        if self._largest is None or nbytes > self._largest[0]:
            self._largest = nbytes, shapes
        if len(self._bound) >= _MOST_SHAPES:
            self._bound.clear()
        self._bound.add(shapes)

    @functools.cached_property
    def graph(self) -> Any:
        """The optimised graph."""
        return _provided(self._graph, "graph")

    @functools.cached_property
    def report(self) -> Any:
        """What the compiler did, with measurements."""
        return _provided(self._report, "report")

    def benchmark(self, inputs: object, num_runs: int = 100) -> BenchmarkResult:
        """Time single calls of `run`, after a few calls that are not counted.

        Raises:
            UsageError: ``num_runs`` is below 1.
        """
        from mlec.runtime.measure import BenchmarkResult

        if num_runs < 1:
            raise UsageError(f"num_runs must be at least 1, got {num_runs}", hint="leave it out for 100 runs")
        for _ in range(max(3, min(20, num_runs // 10))):
            self.run(inputs)
        arrays = self._edge.read(inputs)
        rows = arrays[0].shape[0] if arrays and arrays[0].ndim else 1
        seconds = []
        for _ in range(num_runs):
            begin = time.perf_counter()
            self.run(inputs)
            seconds.append(time.perf_counter() - begin)
        return BenchmarkResult.of(seconds, rows, getattr(self.executable, "num_threads", None))

    def profile(self, inputs: object, num_runs: int = 10) -> Profile:
        """Time per kernel, with the op and the place in the source model that each comes from.

        Raises:
            UsageError: the backend has no kernels to time.
        """
        from mlec.runtime.measure import Profile

        times, binding = self.kernel_times(inputs, num_runs)
        total = self.benchmark(inputs, num_runs).p50 / 1e3
        return Profile.of(times, self.executable.program.kernels, binding, total)  # type: ignore[attr-defined]

    def kernel_times(self, inputs: object, num_runs: int = 10) -> tuple[dict[str, tuple[int, float]], dict[str, int]]:
        """For each kernel its calls in one run and the seconds of them all (median of the runs); and the extents of the symbolic dims.

        Raises:
            UsageError: the backend has no kernels to time.
        """
        time_kernels = getattr(self.executable, "time_kernels", None)
        if time_kernels is None:
            raise UsageError("this backend has no kernels to profile", hint="compile with the tvm backend")
        try:
            arrays = self._edge.read(inputs)
            binding = dict(self._edge.bind(arrays))  # which also says what is wrong with their shapes
            return time_kernels(arrays, num_runs), binding
        except MemoryError as error:
            raise _too_large(error) from error

    def peak_memory_usage(self) -> int:
        """Bytes that running needs: weights, inputs, and the buffers for intermediate values and outputs.

        For the largest inputs run so far (before the first run: every symbolic dim at its least value, but 1 at least).
        Machine code, and what a kernel takes for itself while it runs, do not count.
        """
        return self.memory_usage()["peak"]

    def memory_usage(self) -> dict[str, int]:
        """The bytes of `peak_memory_usage`, and what they are made of.

        Returns:
            ``weights``, ``inputs``, ``peak``. Where buffers are laid out in advance also ``arena``, which holds all intermediate values;
            ``live``, the most that those hold at one time; ``outputs``; and ``peak_apart``, the peak if no result took the memory of an
            operand.
        """
        shapes = self._largest[1] if self._largest else self._least_shapes()
        dtypes = (numpy_dtype(spec.dtype) for spec in self.signature.inputs)
        arrays = [np.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        executable: Any = self.executable
        usage = {"weights": getattr(executable, "weights_nbytes", 0), "inputs": sum(array.nbytes for array in arrays)}
        plan_of, activation_nbytes = (getattr(executable, name, None) for name in ("plan", "activation_nbytes"))
        usage["peak"] = sum(usage.values()) + (activation_nbytes(arrays) if activation_nbytes else self._traced(arrays))
        if plan_of is not None:
            plan: Plan = plan_of(arrays)
            usage |= {"arena": plan.arena_nbytes, "live": plan.live_nbytes, "outputs": plan.output_nbytes}
            usage["peak_apart"] = usage["peak"] - plan.arena_nbytes + executable.plan_apart(arrays).arena_nbytes
        return usage

    def memory_plan(self, inputs: object) -> Plan | None:
        """Where the buffers of a run with these inputs lie, and while which calls; None where they are not laid out in advance."""
        plan_of = getattr(self.executable, "plan", None)
        return None if plan_of is None else plan_of(self._edge.read(inputs))

    def metrics(self, format: str = "dict") -> Any:
        """What calls were counted, of a model that was loaded with ``metrics=True``: see `mlec.runtime.metrics.Metrics`.

        Raises:
            UsageError: it was not.
        """
        raise UsageError("nothing was counted", hint="load the model with mlec.load(path, metrics=True)")

    def _traced(self, arrays: list[Array]) -> int:
        """Peak of what numpy and Python allocate during one run."""
        import tracemalloc

        running = tracemalloc.is_tracing()
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            self.executable.run(arrays)
            return tracemalloc.get_traced_memory()[1] - before
        finally:
            if not running:
                tracemalloc.stop()

    def _least_shapes(self) -> tuple[tuple[int, ...], ...]:
        dims = [dim for spec in self.signature.inputs for dim in spec.shape if isinstance(dim, str)]
        names = set[str]().union(*map(symbols_of, dims))
        least = {name: max(1, self.signature.symbols.get(name, (1, None))[0]) for name in names}
        return tuple(tuple(evaluate(dim, least) or 1 for dim in spec.shape) for spec in self.signature.inputs)

    def save(
        self,
        path: str | os.PathLike[str],
        compression: str | None = None,
        sign_key: Any = None,
        encryption_key: Any = None,
        metadata: Mapping[str, Any] | None = None,
        reproducible: bool = False,
    ) -> Any:
        """Write the model to a ``.mle`` file; an existing file is replaced only once the new one is complete.

        Args:
            path: the file.
            compression: None: graph and code by zlib, where that makes them clearly smaller; or ``"zstd"``: these and each tensor.
            sign_key: file of a secret key, as ``mlec keygen`` makes it: where it is trusted, the machine code of the file runs.
            encryption_key: 32 bytes, a file with them (``mlec keygen --encryption``), or a `mlec.artifact.EncryptionKey`: encrypts graph,
                weights and code. The metadata stays readable. A model that was loaded from an encrypted file is not encrypted without it.
            metadata: kept in the file, under the key ``user`` of its metadata.
            reproducible: leave the times out of the report in the file: then the same model, compiled twice in the same way, gives the same
                bytes, unless it is encrypted, or times decided about it (``tune``, int8).
        """
        if not isinstance(path, (str, os.PathLike)):
            raise UsageError(
                f"save takes the path of a file, got {type(path).__name__}", hint='model.save("model.mle")'
            )
        if self._saver is None:
            raise UsageError(
                "this model cannot be saved: it was built without a saver",
                hint="save the model that mlec.compile returns; of a loaded one copy the file",
            )
        from pathlib import Path  # running a model needs none

        return self._saver(
            Path(path),
            compression=compression,
            sign_key=sign_key,
            encryption_key=encryption_key,
            metadata=metadata,
            reproducible=reproducible,
        )

    def close(self) -> None:
        """Free code and weights now rather than when the model is garbage; running it afterwards is an error."""
        close = getattr(self.executable, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> CompiledModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Method:
    """One estimator method: picks graph outputs and gives them the source's labels and dtype.

    Attributes:
        parts: for each result its graph output, and the labels that its integers stand for (None: the integers themselves).
        plain: whether nothing else is done with them.
        bare: the graph output that is the result as it is.
    """

    def __init__(self, spec: MethodSpec, outputs: Sequence[TensorSpec]) -> None:
        self._spec = spec
        labels = spec.labels or (None,) * len(spec.outputs)
        dtypes = [numpy_dtype(outputs[position].dtype) for position in spec.outputs]
        self.parts = [
            (position, None if label is None else _label_table(label, dtype))
            for position, label, dtype in zip(spec.outputs, labels, dtypes, strict=True)
        ]
        self._dtype = None if spec.dtype is None else np.dtype(spec.dtype)
        kept = all(dtype == self._dtype for dtype, (_, table) in zip(dtypes, self.parts, strict=True) if table is None)
        kept &= all(table.dtype == self._dtype for _, table in self.parts if table is not None)
        self.plain = not (spec.function or spec.stack or spec.float32 or spec.integers) and (
            self._dtype is None or kept
        )
        alone = self.plain and len(self.parts) == 1 and not (spec.as_list or spec.frame)
        self.bare = self.parts[0][0] if alone and self.parts[0][1] is None else None

    def result(self, outputs: Sequence[Array], table: object) -> Array | list[Array]:
        """What the source's method returns for a table, from the graph's outputs."""
        results = [self._part(outputs[position], labels) for position, labels in self.parts]
        if self._spec.float32 or self._spec.integers:
            dtype = _dtype_of(table)
            if (self._spec.float32 and dtype == np.float32) or (self._spec.integers and dtype.kind in "iu"):
                results = [result.astype(dtype, copy=False) for result in results]
        if self._spec.stack:
            return np.column_stack(results)
        return results if self._spec.as_list or len(results) > 1 else results[0]

    def framed(self, outputs: Sequence[Array], table: object) -> Any:
        """`result`, as a DataFrame where the source returns one and its library is installed."""
        result = self.result(outputs, table)
        frame = self._spec.frame
        if frame is None or importlib.util.find_spec(frame.library) is None:
            return result
        return data_frame(frame, result, table)

    def _part(self, output: Array, labels: Array | None) -> Array:
        if labels is not None:
            output = _labelled(output, labels)
        if self._spec.function == "log":
            with np.errstate(divide="ignore"):
                output = np.log(output)
        return output if self._dtype is None else output.astype(self._dtype, copy=False)


def _never(x: Array, out: Sequence[Array] = ()) -> None:
    """In the place of `Executable.run_single` where a backend has none."""


def _dtype_of(table: object) -> np.dtype[Any]:
    """The dtype of an array, a tensor, or all columns of a DataFrame; of anything else that of objects."""
    dtypes = getattr(table, "dtypes", None)  # of a DataFrame
    names = {str(dtype) for dtype in (dtypes if dtypes is not None else [getattr(table, "dtype", "object")])}
    name = names.pop().lower().removeprefix("torch.") if len(names) == 1 else "object"
    try:
        return np.dtype(name)
    except TypeError:
        return np.dtype(object)


def _labelled(codes: Array, labels: Array) -> Array:
    """The labels that the integers stand for."""
    try:
        return labels[codes]
    except IndexError as error:
        raise CorruptedFileError(
            f"the model has {len(labels)} labels for more classes: {error}", code="E_METADATA",
            hint="compile the model again",
        ) from error  # fmt: skip


def _label_table(labels: Labels, codes: np.dtype[Any]) -> Array | None:
    """The labels as an array of the source's dtype; None where they are the codes, in the dtype of the codes."""
    dtype = np.dtype(labels.dtype)
    if dtype == codes and dtype.kind == "i" and labels.values == tuple(range(len(labels.values))):
        return None
    values = [float("nan") if value is None and dtype.kind == "f" else value for value in labels.values]
    table = np.empty(len(values), dtype)
    table[:] = values
    return table


def _provided(provider: Callable[[], Any] | None, what: str) -> Any:
    if provider is None:
        raise MlecError(
            f"this model carries no {what}",
            code="E_NOT_AVAILABLE",
            hint="load the model from its file, or compile it with mlec.compile",
        )
    return provider()


def _too_large(error: MemoryError) -> MlecError:
    return MlecError(
        f"there is not enough memory to run the model on these inputs{f': {error}' if str(error) else ''}",
        code="E_NO_MEMORY", hint="pass fewer rows at a time",
    )  # fmt: skip


def _check_out(out: Sequence[Array]) -> None:
    """Refuses what results cannot be written to, whatever they are."""
    for position, target in enumerate(out):
        if not isinstance(target, np.ndarray):
            raise InputError(
                f"out[{position}]: expected a numpy array, got {type(target).__name__}", code="E_OUTPUT_DTYPE",
                hint="results are written to arrays in host memory, e.g. numpy.empty(shape, dtype)",
            )  # fmt: skip
        if not target.flags.writeable:
            raise InputError(
                f"out[{position}]: expected a writable array, got a read-only one", code="E_OUTPUT_DTYPE",
                hint="pass an array of your own, e.g. a copy of it",
            )  # fmt: skip
    for (first, one), (second, other) in itertools.combinations(enumerate(out), 2):
        # Those that own their memory share none, which is seen ten times faster.
        if one is other or (not (one.flags.owndata and other.flags.owndata) and np.shares_memory(one, other)):
            raise InputError(
                f"out[{first}] and out[{second}] overlap: the one would overwrite the other", code="E_OUTPUT_OVERLAP",
                hint="pass arrays that share no memory",
            )  # fmt: skip


def _write(results: list[Array], out: Sequence[Array]) -> list[Array]:
    """Copy the results into the caller's arrays."""
    if len(results) != len(out):
        raise InputError(
            f"out: expected {plural(len(results), 'array')}, got {len(out)}", code="E_OUTPUT_COUNT",
            hint="pass one array for each result of run",
        )  # fmt: skip
    for position, (result, target) in enumerate(zip(results, out, strict=True)):
        fits = target.shape == result.shape
        if not fits or not np.can_cast(result.dtype, target.dtype, "safe"):
            raise InputError(
                f"out[{position}]: expected shape {result.shape} and dtype {result.dtype}, "
                f"got shape {target.shape} and dtype {target.dtype}",
                code="E_OUTPUT_DTYPE" if fits else "E_OUTPUT_SHAPE",
                hint=f"numpy.empty({result.shape}, {str(result.dtype)!r}) holds this result",
            )
    for result, target in zip(results, out, strict=True):
        if target is not result:
            np.copyto(target, result)
    return list(out)
