"""Damaged model files: ``python -m tests.frontends.model_mutants 100000 [seed] [kind ...]`` for as many as one likes.

Files that a library reads in a process of its own (``pt2``, ``pt``, ``skops``) are read so here as well, where what checks them first lets
them through: in a fork each, which dies with what it does.
"""

from __future__ import annotations

import importlib
import io
import json
import multiprocessing
import random
import struct
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import xgboost as xgb

from mlec.errors import MlecError
from mlec.frontends.archives import checked_archive, read_json
from mlec.frontends.base import LowerOptions
from mlec.frontends.select import load_model_file
from mlec.frontends.torch_archive import check_program_archive
from tests.frontends.forked import outcome

MARK = "executed-by-a-model-file"
"""The file that appears in the working directory if text of a model file is executed."""
_NUMBERS = (0, -1, 1, 7, 2**31 - 1, 2**31, -(2**31), 2**63, 2**64, 10**400, 1e308, -0.0, float("nan"), float("inf"))
_TEXTS = (
    "",
    "x" * 10_000,
    "\0",
    "../../etc/passwd",
    "NaN",
    f"__import__('pathlib').Path('{MARK}').touch()",
    "torch.os.system",
)


def corpus(folder: Path) -> dict[str, bytes]:
    """A small valid file of each kind."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 3)), rng.integers(0, 3, 60)
    booster = xgb.XGBClassifier(n_estimators=2, max_depth=2).fit(x, y).get_booster()
    light = lgb.LGBMClassifier(n_estimators=2, min_child_samples=5, verbose=-1).fit(x, y)
    found = {
        "json": bytes(booster.save_raw("json")),
        "ubj": bytes(booster.save_raw("ubj")),
        "lightgbm": light.booster_.model_to_string().encode(),
    }
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
    program = torch.export.export(model, (torch.ones(2, 3),), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program, folder / "m.pt2")
    torch.save(torch.nn.BatchNorm1d(3).state_dict(), folder / "m.pt")
    from sklearn import ensemble, impute, pipeline, preprocessing, svm
    from skops import io as skops

    steps = impute.SimpleImputer(), preprocessing.StandardScaler(), ensemble.RandomForestClassifier(2, max_depth=2)
    return {
        **found,
        "pt2": (folder / "m.pt2").read_bytes(),
        "pt": (folder / "m.pt").read_bytes(),
        "skops": skops.dumps(pipeline.make_pipeline(*steps).fit(x, y)),
        "skops-svm": skops.dumps(svm.SVC(max_iter=5).fit(x, y)),
        "skops-boost": skops.dumps(ensemble.HistGradientBoostingRegressor(max_iter=2, max_leaf_nodes=4).fit(x, y)),
    }


def mutant(rng: random.Random, kind: str, data: bytes) -> bytes:
    """The file with one to three changes: of bytes, of its length, or of the values of its JSON."""
    for _ in range(rng.randint(1, 3)):
        if kind == "json" and rng.random() < 0.7:
            data = _changed_json(rng, data)
        elif kind.startswith(("pt", "skops")) and rng.random() < 0.9:
            data = _changed_archive(rng, data) if rng.random() < 0.9 else _changed_records(rng, data)
        else:
            data = _changed_bytes(rng, data)
    return data


def _changed_bytes(rng: random.Random, data: bytes) -> bytes:
    at, count = rng.randrange(len(data) + 1), min(len(data), rng.choice((1, 1, 2, 4, 16, 200)))
    return (
        rng.choice(
            (
                data[:at],
                data[:at] + data[at + count :],
                data[:at] + rng.randbytes(count) + data[at + count :],
                data[:at] + data[at : at + count] * rng.choice((2, 50)) + data[at + count :],
                data[:at] + rng.choice((b"-1", b"9" * 30, b"\xff" * 8, b"nan", b"[" * 5000, b"")) + data[at:],
            )
        )
        or b"\0"
    )


def _changed_json(rng: random.Random, data: bytes) -> bytes:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return _changed_bytes(rng, data)
    at = document
    while isinstance(at, dict | list) and at:
        key: Any = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
        if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.9:
            at = at[key]
            continue
        new: Any = rng.choice(
            (rng.choice(_NUMBERS), rng.choice(_TEXTS), str(rng.choice(_NUMBERS)), None, True, [], {}, [at[key]] * 3, at)
        )
        if rng.random() < 0.2:
            del at[key]
        else:
            at[key] = json.loads(json.dumps(new)) if new is at else new
        break
    return json.dumps(document).encode()


def _changed_archive(rng: random.Random, data: bytes) -> bytes:
    """Of a zip archive one entry changed, dropped, renamed or added; what is no archive any more, by its bytes."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [(name, archive.read(name)) for name in archive.namelist()]
    except Exception:
        return _changed_bytes(rng, data)
    if not entries:
        return _changed_bytes(rng, data)
    i = rng.randrange(len(entries))
    name, content = entries[i]
    what = rng.random()
    if what < 0.5:
        jsons = [j for j, (entry, _) in enumerate(entries) if entry.endswith(".json")]
        i = rng.choice(jsons or [i])
        entries[i] = (entries[i][0], _changed_json(rng, entries[i][1]) if jsons else _changed_bytes(rng, content))
    elif what < 0.7:
        entries[i] = (name, _changed_numbers(rng, content) if rng.random() < 0.7 else _changed_bytes(rng, content))
    elif what < 0.8:
        del entries[i]
    else:
        entries[i] = (rng.choice(("../x", "/x", name + "2", name.upper(), "data/weights/x.pt", "a:b")), content)
    changed = io.BytesIO()
    with zipfile.ZipFile(changed, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for entry, body in entries:
            archive.writestr(entry, body)
    return changed.getvalue()


def _changed_numbers(rng: random.Random, data: bytes) -> bytes:
    """Some of the numbers at the end: elements of an array, where it is one."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        number = struct.pack("<q", rng.choice((0, -1, 1, 2, 7, 2**31 - 1, 2**62, -(2**63), rng.randrange(100))))
        if len(data) >= 8:
            at = rng.randrange(0, len(data) - 7)
            at -= (at - len(data)) % 8 if rng.random() < 0.8 else 0
            changed[max(at, 0) : max(at, 0) + 8] = number
    return bytes(changed)


def _changed_records(rng: random.Random, data: bytes) -> bytes:
    """A field of the list of entries at the end of an archive: flags, method, checksum, sizes, place of the content."""
    starts = [i for i in range(len(data)) if data.startswith((b"PK\1\2", b"PK\5\6", b"PK\3\4"), i)]
    if not starts:
        return _changed_bytes(rng, data)
    at = rng.choice(starts) + rng.choice((4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 42))
    value = struct.pack(
        "<I", rng.choice((0, 1, 8, 12, 99, 0xFFFF, 0xFFFFFFFF, 0x7FFFFFFF, rng.randrange(2 * len(data))))
    )
    return (
        data[:at] + value[: rng.choice((2, 4))] + data[at + 4 :]
        if rng.random() < 0.1
        else data[:at] + value + data[at + 4 :]
    )


def read(kind: str, path: Path, whole: bool = False) -> str:
    """What becomes of a file: ``read``, or the code of the error of ours that refuses it; any other error goes through.

    Args:
        kind: of the file that it was made of.
        whole: also what its library makes of it, in a fork.
    """
    from mlec.frontends.fx import TorchFrontend
    from mlec.frontends.sklearn import SklearnFrontend

    try:
        if kind == "pt2":
            with path.open("rb") as file:
                check_program_archive(file, path)
            return outcome(TorchFrontend(), "program", path) if whole else "read"
        if kind == "pt":
            with path.open("rb") as file, checked_archive(file, path):
                pass
            return outcome(TorchFrontend(), "weights", path) if whole else "read"
        if kind.startswith("skops"):
            with path.open("rb") as file, checked_archive(file, path) as archive:
                read_json(archive, "schema.json", path)
            return outcome(SklearnFrontend(), "skops", path) if whole else "read"
        frontend, model = load_model_file(path, LowerOptions())
        if frontend is not None:
            frontend.lower(model, LowerOptions())
    except MlecError as error:
        return error.code
    return "read"


def main() -> None:
    """Exits with 1 if there is any defect, which is kept."""
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000
    kinds = sys.argv[3:]
    rng = random.Random(seed)
    defects = 0
    outcomes: dict[tuple[str, str], int] = {}
    with tempfile.TemporaryDirectory() as folder:
        with multiprocessing.get_context("fork").Pool(
            1
        ) as other:  # no thread of the libraries lives on in forks of this process
            files = other.apply(corpus, (Path(folder),))
        for library in (
            "torch.export",
            "sklearn",
            "skops.io",
            "mlec.frontends.sklearn.lowering",
            "mlec.frontends.fx_lower",
        ):
            importlib.import_module(library)
        for number in range(count):
            kind = rng.choice(kinds or list(files))
            path = Path(folder) / "mutant"
            path.write_bytes(mutant(rng, kind, files[kind]))
            try:
                found = read(kind, path, whole=True)
            except KeyboardInterrupt:
                count = number
                break
            except Exception as error:
                found = f"DEFECT: {type(error).__name__}: {error}"
            if found.startswith("DEFECT"):
                defects += 1
                kept = Path("fuzz-out") / f"model-{seed}-{number}.{kind}"
                kept.parent.mkdir(exist_ok=True)
                kept.write_bytes(path.read_bytes())
                print(f"{kept}: {found}", flush=True)
            outcomes[kind, found] = outcomes.get((kind, found), 0) + 1
    for (kind, found), times in sorted(outcomes.items()):
        print(f"{kind}: {found}: {times}")
    print(f"models: {count} mutants, {defects} defects")
    raise SystemExit(1 if defects or Path(MARK).exists() else 0)


if __name__ == "__main__":
    main()
