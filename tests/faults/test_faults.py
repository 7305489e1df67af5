"""Each scenario, a few times, in a process of its own; ``python -m tests.faults`` tries them more often."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.faults.scenarios import available


@pytest.mark.parametrize("name", available())
def test_scenario(name: str) -> None:
    words = [sys.executable, "-m", "tests.faults", name, "--tries", str(available()[name].quick)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{name}: ")
