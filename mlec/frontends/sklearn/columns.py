"""What flows between the steps of a scikit-learn model: columns, each of the source table or computed in the graph.

A column of the table stays `TableColumn` for as long as it is only picked, dropped, or filled in where it is missing. So a
column of strings can travel through a ColumnTransformer and an imputer to the encoder that codes it, though the graph itself
holds numbers only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from mlec.ir import Value
from mlec.signature import Scalar

Absent = Literal["any", "none", "nan"]


@dataclass(frozen=True)
class TableColumn:
    """A column of the source's input table.

    Attributes:
        position: of the column in the table.
        fill: what stands in for a missing value; None: nothing, it stays missing.
        missing: the value that is missing besides (or, for a number, instead of) NaN and None, e.g. ``"?"``.
        absent: which missing values of a column of strings are filled in, for the library tells None from NaN there.
        sparse: the source hands this column on in a sparse matrix, which matters to the steps that tell zeros stored from
            zeros left out.
    """

    position: int
    fill: Scalar = None
    missing: Scalar = None
    absent: Absent = "any"
    sparse: bool = False

    @property
    def origin(self) -> int | None:
        """The table column whose NaN this column can still hold."""
        return self.position if self.fill is None else None


@dataclass(frozen=True)
class ComputedColumn:
    """Column ``index`` of a matrix in the graph.

    Attributes:
        origin: the table column whose NaN this column can still hold, if there is one.
        sparse: as of a `TableColumn`.
    """

    matrix: Value
    index: int
    origin: int | None = None
    sparse: bool = False


Column = TableColumn | ComputedColumn
Columns = tuple[Column, ...]


def marked(columns: Columns, sparse: bool) -> Columns:
    """The same columns, in a sparse or in a dense matrix."""
    return tuple(column if column.sparse == sparse else replace(column, sparse=sparse) for column in columns)


def is_sparse(columns: Columns) -> bool:
    return any(column.sparse for column in columns)


def runs(columns: Columns, levels: Mapping[int, str]) -> list[tuple[int, int]]:
    """Splits into half-open ranges that can be read at once: adjacent columns of one matrix, or columns of the table (with the same
    entry in ``levels``).
    """
    found: list[tuple[int, int]] = []
    for i, column in enumerate(columns):
        if found and _continues(columns[i - 1], column, levels):
            found[-1] = (found[-1][0], i + 1)
        else:
            found.append((i, i + 1))
    return found


def _continues(before: Column, column: Column, levels: Mapping[int, str]) -> bool:
    if isinstance(before, TableColumn) and isinstance(column, TableColumn):
        return levels.get(before.position) == levels.get(column.position)
    if isinstance(before, TableColumn) or isinstance(column, TableColumn):
        return False
    return before.matrix is column.matrix and column.index == before.index + 1
