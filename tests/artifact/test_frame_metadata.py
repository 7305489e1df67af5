"""Files whose description of a DataFrame was changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.preprocessing import OrdinalEncoder

import mlec
from mlec.artifact.model import with_entries_unpacked
from mlec.errors import MlecError
from tests.artifact.surgery import Parts, join, split

TABLE = pd.DataFrame({"kind": ["a", "b", "a"], "size": [1, 2, 3]})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """A transformer that returns DataFrames. Its program is one for the interpreter."""
    columns = make_column_transformer((OrdinalEncoder(dtype=np.int16), ["kind"]), remainder="passthrough")
    path = tmp_path_factory.mktemp("model") / "m.mle"
    mlec.compile(columns.set_output(transform="pandas").fit(TABLE), progress=False).save(path)
    parts = split(path.read_bytes())
    parts.kernels.clear()
    parts.metadata["program"] = {**with_entries_unpacked(parts.metadata)["program"], "backend": "numpy"}
    parts.metadata["targets"][0]["cpu_flags"] = []
    return parts


def test_the_frame_is_that_of_the_source(model: Parts, tmp_path: Path) -> None:
    (tmp_path / "m.mle").write_bytes(join(model))
    with mlec.load(tmp_path / "m.mle") as loaded:
        frame = loaded.transform(TABLE)
    assert list(frame.columns) == ["ordinalencoder__kind", "remainder__size"]
    assert [str(dtype) for dtype in frame.dtypes] == ["int16", "int64"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("columns", ["one"]), ("columns", []), ("dtypes", ["int16"]), ("dtypes", ["int16", "no dtype"]), ("passed", [None, 7]),
        ("passed", [None, -1]), ("passed", [None, "unknown"]), ("passed", [None, None, 0]), ("library", "tables"),
    ],
)  # fmt: skip
def test_a_frame_that_does_not_fit_is_refused(model: Parts, tmp_path: Path, key: str, value: Any) -> None:
    (frame,) = (m["frame"] for m in model.metadata["signature"]["methods"])
    kept = frame.get(key)
    frame[key] = value
    try:
        (tmp_path / "m.mle").write_bytes(join(model))
    finally:
        frame[key] = kept
    with pytest.raises(MlecError) as refused:
        mlec.load(tmp_path / "m.mle")
    assert refused.value.code == "E_METADATA"
