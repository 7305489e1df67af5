"""What this version offers: one table, and what is not in it is refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

import mlec
from mlec import registry
from mlec.capabilities import (
    COMPILABLE_FILES,
    MODEL_FILES,
    PRECISIONS,
    TARGETS,
)
from mlec.errors import FrontendError, UsageError


def test_ways_to_save_are_checked_before_compiling(tmp_path: Path) -> None:
    """The model could not even be lowered: nobody looks at it."""
    done = mlec.export_model(object(), tmp_path / "m.mle", compression="lz4")
    assert (done["success"], done["code"]) == (False, "E_USAGE")
    assert "'zstd'" in done["error"]
    for plain in ("none", None, "zstd"):
        done = mlec.export_model(object(), tmp_path / "m.mle", compression=plain)
        assert "no frontend lowers builtins.object" in done["error"]
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_precision_names_all() -> None:
    with pytest.raises(UsageError, match=", ".join(PRECISIONS)):
        mlec.compile(object(), precision="fp17")


def test_every_target_form_is_one() -> None:
    for backend, forms in TARGETS.items():
        for form in forms:
            assert registry.target_kinds()[mlec.Target.parse(form).kind] == (backend,)


def test_every_frontend_says_which_files_it_reads(tmp_path: Path) -> None:
    assert set(MODEL_FILES) == set(registry.FRONTENDS)
    (tmp_path / "m.bin").write_bytes(b"nothing that is known")
    with pytest.raises(FrontendError) as caught:
        mlec.compile(tmp_path / "m.bin")
    assert all(files in str(caught.value.hint) for files in COMPILABLE_FILES.values())
