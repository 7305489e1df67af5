"""DataFrames as the results of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np

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

        polars_frame: Any = polars.DataFrame(columns)
        if not isinstance(table, polars.DataFrame):
            return polars_frame
        types: dict[str, Any] = {name: table[:, place].dtype for name, place in passed.items()}
        return polars_frame.cast({name: dtype for name, dtype in types.items() if dtype.is_numeric()})
    import pandas

    if not isinstance(table, pandas.DataFrame):
        return pandas.DataFrame(array if len(columns) < len(spec.columns) else columns, columns=list(spec.columns))
    frame = pandas.DataFrame(array, columns=list(spec.columns), index=table.index)
    if len(columns) < len(spec.columns):  # a name that occurs twice
        return frame
    wanted: dict[str, Any] = {name: column.dtype for name, column in columns.items()}
    for name, place in passed.items():
        dtype = table.dtypes[place] if isinstance(place, str) else table.dtypes.iloc[place]
        if isinstance(dtype, np.dtype) and dtype.kind in "iufb":
            wanted[name] = dtype
    return frame.astype(wanted)
