from __future__ import annotations

import json

import pytest

from mlec.errors import CorruptedFileError
from mlec.report import OptimizationReport
from mlec.reporting.runs import short_place
from mlec.reporting.text import WIDTH, print_report

from .conftest import HOSTILE, perceptron, report_of


def test_the_summary_comes_first(report: OptimizationReport) -> None:
    head = report.to_text().split("\n\n")[0]
    assert head.startswith("mlp: torch network")
    assert "4.00x faster" in head
    assert "measured 250 µs, source 1.00 ms, 256 rows" in head
    assert "0.4% of the bound" in head
    assert "2.00 KiB" in head


def test_a_slower_model_is_called_slower() -> None:
    report = OptimizationReport(timing={"measured": {"rows": 1, "compiled_ms": 2.0, "source_ms": 1.0, "speedup": 0.5}})
    assert "2.00x slower" in report.to_text()


def test_each_busy_pass_has_a_block_with_its_remarks(report: OptimizationReport) -> None:
    blocks = {block.split(":")[0]: block for block in report.to_text().split("\n\n")}
    fuse = blocks["pass fuse"]
    entry = next(p for p in report.passes if p["name"] == "fuse")
    assert f"{len(entry['applied'])} applied" in fuse
    assert f"nodes: {entry['before']['nodes']} -> {entry['after']['nodes']}" in fuse
    assert "+ one kernel: " in fuse
    assert "net.py:10 (layers.0)" in fuse
    assert "cse" in blocks["passes that had nothing to do"]


def test_what_a_later_round_misses_again_is_not_repeated() -> None:
    same, more = {"message": "too large", "location": "net.py:1"}, {"message": "too small", "location": "net.py:2"}
    rounds = [{"name": "fold", "missed": missed} for missed in ([same, same], [same], [same, more])]
    text = OptimizationReport(passes=[*rounds, {"name": "fuse", "missed": [same]}]).to_text()
    assert [line for line in text.splitlines() if line.startswith("pass ")] == [
        "pass fold: 0 applied, 2 missed", "pass fold: 0 applied, 1 missed", "pass fuse: 0 applied, 1 missed",
    ]  # fmt: skip
    assert text.count("too large") == 2
    assert text.count("too small") == 1


def test_equal_remarks_are_said_once(report: OptimizationReport) -> None:
    many = report_of(perceptron(blocks=30))
    layout = next(block for block in many.to_text().split("\n\n") if block.startswith("pass layout"))
    assert "(30 times)" in layout
    assert layout.count("packed in blocks") == 1
    assert "and 28 more places" in layout


def test_the_kernels_are_listed_slowest_first(report: OptimizationReport) -> None:
    slowest = max(report.kernels, key=lambda k: k["predicted_seconds"])
    lines = report.to_text().split("kernels, predicted")[1].splitlines()
    assert slowest["symbol"] in lines[2]
    assert lines[2].endswith(" head")


def test_the_reasons_for_a_strategy_stand_in_full_below_the_table(report: OptimizationReport) -> None:
    assert "; " not in report.to_text().split("kernels, predicted")[1]
    reasons = "walks (expected 5 ns a row, networks 7 ns); " + "; ".join(f"fact {i}" for i in range(30))
    report.kernels[0]["strategy"] = reasons
    lines = report.to_text().split("kernels, predicted")[1].split("\n\n")[0].splitlines()
    row = next(line for line in lines[2:] if report.kernels[0]["symbol"] in line)
    assert "walks (expected 5 ns a row, networks 7 ns)" in row
    assert reasons in " ".join(line.strip() for line in lines)


def test_a_strategy_that_is_cut_in_the_table_stands_in_full_once(report: OptimizationReport) -> None:
    strategy = "sums of " + " and ".join(f"part {i}" for i in range(20))
    for kernel in report.kernels:
        kernel["strategy"] = strategy
    text = report.to_text().split("kernels, predicted")[1].split("\n\n")[0]
    below = " ".join(line.strip() for line in text.splitlines())
    assert below.count(strategy) == 1
    named = below[: below.index(f": {strategy}")]
    assert all(kernel["symbol"] in named.rpartition("head")[2] for kernel in report.kernels)


