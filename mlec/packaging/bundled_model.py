"""A model in a directory of its own. As a module: `load()` gives it. As a script: python model.py X.npy -o Y.npz"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import zipfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def this_python() -> list[str]:
    """What compiled modules are made for."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return [sys.implementation.name, version, sys.platform, platform.machine()]


def load(**options: Any) -> Any:
    """The model, ready to run.

    Its code runs because of its digest in ``bundle.json``: a changed model does not load.

    Args:
        options: as of ``mlec.load``.

    Raises:
        RuntimeError: the directory was made for another Python or machine, or is not whole.
        mlec.MlecError: as of ``mlec.load``.
    """
    return _mlec().load(HERE / "model.mle", **{"trust": _facts()["trust"], **options})


def _facts() -> dict[str, Any]:
    path = HERE / "bundle.json"
    try:
        facts = json.loads(path.read_text())
        return {name: facts[name] for name in ("made_for", "trust")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not as `mlec bundle` writes it"
        raise RuntimeError(f"{path} cannot be read: {why}; copy the whole directory, or make it again") from error


def _mlec() -> Any:
    """The package in this directory, or the one that the process has imported already."""
    facts = _facts()
    if facts["made_for"] != this_python():
        made_for, here = " ".join(facts["made_for"]), " ".join(this_python())
        raise RuntimeError(f"{HERE} was made for {made_for}, here is {here}; make it again there: mlec bundle")
    library = str(HERE / "lib")
    if library not in sys.path:
        sys.path.insert(0, library)
    import mlec

    return mlec


def main() -> None:
    """Runs the model on arrays in a file."""
    import numpy as np

    parser = argparse.ArgumentParser(description="Runs the model in this directory.")
    parser.add_argument("input", help="a .npy, or a .npz with one array for each input")
    parser.add_argument("-o", "--output", help="a .npz for the results, which are printed without it")
    parser.add_argument("--method", help="of the source, e.g. predict_proba; by default its main results")
    arguments = parser.parse_args()
    try:
        mlec = _mlec()
    except RuntimeError as error:
        raise SystemExit(f"error: {error}") from None
    try:
        given = np.load(arguments.input, allow_pickle=False)
        inputs: Any = given if isinstance(given, np.ndarray) else dict(given)
        model = load()
        results = [model.source_method(arguments.method)(inputs)] if arguments.method else model.run(inputs)
        if arguments.output:
            named: dict[str, Any] = {f"output_{i}": np.asarray(result) for i, result in enumerate(results)}
            np.savez(arguments.output, **named)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, mlec.MlecError) as error:
        raise SystemExit(f"error: {error}") from None
    if not arguments.output:
        for result in results:
            print(result)


if __name__ == "__main__":
    main()
