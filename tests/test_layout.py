"""The shape of the project: packages, names, and which part may import which."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TREES = {"mlec": ROOT / "mlec", "mlec.passes": ROOT / "passes", "mlec.backends": ROOT / "backends"}

EVERYWHERE = ("mlec.errors", "mlec.hidden", "mlec.wording")
"""What each part may import of mlec."""

# What else it may import, besides itself. The first entry that a module's name starts with counts.
ALLOWED = {
    "mlec.errors": (),
    "mlec.hidden": (),
    "mlec.wording": (),
    "mlec.capabilities": (),
    "mlec.measuring.timing": (),
    "mlec.progress": (),
    "mlec.processor": (),
    "mlec.signature": (),
    "mlec.artifact": ("mlec.signature", "mlec.runtime"),
    "mlec.runtime": ("mlec.signature",),
    "mlec.target": ("mlec.registry",),
    "mlec.measuring.state_files": ("mlec.artifact",),
    "mlec.measuring.tuning": ("mlec.artifact", "mlec.measuring.state_files", "mlec.processor"),
    "mlec.ir": ("mlec.signature", "mlec.registry"),
    "mlec.ops": ("mlec.ir", "mlec.signature"),
    "mlec.registry": ("mlec.capabilities",),
    "mlec.tolerance": ("mlec.ir",),
    "mlec.reduction": ("mlec.ir",),
    "mlec.instruments": ("mlec.ir", "mlec.tolerance", "mlec.reduction", "mlec.pipeline"),
    "mlec.pipeline": ("mlec.ir", "mlec.registry", "mlec.tolerance", "mlec.instruments", "mlec.passes.pipelines"),
    "mlec.measuring.machine": (
        "mlec.artifact", "mlec.registry", "mlec.runtime", "mlec.measuring.state_files", "mlec.measuring.tuning",
        "mlec.target",
    ),
    "mlec.difference": ("mlec.ir",),
    "mlec.passes": ("mlec.ir", "mlec.ops", "mlec.pipeline", "mlec.signature", "mlec.difference"),
    "mlec.backends": (
        "mlec.ir", "mlec.ops", "mlec.pipeline", "mlec.signature", "mlec.target", "mlec.runtime", "mlec.registry", "mlec.capabilities",
        "mlec.measuring.timing", "mlec.measuring.tuning", "mlec.processor",
    ),
    "mlec.frontends": (
        "mlec.ir", "mlec.ops", "mlec.pipeline", "mlec.signature", "mlec.registry", "mlec.capabilities", "mlec.artifact.json_safe",
    ),
}  # fmt: skip
# The rest stands above all of these. On top, each above the one before it:
LAYERS = ("mlec.api", "mlec.demo", "mlec.cli", "mlec.__main__")

# Where a package of others may be imported.
HOMES = {
    "tvm": ("mlec.backends.tvm",),
    "torch": ("mlec.frontends", "mlec.demo"),
    "sklearn": ("mlec.frontends", "mlec.demo"),
    "xgboost": ("mlec.frontends", "mlec.demo"),
    "lightgbm": ("mlec.frontends", "mlec.demo"),
    "treelite": ("mlec.frontends",),
    "skops": ("mlec.frontends",),
    "cryptography": ("mlec.artifact",),
    "backports": ("mlec.artifact",),
}
FRAMEWORKS = tuple(HOMES)


@cache
def modules() -> dict[str, Path]:
    """Every module of the project by its name, the links left out."""
    found = {}
    for prefix, top in TREES.items():
        for file in sorted(top.rglob("*.py")):
            parts = file.relative_to(top).with_suffix("").parts
            if prefix == "mlec" and parts[0] in ("passes", "backends"):
                continue
            name = ".".join((prefix, *parts)).removesuffix(".__init__")
            found[name] = file
    return found


def imports(name: str, file: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports, and whether it does so when it is itself imported.

    ``from package import name`` counts as the import of ``package.name`` where that is a module.
    """
    tree = ast.parse(file.read_text(), str(file))
    late = {
        node
        for part in ast.walk(tree)
        if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)) or _is_type_checking(part)
        for node in ast.walk(part)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node not in late
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: write the whole name of the module"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner if inner in modules() else str(node.module)), node not in late


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_the_list_of_packages_is_the_tree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = project["tool"]["setuptools"]["packages"]
    assert listed == sorted(listed)
    assert set(listed) == {name for name, file in modules().items() if file.name == "__init__.py"}
    folders = {file.parent for file in modules().values()}
    assert all((folder / "__init__.py").exists() for folder in folders)


