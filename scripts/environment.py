"""Makes `.venv`: the project, installed for editing, with everything that its demo and its tests need, at pinned versions.

Needs Python 3.11 with pip, and nothing else. Does nothing when the environment is there and nothing it depends on has changed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "mlec-environment"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
VERSIONS = ((3, 11),)


def ready() -> Path:
    """The environment's Python interpreter; makes the environment first where that is needed."""
    if sys.version_info[:2] not in VERSIONS:
        _restart_with_a_known_python()
    wanted = _state()
    if STAMP.exists() and STAMP.read_text() == wanted and PYTHON.exists():
        return PYTHON
    _say("setting up .venv: once, a few minutes")
    shutil.rmtree(VENV, ignore_errors=True)
    # Without pip: what makes it in a new environment (ensurepip) is not part of every distribution's Python.
    _run(sys.executable, "-m", "venv", "--without-pip", str(VENV))
    _say("1 of 2: torch")
    _install_torch()
    _say("2 of 2: mlec and everything else")
    _pip("install", "-c", "constraints.txt", "-e", ".[test]")
    STAMP.write_text(wanted)
    return PYTHON


def run(*command: str) -> None:
    """Runs a command of the environment in the project's directory; a failure ends this process with the same code."""
    done = subprocess.run([str(ready()), *command], cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)


def _state() -> str:
    """Everything that the environment depends on, in one digest."""
    digest = hashlib.sha256(f"{ROOT} {sys.version_info[:2]}".encode())
    for name in ("pyproject.toml", "constraints.txt", "scripts/environment.py"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def _install_torch() -> None:
    """torch first: the build without CUDA where the package index has it, since the plain one can bring gigabytes along."""
    pin = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    if _pip("install", "-c", "constraints.txt", f"{pin}+cpu", check=False, quiet=True):
        _pip("install", "-c", "constraints.txt", pin)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _pip(*arguments: str, check: bool = True, quiet: bool = False) -> int:
    command = [sys.executable, "-m", "pip", "--python", str(PYTHON), *arguments]
    # Errors only: indexes that lack some of the packages are no news.
    options = ["--quiet", "--quiet", "--disable-pip-version-check", "--no-input"]
    return _run(*command, *options, check=check, quiet=quiet)


def _run(*command: str, check: bool = True, quiet: bool = False) -> int:
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL if quiet else None)
    if check and done.returncode:
        sys.exit(f"setting up .venv failed: {' '.join(command)}")
    return done.returncode


def _restart_with_a_known_python() -> None:
    """Runs the same script again with a Python that the pinned versions have wheels for."""
    for major, minor in VERSIONS:
        found = shutil.which(f"python{major}.{minor}")
        if found:
            sys.exit(subprocess.run([found, *sys.argv]).returncode)
    known = " or ".join(f"{major}.{minor}" for major, minor in VERSIONS)
    sys.exit(
        f"this is Python {sys.version.split()[0]}; the pinned packages have wheels for Python {known}: install one of them"
    )
