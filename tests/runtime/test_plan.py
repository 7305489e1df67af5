"""Where buffers lie, and which call sequences are refused."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlec.errors import MlecError
from mlec.runtime.plan import ARENA_ALIGNMENT, Home, Layout, Place, live_nbytes, place
from mlec.runtime.program import Buffer, Call, CallSequence, Program
from tests.runtime.programs import SEQUENCES

lives = st.tuples(st.integers(0, 12), st.integers(0, 4)).map(lambda t: (t[0], t[0] + t[1]))
buffers = st.dictionaries(
    st.integers(0, 99), st.tuples(st.integers(0, 1000), lives).map(lambda t: (t[0], *t[1])), max_size=24
)


@given(buffers)
def test_buffers_that_live_together_do_not_overlap(given: dict[int, tuple[int, int, int]]) -> None:
    offsets, total = place(given)
    for i, (size, first, last) in given.items():
        assert offsets[i] % ARENA_ALIGNMENT == 0
        assert offsets[i] + size <= total
        for j, (other_size, other_first, other_last) in given.items():
            if i < j and first <= other_last and other_first <= last:
                assert offsets[i] + size <= offsets[j] or offsets[j] + other_size <= offsets[i]


@given(buffers)
def test_no_arena_is_smaller_than_what_lives_at_one_time(given: dict[int, tuple[int, int, int]]) -> None:
    at_one_time = [sum(size for size, first, last in given.values() if first <= t <= last) for t in range(17)]
    assert live_nbytes(given, 17) == at_one_time
    assert max(at_one_time) <= place(given)[1]


def test_memory_is_used_again() -> None:
    # A chain: each value lives until the next is computed.
    chain = {i: (640, i, i + 1) for i in range(10)}
    offsets, total = place(chain)
    assert total == max(live_nbytes(chain, 11)) == 1280
    assert set(offsets.values()) == {0, 640}
    # A small one fits between two that live longer.
    assert place({0: (640, 0, 9), 1: (128, 0, 1), 2: (640, 0, 9), 3: (64, 2, 3)})[1] == 640 + 640 + 128


def test_homes() -> None:
    a = Buffer("f32", ("n", 4))
    sequence = CallSequence(
        1, 1, (a, Buffer("f32", (4,)), a, Buffer("f32", ("4*n",), 2), a, a, a),
        (Call("f", (0, 1), (2,)), Call("g", (3,), (4,)), Call("h", (2, 4), (5, 6))), (5, 4, 5, 1),
    )  # fmt: skip
    layout = Layout(sequence)
    assert layout.homes == {
        0: Home("input", 0), 1: Home("constant", 0), 4: Home("output", 1), 5: Home("output", 0),
    }  # fmt: skip
    assert layout.copies == [(2, Home("output", 0)), (3, Home("constant", 0))]
    plan = layout.plan(((16, 4),))
    assert plan.places[2] == plan.places[3]
    assert plan.places[4:6] == [Place(Home("output", 1), 0), Place(Home("output", 0), 0)]
    assert sorted(plan.places[number] for number in (2, 6)) == [Place(Home("arena"), 0), Place(Home("arena"), 256)]
    assert plan.shapes[3] == (64,)
    assert plan.arena_nbytes == plan.live_nbytes == 2 * 256
    assert plan.output_nbytes == 3 * 256 + 16
    for shapes in ((), ((16, 5),), ((16,),), ((16, 4), (16, 4))):
        with pytest.raises(MlecError, match="expected inputs of shapes"):
            layout.plan(shapes)


A = Buffer("f32", ("n", 16))
ARENA = Home("arena")


def chain(*calls: Call, outputs: tuple[int, ...], buffers: tuple[Buffer, ...] = (A,) * 6) -> Layout:
    return Layout(CallSequence(1, 0, buffers, calls, outputs))


def test_results_take_the_memory_of_operands_that_die() -> None:
    layout = chain(
        Call("f", (0,), (1,), over=(0,)), Call("g", (1,), (2,), over=(1,)), Call("h", (2, 1), (3,), over=(1, 2)),
        Call("i", (3,), (4,), over=(3,)), outputs=(4,), buffers=(A,) * 5,
    )  # fmt: skip
    plan = layout.plan(((4, 16),))
    # An input keeps its memory; 1 is read once more; 3 lies over 1, and where 4 is an output, all of them lie in that.
    assert [place.home for place in plan.places] == [
        Home("input"),
        Home("output"),
        ARENA,
        Home("output"),
        Home("output"),
    ]
    assert plan.arena_nbytes == plan.live_nbytes == 256
    apart = layout.plan(((4, 16),), in_place=False)
    assert [place.home for place in apart.places] == [Home("input"), ARENA, ARENA, ARENA, Home("output")]
    assert apart.arena_nbytes == 3 * 256


@pytest.mark.parametrize(
    ("calls", "outputs", "buffers"),
    [
        # 1 is an output, or a view of it is read later, or another view of it is read by the same call
        ([Call("g", (1,), (2,), over=(1,))], (1, 2), (A, A, A)),
        ([Call("g", (1,), (3,), over=(1,)), Call("h", (2, 3), (4,))], (4,), (A, A, Buffer("f32", ("16*n",), 1), A, A)),
        ([Call("g", (1, 2), (3,), over=(1,)), Call("h", (3,), (4,))], (4,), (A, A, Buffer("f32", ("16*n",), 1), A, A)),
        # the result is larger; it was written in part before; the operand is only a part of what it lies in
        ([Call("g", (1,), (2,), over=(1,)), Call("h", (2,), (3,))], (3,), (A, A, Buffer("f32", ("n", 32)), A)),
        ([Call("c", (0,), (3,)), Call("g", (1,), (2,), over=(1,)), Call("h", (2,), (4,))], (4,),
         (A, A, A, Buffer("f32", (1, 16), 2, 0, 1), A)),
        ([Call("g", (2,), (3,), over=(2,)), Call("h", (3,), (4,))], (4,),
         (A, Buffer("f32", ("n", 32)), Buffer("f32", ("n", 16), 1, 0, 1), A, A)),
    ],
)  # fmt: skip
def test_operands_that_are_needed_keep_their_memory(
    calls: list[Call], outputs: tuple[int, ...], buffers: tuple[Buffer, ...]
) -> None:
    layout = chain(Call("f", (0,), (1,)), *calls, outputs=outputs, buffers=buffers)
    assert layout.plan(((4, 16),)) == layout.plan(((4, 16),), in_place=False)


def joined(**changes: Any) -> dict[str, Any]:
    """Two results of the columns of x, joined side by side, and columns of that; as a file holds it."""
    half, both = {"dtype": "f32", "shape": ["n", 4]}, {"dtype": "f32", "shape": ["n", 8]}
    buffers = [
        {**half}, both, {**half, "view": 1, "offset": 0, "lines": "n"}, {**half, "view": 1, "offset": 4, "lines": "n"},
        {"dtype": "f32", "shape": ["2*n", 2], "view": 3}, {**half, "view": 1, "offset": 2, "lines": "n"}, half,
    ]  # fmt: skip
    calls = [
        {"code": "f", "reads": [0], "writes": [2]}, {"code": "g", "reads": [0], "writes": [3]},
        {"code": "join", "reads": [2, 3], "writes": [1], "lines": "n"},
        {"code": "cut", "reads": [1], "writes": [5], "lines": "n"}, {"code": "h", "reads": [4, 5], "writes": [6]},
    ]  # fmt: skip
    return {"inputs": 1, "constants": 0, "buffers": buffers, "calls": calls, "outputs": [6], **changes}


def test_parts_of_one_line_lie_in_their_buffer() -> None:
    layout = Layout(msgspec.convert(joined(), CallSequence))
    arena = Home("arena")
    plan = layout.plan(((1, 4),))
    assert plan.made == [0, 1, 4]
    assert plan.places[1:6] == [Place(arena, at) for at in (0, 0, 16, 16, 8)]
    assert plan.arena_nbytes == ARENA_ALIGNMENT
    for rows in (0, 2, 5):
        plan = layout.plan(((rows, 4),))
        assert plan.made == [0, 1, 2, 3, 4]
        nbytes = 16 * rows
        begins = sorted(place.offset for place in plan.places[1:4])
        assert not rows or all(b - a >= nbytes for a, b in itertools.pairwise(begins))


def test_parts_that_do_not_fit_are_refused() -> None:
    record = joined()
    record["buffers"][3]["offset"] = 5
    with pytest.raises(MlecError, match="a view of 16 bytes on a buffer of 32"):
        Layout(msgspec.convert(record, CallSequence)).plan(((1, 4),))
    assert Layout(msgspec.convert(record, CallSequence)).plan(((2, 4),)).made == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("buffer", "change", "message"),
    [
        (6, {"offset": 0}, "part of no other"),
        (6, {"lines": "n"}, "part of no other"),
        (2, {"lines": "m"}, "no input tells m"),
        (2, {"offset": "m"}, "no input tells m"),
        (2, {"offset": -1}, "an extent of -1"),
        (2, {"view": 0}, "is not its to write"),
        (3, {"view": 2, "lines": 1}, ""),
        (6, {"view": 1, "offset": 0}, "the output, buffer 6, is part of another one"),
    ],
)
def test_parts_that_could_not_be_are_refused(buffer: int, change: dict[str, Any], message: str) -> None:
    record = joined()
    record["buffers"][buffer] |= change
    if not message:  # a part of a part
        assert Layout(msgspec.convert(record, CallSequence)).sequence.buffers[3].view == 2
        return
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(record, CallSequence)


def test_views_of_another_size_are_refused() -> None:
    sequence = CallSequence(1, 0, (Buffer("f32", ("n",)), Buffer("f32", ("2*n",), 0)), (), (1,))
    with pytest.raises(MlecError, match="a view of 8 bytes on a buffer of 4"):
        Layout(sequence).plan(((1,),))


@pytest.mark.parametrize("dim", ["n*n*n*n", "n-100", f"n*{1 << 62}"])
def test_impossible_extents_are_refused(dim: str) -> None:
    sequence = CallSequence(1, 0, (Buffer("f32", ("n",)), Buffer("f32", (dim, 0))), (Call("f", (0,), (1,)),), (1,))
    with pytest.raises(MlecError) as caught:
        Layout(sequence).plan(((1 << 20 if "*" in dim else 5,),))
    assert caught.value.code == "E_RUN"


def record(**changes: Any) -> dict[str, Any]:
    """A program as a file holds it: x @ w, and the same with another shape."""
    kernel = {"symbol": "matmul", "op": "matmul", "location": ""}
    sequence = msgspec.to_builtins(SEQUENCES["aliases"])
    program = {"backend": "tvm", "device": "cpu", "constants": ["w"], "kernels": [kernel], "sequence": sequence}
    for key, value in changes.items():
        (sequence if key in sequence else program)[key] = value
    return program


def test_record_survives_json() -> None:
    program = msgspec.convert(record(), Program)
    assert program.sequence == SEQUENCES["aliases"]
    assert msgspec.json.decode(msgspec.json.encode(program), type=Program) == program


X, W, H = ({"dtype": "f32", "shape": shape} for shape in (["n", 8], [8, 4], ["n", 4]))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"inputs": -1}, "inputs and constants"),
        ({"constants": 7}, "inputs and constants"),
        ({"outputs": [9]}, "nothing is written to the output"),
        ({"outputs": [-1]}, "nothing is written to the output"),
        ({"calls": [], "kernels": []}, "nothing is written to the output"),
        ({"calls": [{"code": "matmul", "reads": [0, 9], "writes": [2]}]}, "there is no buffer 9"),
        ({"calls": [{"code": "matmul", "reads": [0, -1], "writes": [2]}]}, "there is no buffer -1"),
        ({"calls": [{"code": "matmul", "reads": [2, 1], "writes": [2]}]}, "before anything is written"),
        ({"calls": [{"code": "matmul", "reads": [3, 1], "writes": [2]}]}, "before anything is written"),
        ({"calls": [{"code": "matmul", "reads": [0], "writes": [1]}]}, "not its to write"),
        ({"calls": [{"code": "matmul", "reads": [0], "writes": [0]}]}, "not its to write"),
        ({"calls": [{"code": "matmul", "reads": [0], "writes": [3]}]}, "not its to write"),
        ({"calls": [{"code": "matmul", "reads": [0], "writes": [2, 2]}]}, "not its to write"),
        ({"calls": [{"code": "matmul", "reads": [0], "writes": [2], "extents": ["k"]}]}, "no input tells k"),
        ({"calls": [{"code": "matmul", "reads": [0], "writes": [2], "extents": ["f(n)"]}]}, "not a dim expression"),
        (
            {"calls": [{"code": "matmul", "reads": [0, 1], "writes": [2], "over": [2]}]},
            "cannot have its result where it reads",
        ),
        (
            {"calls": [{"code": "matmul", "reads": [0], "writes": [], "over": [0]}]},
            "cannot have its result where it reads",
        ),
        ({"kernels": []}, "1 calls of 0 kernels"),
        ({"buffers": [X, W, H, H | {"view": 3}]}, "cannot be a view of buffer 3"),
        ({"buffers": [X, W, H, H | {"view": -1}]}, "cannot be a view of buffer -1"),
        ({"buffers": [X, W | {"view": 0}, H, H | {"view": 2}]}, "buffer 1 cannot be a view"),
        ({"buffers": [X, H, H, H | {"view": 2}]}, "the shape of a constant depends"),
        ({"buffers": [X, W, H | {"shape": ["n", -4]}, H | {"view": 2}]}, "an extent of -4"),
        ({"buffers": [X, W, H | {"shape": ["n//0"]}, H | {"view": 2}]}, "divides by zero"),
        ({"buffers": [X, W, H | {"shape": ["m"]}, H | {"view": 2}]}, "no input tells m"),
        ({"buffers": [X, W, H | {"shape": ["(" * 9000]}, H | {"view": 2}]}, "not a dim expression"),
        ({"buffers": [X, W, H | {"shape": ["-" * 9000 + "n"]}, H | {"view": 2}]}, "dim expression|nested too deep"),
        ({"buffers": [X, W, H | {"shape": [1] * 33}, H | {"view": 2}]}, "33 axes"),
        ({"buffers": [X, W, H | {"dtype": "f8"}, H | {"view": 2}]}, "Invalid enum value"),
        ({"alignment": 12}, "an alignment of 12 bytes"),
        ({"surprise": 1}, "unknown field"),
    ],
)
def test_records_that_make_no_sense_are_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=why):
        msgspec.convert(record(**changes), Program)
