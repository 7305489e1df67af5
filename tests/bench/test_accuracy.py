"""Code for a processor that is unknown, or not this one, is not measured."""

from __future__ import annotations

import platform

import pytest
from click.testing import CliRunner

from bench.accuracy import main


@pytest.mark.parametrize("processor", ["foo", "neoverse-n1" if platform.machine() == "x86_64" else "znver5"])
def test_processors_that_are_refused(processor: str) -> None:
    done = CliRunner().invoke(main, ["exp", "--processor", processor])
    assert done.exit_code == 2
    assert "Invalid value for --processor" in done.output
    assert "exp" not in done.stdout.partition("| `")[2]
