"""A package that is installed beside mlec adds frontends, passes, ops, lowerings and backends by entry points; a name must not be taken."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLUGIN = Path(__file__).parent / "plugin_pkg"

PASS = {"mlec.passes": "flip-subtractions = mlec_plugin:FlipSubtractions"}
OP = {
    "mlec.ops": "hard_swish = mlec_plugin_op:HARD_SWISH",
    "mlec.lowerings": "hard_swish = mlec_plugin_lowering:hard_swish",
}
BACKEND = {"mlec.backends": "counting = mlec_plugin_backend:CountingBackend"}

POSITION = """
from mlec.pipeline import PassPipeline
print([step.name for step in PassPipeline.parse("default,flip-subtractions")][-4:])
"""
GRAPH = "graph @g(%x: f32[n], %y: f32[n]) -> (f32[n]) { %d = sub(%x, %y) : f32[n] %e = neg(%d) : f32[n] return %e }"
USE = f"""
import mlec.ops
from mlec.ir import parse_graph
from mlec.pipeline import PassPipeline
graph, _ = PassPipeline.parse("flip-subtractions,dce", verify="numeric").run(parse_graph({GRAPH!r}))
print([node.name for node in graph.nodes])
"""
MODEL = """
import numpy as np, mlec
from mlec.ir import GraphBuilder, run_graph, tensor
def model(*ops):
    b = GraphBuilder("g")
    x = b.input("x", tensor("f32", ("n", 4)))
    y = b("matmul", x, b.constant(np.linspace(-3, 3, 160, dtype=np.float32).reshape(4, 40)))
    for op in ops:
        y = b(op, y)
    return b.finish([y])
x = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
x[0, 0], x[1, 1] = np.nan, np.inf
"""


class Installed:
    """Processes that have the plugin's package installed, with some entry points."""

    def __init__(self, folder: Path, groups: dict[str, str]) -> None:
        self.site, self.cwd = folder / "site", folder / "work"
        info = self.site / "mlec_plugin-1.0.dist-info"
        info.mkdir(parents=True)
        self.cwd.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mlec-plugin\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("".join(f"[{group}]\n{lines}\n" for group, lines in groups.items()))
        self.state = {"XDG_STATE_HOME": str(folder / "state")}

    def run(self, *command: str, installed: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs ``python`` with these words; without the plugin if so asked."""
        paths = [str(self.site), str(PLUGIN), str(ROOT)] if installed else [str(ROOT)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **self.state}
        return subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120, cwd=self.cwd
        )

    def code(self, code: str, installed: bool = True) -> str:
        """What the code prints."""
        done = self.run("-c", code, installed=installed)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def failure(self, code: str) -> str:
        """The error that the code ends with."""
        done = self.run("-c", code)
        assert done.returncode == 1, done.stdout
        return done.stderr


def test_a_package_that_pip_installs(tmp_path: Path) -> None:
    """As anybody would install it; the other tests have the same modules under entry points of their choice."""
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(PLUGIN, source, ignore=shutil.ignore_patterns("__pycache__"))
    pip = (sys._base_executable, "-m", "pip", "--python", sys.executable)  # an environment need not have one of its own
    install = (*pip, "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    done = subprocess.run([*install, "--target", str(site), str(source)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    shown = f"""{USE}
import mlec_plugin
from mlec import registry
print("counting" in registry.names("backends"), mlec_plugin.__file__)
"""
    done = subprocess.run(
        [sys.executable, "-c", shown], env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.stdout.splitlines() == ["['sub']", f"True {site / 'mlec_plugin.py'}"], done.stderr


# -- passes ----------------------------------------------------------------------------------------------------------


def test_a_plugins_pass_is_found_by_name(tmp_path: Path) -> None:
    assert Installed(tmp_path, PASS).code(USE) == "['sub']"


def test_the_pass_goes_where_it_says(tmp_path: Path) -> None:
    assert Installed(tmp_path, PASS).code(POSITION) == "['flip-subtractions', 'layout', 'fold-constants', 'fuse']"


def test_a_pass_under_another_name_is_refused(tmp_path: Path) -> None:
    plugin = Installed(tmp_path, {"mlec.passes": "other = mlec_plugin:FlipSubtractions"})
    error = plugin.failure("from mlec import registry; registry.load('passes', 'other')")
    assert "is registered as 'other', but calls itself 'flip-subtractions'" in error


def test_a_name_that_is_taken_names_both_owners(tmp_path: Path) -> None:
    plugin = Installed(tmp_path, {"mlec.passes": "fuse = mlec_plugin:FlipSubtractions"})
    assert plugin.code("from mlec import registry; print(registry.load('passes', 'dce').name)") == "dce", "others work"
    error = plugin.failure("from mlec import registry; registry.load('passes', 'fuse')")
    assert "two passes are named 'fuse'" in error
    assert "mlec.passes.fusion:FuseOperators and mlec_plugin:FlipSubtractions" in error


# -- ops and their lowerings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["cpu", "numpy"])
def test_a_plugins_op_from_graph_to_file(tmp_path: Path, target: str) -> None:
    """Fused behind the product, and by itself; with the text form, so that the parser finds the op too."""
    plugin = Installed(tmp_path, OP)
    compiled = plugin.code(f"""{MODEL}
from mlec.ir import parse_graph, print_graph
graph = model("hard_swish", "relu")
assert print_graph(parse_graph(print_graph(graph), graph.constants)) == print_graph(graph)
wanted = run_graph(graph, [x])[0]
for passes in ("O0", "default"):
    compiled = mlec.compile(graph, target={target!r}, passes=passes)
    np.testing.assert_allclose(compiled.run([x])[0], wanted, rtol=1e-5, atol=1e-5)
compiled.save("m.mle")
np.save("wanted.npy", wanted)
print(*(k["strategy"] for k in compiled.report.kernels))
""")
    assert ", then hard_swish relu" in compiled if target == "cpu" else compiled == ""
    run = f"{MODEL}\nnp.testing.assert_allclose(mlec.load('m.mle').run([x])[0], np.load('wanted.npy'), rtol=1e-5, atol=1e-5)"
    plugin.code(run)
    if target == "cpu":
        plugin.code(run, installed=False)  # machine code needs nothing of what made it
        missing = plugin.run("-c", f"{MODEL}\nmlec.load('m.mle').graph", installed=False)
        assert "there is no op 'hard_swish'" in missing.stderr
        assert "m.mle\n" in missing.stderr, missing.stderr[-900:]
        assert "(by an entry point in the group mlec.ops) may not be installed" in missing.stderr


def test_how_it_is_lowered_is_in_the_table(tmp_path: Path) -> None:
    plugin = Installed(tmp_path, OP)
    line = next(line for line in plugin.run("-m", "mlec", "ops").stdout.splitlines() if line.startswith("hard_swish "))
    assert line.split()[1:4] == ["loop", "loop", "reference"], "cpu, cuda, numpy"
    text = plugin.run("-m", "mlec", "ops", "hard_swish").stdout
    assert text.count("loop, mlec_plugin_lowering.py") == 2, "cpu and cuda"


def test_an_op_without_a_lowering_runs_where_references_do(tmp_path: Path) -> None:
    plugin = Installed(tmp_path, {"mlec.ops": OP["mlec.ops"]})
    error = plugin.failure(f"{MODEL}\nmlec.compile(model('hard_swish'), passes='O0')")
    assert "no lowering of hard_swish for cpu" in error
    plugin.code(f"{MODEL}\nmlec.compile(model('hard_swish'), target='numpy')")


@pytest.mark.parametrize(
    ("groups", "code", "message"),
    [
        ({"mlec.ops": "relu = mlec_plugin_op:HARD_SWISH"}, "model('relu')", "two ops are named 'relu': mlec's own and"),
        ({"mlec.ops": "hard_swoosh = mlec_plugin_op:HARD_SWISH"}, "model('hard_swoosh')", "calls itself 'hard_swish'"),
        ({"mlec.ops": "hard_swish = mlec_plugin_op:_reference"}, "model('hard_swish')", "declared as an op, but is a function"),
        ({"mlec.ops": "hard_swish = mlec_plugin_op:ABSENT"}, "model('hard_swish')", "mlec_plugin_op:ABSENT cannot be imported"),
        (
            {"mlec.lowerings": "relu = mlec_plugin_lowering:hard_swish"}, "mlec.compile(model('relu'))",
            "two packages lower 'relu': mlec.backends.tvm.scalar and mlec_plugin_lowering:hard_swish",
        ),
        (
            {"mlec.ops": OP["mlec.ops"], "mlec.lowerings": "hard_swish = mlec_plugin_op:_reference"},
            "mlec.compile(model('hard_swish'))", "declared as a lowering of 'hard_swish', but registers none",
        ),
    ],
    ids=["taken", "other name", "no op", "absent", "taken lowering", "no lowering"],
)  # fmt: skip
def test_wrong_ops_and_lowerings(tmp_path: Path, groups: dict[str, str], code: str, message: str) -> None:
    plugin = Installed(tmp_path, groups)
    assert message in plugin.failure(f"{MODEL}\n{code}")
    plugin.code(f"{MODEL}\n{code.replace(code.split(chr(39))[1], 'tanh')}")  # the others work
    listed = plugin.run("-m", "mlec", "ops").stdout
    assert "left out: " in listed
    assert "\ntanh " in listed


# -- backends --------------------------------------------------------------------------------------------------------

SAVE = f"""{MODEL}
compiled = mlec.compile(model("tanh"), target="counting:slowly")
np.save("x.npy", x)
np.save("wanted.npy", compiled.run([x])[0])
compiled.save("m.mle")
print(compiled.report.model["target"])
"""
LOAD = f"""{MODEL}
m = mlec.load("m.mle")
out = np.empty_like(np.load("wanted.npy"))
assert m.run([x], out=[out])[0] is out
np.testing.assert_allclose(out, np.load("wanted.npy"), rtol=1e-5, atol=1e-5)
print(type(m.executable).__name__, getattr(m.executable, "calls", None))
"""


def test_a_plugins_backend_from_compile_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")  # so that no cell is wrapped
    plugin = Installed(tmp_path, BACKEND)
    facts = plugin.code(SAVE)
    assert facts == str({"device": "cpu", "backend": "counting", "kind": "counting", "archs": ["slowly"]})
    assert plugin.code(LOAD) == "Counted 1"
    for words in (
        ("run", "m.mle", "x.npy", "-o", "y.npy"), ("bench", "m.mle", "--batch", "2", "--seconds", "0.02"),
        ("report", "m.mle", "-o", "m.html"), ("inspect", "m.mle", "--kernels"), ("verify", "m.mle"),
    ):  # fmt: skip
        done = plugin.run("-m", "mlec", *words)
        assert done.returncode == 0, done.stderr
        assert "None thread" not in done.stdout
    targets = plugin.run("-m", "mlec", "targets").stdout
    assert "an interpreter that counts" in targets
    assert "counting: " in plugin.run("-m", "mlec", "ops").stdout


def test_without_its_backend_a_file_is_compiled_here(tmp_path: Path) -> None:
    plugin = Installed(tmp_path, BACKEND)
    plugin.code(SAVE)
    done = plugin.run("-c", LOAD, installed=False)
    assert done.stdout.strip() == "Executable None", done.stderr
    assert done.stderr.strip().splitlines() == [
        "m.mle: its backend 'counting' is not installed; the graph is compiled on this machine instead"
    ]


def test_object_files_of_a_plugins_backend_need_no_plugin(tmp_path: Path) -> None:
    plugin = Installed(tmp_path, {"mlec.backends": "borrowing = mlec_plugin_backend:Borrowing"})
    plugin.code(SAVE.replace("counting:slowly", "borrowing"))
    done = plugin.run("-c", LOAD, installed=False)
    assert (done.stdout.strip(), done.stderr) == ("Executable None", "")


def test_a_kind_of_target_that_is_taken(tmp_path: Path) -> None:
    plugin = Installed(tmp_path, {"mlec.backends": "greedy = mlec_plugin_backend:Greedy"})
    error = plugin.failure(f"{MODEL}\nmlec.compile(model('tanh'), target='cuda')")
    assert (
        "2 backends serve the target 'cuda': mlec.backends.tvm.backend:TVMBackend, mlec_plugin_backend:Greedy" in error
    )
    plugin.code(f"{MODEL}\nmlec.compile(model('tanh'), target='cpu')")


def test_a_backend_that_does_not_import_stops_no_other(tmp_path: Path) -> None:
    plugin = Installed(tmp_path, {"mlec.backends": "counting = mlec_plugin_backend:Absent"})
    plugin.code(f"{MODEL}\nmlec.compile(model('tanh'))")
    error = plugin.failure(f"{MODEL}\nmlec.compile(model('tanh'), target='counting')")
    assert "the backend counting is left out: mlec_plugin_backend:Absent cannot be imported" in error
    assert "there is no target 'counting'; there are: cpu, cuda, numpy" in error


# -- frontends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ("broken = mlec_plugin:Absent", "the frontend broken is left out: mlec_plugin:Absent cannot be imported"),
        ("xgboost = mlec_plugin:Absent", "the frontend xgboost is left out: two frontends are named 'xgboost'"),
        ("broken = operator:itemgetter", "the frontend broken is left out: TypeError: itemgetter expected"),
    ],
    ids=["absent", "taken", "not built"],
)
def test_a_frontend_that_is_broken_stops_no_other(tmp_path: Path, point: str, message: str) -> None:
    done = Installed(tmp_path, {"mlec.frontends": point}).run(
        "-c",
        "import mlec; from sklearn.linear_model import LinearRegression\n"
        "print(len(mlec.lower(LinearRegression().fit([[0.0], [1.0]], [0.0, 1.0])).outputs))",
    )
    assert done.stdout.strip() == "1", done.stderr
    assert message in done.stderr


def test_a_backend_asks_for_its_pipeline_and_for_ops_in_fused_bodies(tmp_path: Path) -> None:
    plugin = Installed(tmp_path, {"mlec.backends": "narrow = mlec_plugin_backend:Narrow"})
    for made in ("mlec.compile(model('relu'), target='narrow')", "mlec.optimize(model('relu'), target='narrow')[1]"):
        show = f"report = {made}; print([p['name'] for p in getattr(report, 'report', report).passes])"
        assert "fuse" not in plugin.code(f"{MODEL}\n{show}")
    for passes in ("default", "O2"):
        error = plugin.failure(f"{MODEL}\nmlec.compile(model('relu', 'tanh'), target='narrow', passes={passes!r})")
        assert "the narrow backend has no lowering of tanh for narrow" in error
