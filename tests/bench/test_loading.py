"""What the bench of loading asks the system, and what its processes say."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

from bench.loading import BEGIN, END, _fresh, _pages


def test_pages_of_a_file_and_copies_of_them(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(4 * mmap.PAGESIZE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as private:
        assert private[3 * mmap.PAGESIZE] == 0
        private[0] = 1
        found = _pages(os.getpid(), path)
    assert found["Anonymous"] == mmap.PAGESIZE
    assert 2 * mmap.PAGESIZE <= found["Rss"] <= 4 * mmap.PAGESIZE
    assert 0 < found["Pss"] <= found["Rss"]


def test_a_fresh_process_reports(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones(3))
    seconds, memory = _fresh(
        BEGIN + "assert x.sum() == 3" + END, ("file", "predict", str(tmp_path / "x.npy")), tmp_path
    )
    assert seconds["all"] > 0
    assert memory > 1 << 20
    assert any((tmp_path / "modules").rglob("*.pyc"))