def test_the_links_lead_to_the_two_folders() -> None:
    for name in ("passes", "backends"):
        link = ROOT / "mlec" / name
        assert link.is_symlink()
        assert link.resolve() == (ROOT / name).resolve()


@pytest.mark.parametrize("name", modules(), ids=str)
def test_imports_point_one_way(name: str) -> None:
    rule = next((package for package in ALLOWED if within(name, (package,))), None)
    layer = next((i for i, package in enumerate(LAYERS) if within(name, (package,))), -1)
    if name == "mlec":
        return  # names the public parts of all the others, and imports them when they are used
    for imported, _ in imports(name, modules()[name]):
        where = f"{name} imports {imported}"
        assert not within(imported, ("passes", "backends")), where
        if rule is not None and within(imported, ("mlec",)):
            assert within(imported, (rule, *EVERYWHERE, *ALLOWED[rule])), where
        assert not within(imported, LAYERS[layer + 1 :]), where
        home = HOMES.get(imported.partition(".")[0])
        assert home is None or within(name, home), where


def test_every_rule_is_about_something() -> None:
    for package in (*ALLOWED, *LAYERS):
        assert any(within(name, (package,)) for name in modules()), package


def loaded_after(code: str) -> set[str]:
    """The modules that a new interpreter holds after it ran the code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    return set(done.stdout.split())


@pytest.mark.parametrize("code", ["import mlec", "import mlec, mlec.api, mlec.cli, mlec.runtime, mlec.artifact"])
def test_importing_mlec_is_light(code: str) -> None:
    loaded = loaded_after(code)
    assert not loaded & {*FRAMEWORKS, "pandas", "passes", "backends"}


NOT_NEEDED = {
    "tvm_ffi", "tvm_ffi.core", "ml_dtypes", "json", "dataclasses", "threading", "importlib.metadata", "email", "tempfile", "statistics",
    "tracemalloc", "secrets", "subprocess", "concurrent.futures",
    "mlec.runtime.vm", "mlec.runtime.measure", "mlec.runtime.metrics", "mlec.report", "mlec.registry", "mlec.ir",
    "mlec.artifact.writer", "mlec.artifact.signing", "mlec.artifact.encryption", "mlec.artifact.keyring", "mlec.artifact.recovery",
}  # fmt: skip
"""Of the standard library and of ours, what a model for the CPU that this user built is loaded and run without."""


def test_loading_and_running_needs_no_framework(tmp_path: Path) -> None:
    save = f"""
import numpy as np, mlec, mlec.ops
from mlec.ir import GraphBuilder, tensor
b = GraphBuilder("g")
x = b.input("x", tensor("f32", ("n", 3)))
g = b.finish([b("relu", b("matmul", x, b.constant(np.ones((3, 2), np.float32))))])
mlec.compile(g).save({str(tmp_path / "g.mle")!r})
"""
    run = f"""
import numpy as np, mlec
y = mlec.load({str(tmp_path / "g.mle")!r}).run([np.ones((5, 3), np.float32)])
assert (y[0] == 3).all()
"""
    loaded_after(save)
    loaded = loaded_after(run)
    assert not loaded & {*FRAMEWORKS, "pandas", "passes", "backends"}
    assert not [name for name in loaded if name.startswith("mlec.passes.")], "a pass takes milliseconds of each start"
    assert not loaded & NOT_NEEDED - loaded_after("import numpy"), "each takes milliseconds of each start"
