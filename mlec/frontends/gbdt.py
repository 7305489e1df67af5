"""What the frontends of gradient boosting libraries share: their tables, their signatures, their files."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlec.errors import FrontendError
from mlec.frontends.base import Oracle
from mlec.frontends.source_process import SourceProcess
from mlec.frontends.trees import Ensemble
from mlec.ir import DType, Graph, GraphBuilder, Value, tensor, verify
from mlec.signature import Coding, ColumnFeed, MethodSpec, Signature, TableSpec

Array = NDArray[Any]

MISSING_CODE = -1
MAX_FEATURES = 1 << 22
MAX_OUTPUTS = 1 << 16
MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
"""Bytes of this machine; a text that would become more is not read: the system would end us without a word."""
MOST_THREADS = 8
"""That the library answers with where the environment names no number."""


def damaged(message: str) -> FrontendError:
    """The error for a model file that does not hold what its format says."""
    return FrontendError(
        message,
        code="E_MODEL_FILE",
        hint="the file is damaged; save the model again from the source library",
    )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Puts the name of the file before what is said of its content; that memory is full for it is an error of the file, too."""
    try:
        yield
    except MemoryError as error:
        raise FrontendError(
            f"there is not enough memory to read {place(path)}", code="E_NO_MEMORY",
            hint="compile on a machine with more memory; a damaged file may only seem large",
        ) from error  # fmt: skip
    except FrontendError as error:
        error.message = f"{place(path)}: {error.message}"
        raise


