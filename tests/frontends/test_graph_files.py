"""Graphs in text form are files of models like others: found by their content, compiled, and refused with the place of the fault."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mlec
from mlec.errors import ParseError
from mlec.frontends.graph_files import is_graph

GRAPH = """// passes: canonicalize

graph @square(%x: f32[n, 3]) -> (f32[n, 3]) {
  %two = constant {value = 2.0} : f32[]
  %y = pow(%x, %two) : f32[n, 3]
  return %y
}
"""


@pytest.mark.parametrize("name", ["square.mlet", "square", "square.txt"])
@pytest.mark.parametrize("below", ["", "// -----\ngraph @after is not read"])
def test_a_graph_is_found_by_its_content(tmp_path: Path, name: str, below: str) -> None:
    path = tmp_path / name
    path.write_text(GRAPH + below)
    compiled = mlec.compile(path, progress=False)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(compiled.run([x])[0], x * x)
    assert compiled.report.model["source"] == "graph"
    assert [node.name for node in mlec.lower(str(path)).nodes] == ["constant", "pow"]


@pytest.mark.parametrize(
    "head", [b"", b"// a comment", b"graphics @", b"// graph @x\n{", b'{"graph": 1}', b"a graph @x("]
)
def test_what_is_no_graph(head: bytes) -> None:
    assert not is_graph(head)


def test_arrays_are_not_in_the_text(tmp_path: Path) -> None:
    path = tmp_path / "g.mlet"
    path.write_text(GRAPH.replace("2.0} : f32[]", "@w} : f32[3]"))
    with pytest.raises(ParseError, match=r"line 4.*no constant @w") as caught:
        mlec.compile(path, progress=False)
    assert caught.value.code == "E_CONSTANT"
    assert "mlec.compile" in str(caught.value.hint)


def test_a_fault_in_the_text_is_placed(tmp_path: Path) -> None:
    path = tmp_path / "g.mlet"
    path.write_text(GRAPH.replace("%x, %two", "%x, %three"))
    with pytest.raises(ParseError, match="line 5") as caught:
        mlec.compile(path, progress=False)
    assert str(path) in str(caught.value)
    path.write_bytes(GRAPH.encode() + b"\xff")
    with pytest.raises(ParseError, match="is not text"):
        mlec.compile(path, progress=False)
