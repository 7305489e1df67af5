"""DataFrames as the results of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlec.runtime.program import Array
from mlec.signature import FrameSpec


def data_frame(spec: FrameSpec, array: Any, table: Any) -> Any:
    """The result of a transformer as a DataFrame.

    Args:
        spec: which library's, and its columns.
        array: (n, columns).
        table: what was transformed; a DataFrame of pandas gives its index, and one of the same library the dtypes of the columns that
            only pass through.
    """
    dtypes = spec.dtypes or (array.dtype.name,) * len(spec.columns)
    columns = {name: array[:, i].astype(dtypes[i], copy=False) for i, name in enumerate(spec.columns)}
    passed = {name: place for name, place in zip(spec.columns, spec.passed, strict=False) if place is not None}
    if spec.library == "polars":
        import polars

        if not isinstance(table, polars.DataFrame):
            return polars.DataFrame(columns | _as_in_pandas(columns, passed, table))
        polars_frame: Any = polars.DataFrame(columns)
        types: dict[str, Any] = {name: table[:, place].dtype for name, place in passed.items()}
        return polars_frame.cast({name: dtype for name, dtype in types.items() if dtype.is_numeric()})
    import pandas

    if not isinstance(table, pandas.DataFrame):
        return pandas.DataFrame(array if len(columns) < len(spec.columns) else columns, columns=list(spec.columns))
    frame = pandas.DataFrame(array, columns=list(spec.columns), index=table.index)
    if len(columns) < len(spec.columns):  # a name that occurs twice
        return frame
    columns |= _as_in_pandas(columns, passed, table)
    return frame.astype({name: column.dtype for name, column in columns.items()})


def _as_in_pandas(columns: Mapping[str, Array], passed: Mapping[str, str | int], table: Any) -> dict[str, Array]:
    """The columns that a DataFrame of pandas passed through, in its dtypes; none for another table."""
    if not hasattr(table, "iloc"):
        return {}
    dtypes = {n: table.dtypes[p] if isinstance(p, str) else table.dtypes.iloc[p] for n, p in passed.items()}
    return {n: columns[n].astype(d) for n, d in dtypes.items() if isinstance(d, np.dtype) and d.kind in "iufb"}
