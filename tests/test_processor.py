"""What this processor has, and what code for others needs, in the names of Linux."""

from __future__ import annotations

import platform

import pytest

from mlec.errors import UsageError
from mlec.processor import DISABLE, FLAGS, X86_FLAGS, best_of, host_flags, needed_flags, processor_name, what_is_missing


@pytest.fixture
def haswell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlec.processor._listed_flags", lambda: ["fpu", "sse4_2", "avx", "avx2", "fma", "bmi2"])
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


@pytest.mark.usefixtures("haswell")
def test_what_is_missing() -> None:
    assert what_is_missing({"x86_64", "avx2"}) == ""
    assert what_is_missing({"x86_64", "avx512f", "avx2", "avx512bw"}) == "this processor lacks avx512bw, avx512f"
    assert what_is_missing({"aarch64", "asimd"}) == "this processor is x86_64, not aarch64"
    assert what_is_missing({f"f{number}" for number in range(11)}).endswith(" and 3 more")
    assert what_is_missing({"riscv64"}) == "this processor lacks riscv64"


@pytest.mark.usefixtures("haswell")
def test_the_best_is_what_needs_most() -> None:
    v2, v3, v4 = {"x86_64", "sse4_2"}, {"x86_64", "sse4_2", "avx2"}, {"x86_64", "sse4_2", "avx2", "avx512f"}
    assert best_of([v2, v3, v4]) == 1
    assert best_of([v4, v3, v2, v3]) == 1
    assert best_of([v4, {"aarch64"}]) is None
    assert best_of([]) is None


@pytest.mark.usefixtures("haswell")
def test_disabled_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DISABLE, "avx2, fma,,avx512f")
    assert host_flags() == {"x86_64", "fpu", "sse4_2", "avx", "bmi2"}
    monkeypatch.setenv(DISABLE, "fpu,avx513")
    with pytest.raises(UsageError, match="'avx513'") as caught:
        host_flags()
    assert caught.value.hint


@pytest.mark.parametrize(
    ("machine", "architecture"), [("arm64", "aarch64"), ("AMD64", "x86_64"), ("riscv64", "riscv64")]
)
def test_architectures_have_one_name(monkeypatch: pytest.MonkeyPatch, machine: str, architecture: str) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert architecture in host_flags()


@pytest.mark.parametrize(("machine", "certain"), [("x86_64", set()), ("arm64", {"fp", "asimd"})])
def test_where_the_system_lists_nothing(monkeypatch: pytest.MonkeyPatch, machine: str, certain: set[str]) -> None:
    monkeypatch.setattr("mlec.processor._listed_flags", list)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert host_flags() - {"x86_64", "aarch64"} == certain


def test_what_code_needs() -> None:
    assert needed_flags("x86_64-linux-gnu", ["avx2", "fast-gather", "bmi"]) == {"x86_64", "avx2", "bmi1"}
    assert needed_flags("aarch64-linux-gnu", ["neon", "lse", "avx2"]) == {"aarch64", "asimd", "atomics"}
    assert needed_flags("riscv64-linux-gnu", ["v"]) == {"riscv64"}


def test_names_of_processors() -> None:
    assert processor_name({"mcpu": "x86-64-v3", "triple": "x86_64-linux-gnu"}) == "x86-64-v3"
    assert processor_name({"mcpu": "generic", "triple": "aarch64-linux-gnu"}) == "aarch64"
    assert processor_name({}) == ""


def test_no_two_extensions_share_a_name() -> None:
    for names in FLAGS.values():
        assert len(set(names.values())) == len(names)
    assert "avx512f" in X86_FLAGS


@pytest.mark.parametrize("may", [False, True])
def test_amx_counts_only_where_the_system_lets_this_process_use_it(may: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = ("fpu", "avx512f", "avx512_vnni", "amx_tile", "amx_int8", "amx_bf16")
    monkeypatch.setattr("mlec.processor._cpuinfo_flags", lambda: listed)
    monkeypatch.setattr("mlec.processor._may_use_tiles", lambda: may)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    tiles = {"amx_tile", "amx_int8", "amx_bf16"}
    assert host_flags() == {"x86_64", "fpu", "avx512f", "avx512_vnni", *(tiles if may else ())}
    assert (what_is_missing({"amx_tile"}) == "") == may