@pytest.mark.parametrize("name", ["mlp", "a_name_that_is_much_longer_than_any_column_has_a_right_to_be_" * 4])
def test_no_line_is_wider_than_a_terminal(name: str) -> None:
    report = report_of(perceptron(file=f"{name}.py", name="long", blocks=3), warnings=[f"the input {name} is odd"])
    report.model["name"] = name
    report.stability = [{"rule": name, "location": name}]
    assert max(map(len, report.to_text().splitlines())) <= WIDTH


def test_control_characters_do_not_reach_the_terminal() -> None:
    report = report_of(perceptron(file=HOSTILE), warnings=[HOSTILE])
    report.model["name"] = HOSTILE
    assert "\x1b" not in report.to_text()
    assert "<script>" in report.to_text()


def test_an_empty_report_says_so() -> None:
    assert "nothing was recorded" in OptimizationReport().to_text()


def test_the_text_survives_json(report: OptimizationReport) -> None:
    assert OptimizationReport.from_dict(json.loads(report.to_json())).to_text() == report.to_text()


def test_the_order_of_keys_does_not_matter(report: OptimizationReport) -> None:
    data = json.loads(json.dumps(report.to_dict(), sort_keys=True))
    data["timing"]["predicted_seconds"] = {"1024": 3e-5, "64": 2e-5, "1": 1e-6}
    assert "1.00 µs at 1 row, 20.0 µs at 64 rows, 30.0 µs at 1024 rows" in " ".join(
        OptimizationReport.from_dict(data).to_text().split()
    )
    data["timing"] = report.timing
    assert OptimizationReport.from_dict(data).to_text() == report.to_text()


def test_a_report_of_another_shape_is_an_error_that_names_the_place() -> None:
    report = OptimizationReport(passes=[{"name": "fuse", "applied": "all of them"}])
    with pytest.raises(CorruptedFileError, match=r"passes\[0\]\.applied") as caught:
        report.to_text()
    assert caught.value.code == "E_REPORT"


def test_keys_of_a_later_version_are_left_out(report: OptimizationReport) -> None:
    data = json.loads(report.to_json())
    data["passes"][0]["colour"] = "blue"
    data["horoscope"] = []
    assert OptimizationReport.from_dict(data).to_text() == report.to_text()


def test_printing_is_plain_when_it_is_not_a_terminal(
    report: OptimizationReport, capsys: pytest.CaptureFixture[str]
) -> None:
    print_report(report)
    assert capsys.readouterr().out == report.to_text()


