"""A compiled model as a directory that runs where neither mlec nor the compiler is installed: numpy and tvm-ffi are enough.

churn/
  model.mle           the file as it is, signature included
  model.py            `model.load()`; on the command line: python churn/model.py X.npy -o Y.npz
  bundle.json         the digest of the code that runs, and the Python and machine that all this is for
  requirements.txt    what is to be installed there
  lib/                this package, the linker of object files, and the runtime library out of the compiler's wheel
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mlec import __version__
from mlec.artifact import Artifact, TrustDigest, decide, read_model
from mlec.artifact.trust import WAYS_OUT, named_trust
from mlec.errors import RuntimeUnavailableError, SecurityError, UsageError, WriteError
from mlec.packaging import bundled_model
from mlec.runtime.library import find_library, load_library
from mlec.runtime.linker import link_in_memory
from mlec.runtime.objects import address_of

CARRIED: Final = ("msgspec", "ml_dtypes")
"""Small packages that go into the directory; all their files, licences included."""

LINKER: Final = "apache-tvm-ffi-orcjit"
"""The package that links what `mlec.runtime.linker` does not; it goes there for a model that needs it."""

INSTALLED: Final = ("numpy", "apache-tvm-ffi")
"""Packages that are to be installed where the directory goes."""


@dataclass(frozen=True)
class BundleResult:
    """What was written.

    Attributes:
        path: the directory.
        size_bytes: of all files in it.
        requirements: what is to be installed where it goes.
    """

    path: str
    size_bytes: int
    requirements: tuple[str, ...]


def bundle(
    path: str | os.PathLike[str], output: str | os.PathLike[str], *, trust: str | TrustDigest = "auto", encryption_key: Any = None
) -> BundleResult:  # fmt: skip
    """Writes a ``.mle`` file and what runs it into a directory of its own.

    Whoever runs the directory runs its code, so that the model's own code runs there by its digest, signed or not; here it must be
    trusted as for loading it. The directory is for this version of Python on this kind of machine; the model runs on processors that have
    what it was compiled for.

    Args:
        path: the ``.mle`` file, for CPUs.
        output: a directory that does not exist yet.
        trust, encryption_key: as for `mlec.load`.

    Raises:
        ArtifactError: for a file that is damaged, of another version, or not to be trusted (``E_UNTRUSTED_NATIVE``).
        UsageError: it holds no code for CPUs.
        WriteError: ``output`` exists, or cannot be written.
    """
    path, output = Path(path), Path(output)
    wanted = named_trust(trust)
    with Artifact.open(path, key=encryption_key) as artifact:
        program = read_model(artifact).program
        if program.device != "cpu" or not artifact.kernels:
            raise UsageError(
                f"{path} holds no machine code for CPUs, and a directory without a compiler could not run it",
                code="E_BUNDLE",
                hint="compile the model with target='cpu'",
            )
        decision = decide(artifact, wanted)
        if not decision.native:
            raise SecurityError(
                f"the code in {path} is not trusted here: {decision.reason}", code="E_UNTRUSTED_NATIVE", hint=WAYS_OUT
            )
        needs = tuple(_requirements(artifact))
        carried = CARRIED if _links_alone(artifact) else (*CARRIED, LINKER)
        trusted = f"sha256:{artifact.code_id}"
    if output.exists() or output.is_symlink():
        raise WriteError(
            f"{output} exists already", code="E_WRITE_EXISTS", hint="name a directory that does not exist yet"
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise _cannot_write(output, error) from error
    try:
        _fill(work, path, trusted, needs, carried)
        size = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
        work.chmod(0o755)
        work.rename(output)
    except OSError as error:
        raise _cannot_write(output, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return BundleResult(str(output), size, needs)


def _links_alone(artifact: Artifact) -> bool:
    """Whether the code for each of its processors can be linked without LLVM."""
    load_library()  # with the functions that the code calls
    targets = {blob.target for blob in artifact.kernels}
    parts = [[blob.data for blob in artifact.kernels if blob.target == target] for target in targets]
    try:
        return all(link_in_memory(objects, address_of) is not None for objects in parts)
    except (ValueError, PermissionError):  # some of it is for a machine of another kind, or damaged
        return False


def _fill(folder: Path, model: Path, trust: str, needs: tuple[str, ...], carried: tuple[str, ...]) -> None:
    library = folder / "lib"
    shutil.copytree(Path(__file__).parents[1], library / "mlec", ignore=shutil.ignore_patterns("__pycache__"))
    for name in carried:
        for source, place in _files_of(name):
            _copy(source, library / place)
    runtime = Path(find_library("tvm_runtime"))
    _copy(runtime, library / "tvm" / "lib" / runtime.name)
    for source, place in _files_of("apache-tvm"):
        if place.parts[0].endswith(".dist-info") and place.name in ("LICENSE", "NOTICE"):
            _copy(source, library / place)
    shutil.copy2(model, folder / "model.mle")
    shutil.copyfile(bundled_model.__file__, folder / "model.py")
    facts = {"mlec": __version__, "made_for": bundled_model.this_python(), "trust": trust}
    (folder / "bundle.json").write_text(json.dumps(facts, indent=1) + "\n")
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in needs))


def _copy(source: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, place)


def _files_of(distribution: str) -> Iterator[tuple[Path, Path]]:
    """The files of an installed package and their places in site-packages; without its scripts and compiled sources."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise RuntimeUnavailableError(
            f"the directory needs a copy of {distribution}, which is not installed", code="E_MISSING_PACKAGE",
            hint=f"pip install {distribution}",
        ) from error  # fmt: skip
    for file in files:
        place = Path(str(file))
        if ".." not in place.parts and "__pycache__" not in place.parts:
            yield Path(str(file.locate())), place


def _requirements(artifact: Artifact) -> Iterator[str]:
    """As pip reads them: of the release that is installed here, as the code was tried with that."""
    for name in INSTALLED:
        yield f"{name}=={importlib.metadata.version(name)}"
    if artifact.header.sig_alg or artifact.header.aead_alg:
        yield "cryptography>=45"
    if "zstd" in artifact.header.compressions and sys.version_info < (3, 14):
        yield "backports.zstd>=1.0"


def _cannot_write(output: Path, error: OSError) -> WriteError:
    return WriteError(
        f"cannot write {output}: {error.strerror or error}", code="E_WRITE", hint="check the place and its free space"
    )
