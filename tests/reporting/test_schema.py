"""The dictionary and the page that documents it say the same."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import msgspec
import numpy as np

import mlec
from mlec.ir import GraphBuilder, tensor
from mlec.measuring.machine import Machine
from mlec.report import OptimizationReport
from mlec.reporting import schema
from mlec.validation.differential import Comparison

PAGES = Path(__file__).parents[2] / "docs"
DOCS = (PAGES / "report.md").read_text(encoding="utf-8")
QUANTIZATION = (
    (PAGES / "quantization.md").read_text(encoding="utf-8").partition("## The table")[2].partition("\n## ")[0]
)
DICTIONARY = DOCS.partition("## The dictionary")[2].partition("\n## ")[0]
SECTIONS = {
    key: text
    for heading, text in re.findall(r"^### ([^\n]+)\n(.*?)(?=^### |\Z)", DICTIONARY, re.M | re.S)
    for key in re.findall(r"`(\w+)`", heading)
}
FREE = {"model", "quantization", "warnings"}
"""Parts without a structure: what they hold is for a frontend, a backend or a pass to say."""


def structs_in(hint: Any) -> list[type[msgspec.Struct]]:
    """The structures that a type is made of, with those inside them."""
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return [hint, *(inner for field in get_type_hints(hint).values() for inner in structs_in(field))]
    return [inner for argument in get_args(hint) for inner in structs_in(argument)]


def fields_of(key: str) -> set[str]:
    hint = get_type_hints(schema.ReportData)[key]
    return {name for struct in structs_in(hint) for name in struct.__struct_fields__}


def test_every_part_of_the_report_has_a_section_and_a_place_in_the_schema() -> None:
    assert set(SECTIONS) == set(OptimizationReport.__dataclass_fields__) == set(schema.ReportData.__struct_fields__)


def test_every_key_is_documented_in_its_section() -> None:
    for key in SECTIONS.keys() - FREE:
        missing = {name for name in fields_of(key) if f"`{name}`" not in SECTIONS[key] + SECTIONS["passes"]}
        assert not missing, f"{key}: {missing}"


def test_every_documented_key_is_in_the_schema() -> None:
    for key in SECTIONS.keys() - FREE:
        named = named_in(SECTIONS[key])
        assert named <= fields_of(key), f"{key}: {named - fields_of(key)}"


def test_the_machine_is_the_one_that_is_measured() -> None:
    assert set(schema.Roofline.__struct_fields__) == set(Machine.__struct_fields__)


def test_a_comparison_is_the_one_that_is_made() -> None:
    assert {field.name for field in fields(Comparison)} == set(schema.Comparison.__struct_fields__)


def test_every_key_that_a_compilation_writes_is_in_the_schema() -> None:
    """Of a network with all that there is to say: 8 bits, schedules that were measured, passes that were, formulas that overflow."""
    rng = np.random.default_rng(0)
    b = GraphBuilder("network")
    x = b.input("x", tensor("f32", ("n", 16)))
    v, w = (b.constant(rng.normal(size=shape).astype(np.float32)) for shape in ((16, 32), (32, 4)))
    e = b("exp", b("matmul", b("relu", b("matmul", x, v)), w))
    graph = b.finish([b("div", e, b("sum", e, axes=(1,), keepdims=True))])
    data = rng.normal(size=(32, 16)).astype(np.float32)
    passes = "canonicalize,stability,quantize-int8{measure = false},fuse"
    model = mlec.compile(graph, data, precision="int8", calibration=data, passes=passes, tune=1, measure_passes=True)
    written = json.loads(model.report.to_json())
    assert all(written[key] for key in SECTIONS.keys() - {"parity", "warnings"}), "nothing would be checked of it"
    assert unknown_in(written, schema.ReportData) == []
    assert written["model"].keys() <= named_in(SECTIONS["model"])
    assert {key for layer in written["quantization"] for key in layer} <= named_in(QUANTIZATION)


def named_in(table: str) -> set[str]:
    """The keys in the first column."""
    return {name for row in re.findall(r"^\| (`.+?) \|", table, re.M) for name in re.findall(r"`(\w+)`", row)}


def unknown_in(value: Any, hint: Any, path: str = "report") -> list[str]:
    """The places in some data that a type does not have."""
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        if not isinstance(value, dict):
            return []
        known = get_type_hints(hint)
        inner = [
            place
            for key in value.keys() & known.keys()
            for place in unknown_in(value[key], known[key], f"{path}.{key}")
        ]
        return [f"{path}.{key}" for key in sorted(value.keys() - known.keys())] + inner
    if isinstance(hint, UnionType):
        parts: Iterable[Any] = [value]
    else:
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [place for part in parts for argument in get_args(hint) for place in unknown_in(part, argument, path)]