def test_printing_is_coloured_on_a_terminal(
    report: OptimizationReport, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_report(report)
    assert "\x1b[32m" in capsys.readouterr().out


def test_the_target_is_named_by_its_kind_and_a_busy_machine_is_said() -> None:
    report = OptimizationReport(model={"name": "net", "kind": "classifier", "target": {"device": "cpu", "kind": "npu"}})
    busy = "the machine was busy: of the source model's calls p95 is 20x the minimum"
    measured = {"rows": 1, "compiled_ms": 1.0, "source_ms": 2.0, "speedup": 2.0, "disturbance": busy}
    report.timing = {"measured": measured}
    text = " ".join(report.to_text().split())
    assert "npu" in text
    assert "for cpu" not in text
    assert "the machine was busy" in text


def test_labels_are_only_counted_where_there_are_some() -> None:
    parity = {"methods": {"run": {"method": "run", "rows": 3, "max_rel_error": 1e-6, "excess": 1e-4}}}
    for kind, counted in (("regressor", False), ("network", False), ("classifier", True)):
        report = OptimizationReport(model={"kind": kind}, parity=parity)
        assert ("0 different labels" in report.to_text()) == ("labels differ\n" in report.to_text()) == counted
        assert ("labels that differ" in report.to_html()) == counted
    assert "<0.1% of the bound" in report.to_text()


def test_a_processor_has_the_name_that_its_system_gives_it() -> None:
    features = ["64bit", "avx", "avx2", "fma", "avx512f", "amx-int8", "xsave"]
    target = {"kind": "cpu", "mcpu": "rocketlake", "triple": "x86_64-linux", "features": features}
    named = OptimizationReport(model={"name": "net", "target": target}).to_text()
    own = OptimizationReport(model={"name": "net", "target": target, "processor": "Xeon"}).to_text()
    assert "net: cpu rocketlake" in named
    assert "rocketlake" not in own
    assert "net: Xeon" in own
    assert "x86_64  avx512f, amx-int8\n" in own


def test_times_say_how_many_threads_they_are_of() -> None:
    def said(**threads: int | None) -> str:
        measured = {"rows": 1, "compiled_ms": 1.0, "source_ms": 2.0, "speedup": 2.0, **threads}
        return " ".join(OptimizationReport(timing={"measured": measured}).to_text().split())

    assert "1 row, 2 threads each" in said(threads=2, source_threads=2)
    assert "1 row, 1 thread, the source as many as it takes" in said(threads=1, source_threads=None)


def test_remarks_end_where_their_words_end() -> None:
    remarks = [{"message": f"its bytes are stored and loaded, at %{i} = exp(%x)"} for i in range(2)]
    text = OptimizationReport(passes=[{"name": "fuse", "missed": remarks}]).to_text()
    assert "stored and loaded (2 times)" in text


def test_a_ratio_that_cannot_be_relied_on_is_no_headline() -> None:
    measured = {
        "rows": 1,
        "compiled_ms": 1.0,
        "source_ms": 700.0,
        "speedup": 700.0,
        "disturbance": "the machine was busy",
    }
    assert (
        "Speed  not reliable  measured 1.00 ms, source 700 ms, 1 row: 700x faster, but the machine"
        in OptimizationReport(timing={"measured": measured}).to_text()
    )


def test_changes_too_small_to_see_are_not_shown() -> None:
    entry = {"name": "fuse", "before": {"nodes": 3, "bytes": 1_000_000}, "after": {"nodes": 2, "bytes": 999_999}}
    text = OptimizationReport(passes=[entry]).to_text()
    assert "nodes: 3 -> 2 (-33%)" in text
    assert "memory traffic" not in text
    entry["after"] = {"nodes": 3, "bytes": 996_000}
    assert "-> 973 KiB (-0.4%)" in OptimizationReport(passes=[entry]).to_text()


def test_estimates_of_several_symbolic_dims_name_them() -> None:
    predicted = {"1": 1e-6, "64": 1e-3}
    for extents, says in (
        ({"n": 4}, "1.00 µs at 1 row, 1.00 ms at 64 rows"),
        ({"n": 4, "time": 5}, "1.00 µs with 1 for each, 1.00 ms with 64 for each of n, time"),
    ):
        report = OptimizationReport(timing={"predicted_seconds": predicted}, profile={"extents": extents})
        assert says in " ".join(report.to_text().split())


def test_layers_on_8_bits_are_said_in_words() -> None:
    entry = {
        "layer": "0", "location": "net.0", "op": "conv", "decision": "int8", "reason": "near enough", "scale": 0.030195970088,
        "weights": [3, 3, 8, 8], "float32_us": 419.848, "predicted_gain": None, "sqnr_db": 40.34,
    }  # fmt: skip
    text = " ".join(OptimizationReport(quantization=[entry]).to_text().split())
    assert (
        "+ 0: int8, near enough; signal / error 40.3 dB, float32 420 µs, scale 0.0302, weights 3 × 3 × 8 × 8, op conv,"
        in text
    )
    assert "None" not in text


def test_kernels_are_placed_by_the_paths_in_the_model() -> None:
    assert short_place("a/long/path.py:3 (l.0) + a/long/path.py:9 (l.0) + other.py:4") == "l.0 + other.py:4"
