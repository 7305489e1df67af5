"""The dictionary and the page that documents it say the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec

from mlec.measuring.machine import Machine
from mlec.report import OptimizationReport
from mlec.reporting import schema

DOCS = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
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
        rows = re.findall(r"^\| (`.+?) \|", SECTIONS[key], re.M)
        named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
        assert named <= fields_of(key), f"{key}: {named - fields_of(key)}"


def test_the_machine_is_the_one_that_is_measured() -> None:
    assert set(schema.Roofline.__struct_fields__) == set(Machine.__struct_fields__)


def test_a_report_uses_no_key_that_the_schema_does_not_have(report: OptimizationReport) -> None:
    for key in SECTIONS.keys() - FREE - {"parity", "graphs"}:
        assert keys_in(getattr(report, key)) <= fields_of(key) | {"1", "64"}, key


def keys_in(value: Any) -> set[str]:
    if isinstance(value, dict):
        return {str(name) for name in value} | {inner for part in value.values() for inner in keys_in(part)}
    return {inner for part in value for inner in keys_in(part)} if isinstance(value, (list, tuple)) else set()
