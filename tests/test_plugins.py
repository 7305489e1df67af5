"""A package that is installed beside mlec adds passes by entry points; its name must not be taken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PLUGIN = Path(__file__).parent / "plugin_pkg"
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


def with_entry_point(folder: Path, name: str, code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process that has the plugin installed under a name."""
    info = folder / "mlec_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mlec-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[mlec.passes]\n{name} = mlec_plugin:FlipSubtractions\n")
    paths = [str(folder), str(PLUGIN), str(Path(__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_a_plugins_pass_is_found_by_name(tmp_path: Path) -> None:
    done = with_entry_point(tmp_path, "flip-subtractions", USE)
    assert done.stdout.strip() == "['sub']", done.stderr


def test_the_pass_goes_where_it_says(tmp_path: Path) -> None:
    done = with_entry_point(tmp_path, "flip-subtractions", POSITION)
    assert done.stdout.strip() == "['flip-subtractions', 'layout', 'fold-constants', 'fuse']", done.stderr


def test_a_pass_under_another_name_is_refused(tmp_path: Path) -> None:
    done = with_entry_point(tmp_path, "other", "from mlec import registry; registry.load('passes', 'other')")
    assert "is registered as 'other', but calls itself 'flip-subtractions'" in done.stderr


def test_a_name_that_is_taken_names_both_owners(tmp_path: Path) -> None:
    done = with_entry_point(
        tmp_path,
        "fuse",
        "from mlec import registry; print(registry.load('passes', 'dce').name); registry.load('passes', 'fuse')",
    )
    assert done.stdout.strip() == "dce", "the others work"
    assert "two passes are named 'fuse'" in done.stderr
    assert "mlec.passes.fusion:FuseOperators and mlec_plugin:FlipSubtractions" in done.stderr