def read_file(path: Path) -> bytes:
    """The bytes of a model file.

    Raises:
        FrontendError: when it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise FrontendError(
            f"cannot read {path}: {error.strerror or error}", code="E_MODEL_FILE", hint="check the path"
        ) from error


def check_memory(nbytes: int) -> None:
    """Refuses to begin what takes more memory than there is.

    Args:
        nbytes: that it takes at most.

    Raises:
        MemoryError: there are not so many.
    """
    if nbytes > MEMORY:
        raise MemoryError(f"{nbytes} bytes")


def check_json(data: bytes) -> None:
    """Refuses a document of JSON whose objects would take more memory than there is, by the marks that stand at each.

    Raises:
        MemoryError: as `check_memory`.
    """
    text = 2 if data.isascii() and b"\\u" not in data else 9  # one character of a text can give four bytes to all of it
    objects = 240 * data.count(b"{") + 200 * data.count(b"[") + 40 * data.count(b",") + 150 * data.count(b":")
    check_memory(text * len(data) + objects)


def integer(value: Any) -> int:
    """A whole number that a file gives as such or as text.

    Raises:
        TypeError, ValueError, OverflowError: it is none, or longer than one of 64 bits.
    """
    if isinstance(value, str) and len(value) > 20:
        raise ValueError(f"{len(value)} digits")
    return int(value)


def place(path: Path) -> str:
    """The path as text that every file can hold: names of files may have bytes that are no text."""
    return str(path).encode(errors="replace").decode()


def file_oracle(library: str, kind: str, data: bytes, methods: Sequence[str], path: Path) -> Oracle:
    """The methods of a model file, as the library itself computes them; none where it is not installed."""
    if importlib.util.find_spec(library) is None:
        return {}
    threads = str(min(len(os.sched_getaffinity(0)), MOST_THREADS))
    environment = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        "OMP_WAIT_POLICY": "passive",  # we compile meanwhile
        "OPENBLAS_NUM_THREADS": "1",
    }
    return SourceProcess(library, kind, data, methods, path, environment)


@dataclass(frozen=True)
class Tree:
    """One tree of a model file, checked: the arguments of `Ensemble.add_tree`.

    Attributes:
        left, right, feature, threshold, flags: (nodes,).
        values: (nodes,), or (nodes, outputs) where a leaf adds to all outputs.
        categories: for each categorical split the set of codes that go left, as `category_words` gives it.
    """

    left: Array
    right: Array
    feature: Array
    threshold: Array
    flags: Array
    values: Array
    categories: Mapping[int, Array]

    def add_to(self, ensemble: Ensemble, position: Array, output: int, values: Array | None = None) -> None:
        """Adds the tree to an ensemble.

        Args:
            position: for each feature of the model its column of the table.
            output: the column of the result that the (first) value is added to.
            values: in place of the tree's own.
        """
        ensemble.add_tree(
            self.left, self.right, position[self.feature], self.threshold, self.values if values is None else values,
            flags=self.flags, categories=self.categories, output=output,
        )  # fmt: skip


@dataclass(frozen=True)
class Table:
    """The table that a model reads.

    Attributes:
        x: (n, n_features), columns in the order of ``position``.
        position: for each feature of the model its column of x.
        spec: how the table becomes the graph's inputs.
    """

    x: Value
    position: Array
    spec: TableSpec


def table_input(
    b: GraphBuilder,
    dtype: DType,
    n_features: int,
    *,
    names: Sequence[str] | None,
    codings: Mapping[int, Coding],
    numbers: Literal["nan", "any"],
) -> Table:
    """Adds the graph inputs for a table: its numbers, and the codes of those columns that hold categories.

    A code equal to `MISSING_CODE` becomes NaN; all others become the number itself.
    """
    plain = [i for i in range(n_features) if i not in codings]
    coded = sorted(codings)
    parts: list[Value] = []
    feeds: list[ColumnFeed] = []
    if plain or not coded:
        parts.append(b.input("x", tensor(dtype, ("n", len(plain)))))
        feeds.append(ColumnFeed(tuple(plain)))
    if coded:
        codes = b.input("codes", tensor("i32", ("n", len(coded))))
        feeds.append(ColumnFeed(tuple(coded), tuple(codings[i] for i in coded)))
        nan = b.constant(np.nan, dtype=dtype)
        parts.append(b("where", b("eq", codes, MISSING_CODE), nan, b("cast", codes, dtype=dtype)))
    x = parts[0] if len(parts) == 1 else b("concat", *parts, axis=1)
    position = np.empty(n_features, np.int64)
    position[[*plain, *coded]] = np.arange(n_features)
    return Table(x, position, TableSpec(n_features, tuple(feeds), tuple(names) if names else None, numbers))


def one_column(b: GraphBuilder, value: Value) -> Value:
    """(n, 1) as (n,), as these libraries return a single output."""
    return b("reshape", value, shape=(value.type.shape[0],))


def two_classes(b: GraphBuilder, positive: Value) -> Value:
    """(n, 2) from the probability (n, 1) of the second class."""
    return b("concat", b("sub", 1.0, positive), positive, axis=1, hint="probabilities")


Kind = Literal["classifier", "regressor", "ranker"]


def finish(
    b: GraphBuilder, table: Table, methods: Sequence[tuple[MethodSpec, Value]], run: Sequence[str], kind: Kind
) -> Graph:
    """Freezes and verifies the graph; each method returns one value, in the order given.

    ``MethodSpec.outputs`` is filled in here.
    """
    values = [value for _, value in methods]
    bare = b.finish(values)
    specs = tuple(
        MethodSpec(m.name, (i,), m.labels, m.dtype, m.function, m.as_list, m.stack) for i, (m, _) in enumerate(methods)
    )
    signature = Signature(
        inputs=bare.signature.inputs,
        outputs=bare.signature.outputs,
        table=table.spec,
        methods=specs,
        run=tuple(run),
        kind=kind,
    )
    graph = bare.with_signature(signature)
    verify(graph)
    return graph


def with_categories(
    function: Callable[[Any], Any], codings: Mapping[int, Coding], names: Sequence[str] | None
) -> Callable[[Any], Any]:
    """A source's function that also takes tables whose category columns hold the plain values.

    The source itself wants pandas' category type there.
    """
    if not codings:
        return function

    def call(table: Any) -> Any:
        import pandas as pd

        frame = (
            table.copy()
            if isinstance(table, pd.DataFrame)
            else pd.DataFrame(table, columns=list(names) if names else None)
        )
        for i, name in enumerate(frame.columns):
            column = frame.iloc[:, i]
            if i in codings and not isinstance(column.dtype, pd.CategoricalDtype):
                known = list(codings[i].categories)
                others = [v for v in dict.fromkeys(column.dropna().tolist()) if v not in known]
                frame[name] = pd.Categorical(column, categories=known + others)
            elif column.dtype == object:
                frame[name] = column.astype(np.float64)
        return function(frame)

    return call
