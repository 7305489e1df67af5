"""What is copied and what is not for programs on a device, with the CPU's memory, or exporters that only record, in its place."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mlec.errors import InputError
from mlec.runtime import CompiledModel
from mlec.runtime.device import DEVICES, DeviceArray, DeviceMemory, DLDevice, borrow, device_of, lend
from mlec.runtime.edge import Edge, as_array
from mlec.signature import ColumnFeed, Labels, MethodSpec, Signature, TableSpec, TensorSpec

CPU, CUDA = DLDevice(1), DEVICES["cuda"]
NET = Signature((TensorSpec("x", "f32", ("n", 3)),), (TensorSpec("y", "f32", ("n", 3)),))


class Exporter:
    """Says that it lies on a device, and records how it was asked for its memory, which is the host's."""

    def __init__(self, array: np.ndarray[Any, Any], device: tuple[int, int] = CUDA) -> None:
        self.array = array
        self.device = device
        self.asked: list[dict[str, Any]] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: int | None = None, max_version: tuple[int, int] | None = None) -> Any:
        self.asked.append({"stream": stream, "max_version": max_version})
        return self.array.__dlpack__(max_version=max_version)


class Old(Exporter):
    """Of a library older than versions of DLPack."""

    def __dlpack__(self, *, stream: int | None = None) -> Any:  # type: ignore[override]
        self.asked.append({"stream": stream})
        return self.array.__dlpack__()


class Packing(Exporter):
    """Can pack itself on its device."""

    def contiguous(self) -> Packing:
        self.packed = Packing(np.ascontiguousarray(self.array), self.device)
        return self.packed


def rows(n: int = 4) -> np.ndarray[Any, Any]:
    return np.arange(3.0 * n, dtype=np.float32).reshape(n, 3)


def refused(call: Callable[..., Any], *arguments: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    return caught.value


class TestBorrowing:
    @pytest.mark.parametrize("kind", [Exporter, Old])
    def test_memory_is_passed_as_it_lies_in_the_order_of_the_default_stream(self, kind: type[Exporter]) -> None:
        value = kind(rows())
        got = borrow(value, "x", CUDA)
        assert got.tensor.data_ptr() == value.array.ctypes.data
        assert (got.shape, got.dtype, got.ndim, got.nbytes) == ((4, 3), "float32", 2, 48)
        assert [asked["stream"] for asked in value.asked] == [1]

    def test_memory_lives_as_long_as_it_is_borrowed(self) -> None:
        value = Exporter(rows())
        got = borrow(value, "x", CUDA)
        del value
        np.testing.assert_array_equal(np.from_dlpack(got.tensor), rows())

    def test_without_streams_none_is_named(self) -> None:
        value = Exporter(rows(), CPU)
        borrow(value, "x", CPU)
        assert value.asked[0]["stream"] is None

    def test_gaps_are_packed_by_the_library_on_the_device(self) -> None:
        value = Packing(rows().T)
        got = borrow(value, "x", CUDA)
        assert got.tensor.data_ptr() == value.packed.array.ctypes.data
        assert value.packed.asked[0]["stream"] == 1
        np.testing.assert_array_equal(np.from_dlpack(got.tensor), rows().T)

    def test_gaps_that_cannot_be_packed_are_refused(self) -> None:
        error = refused(borrow, Exporter(rows().T), "x", CUDA)
        assert "input 'x': expected a contiguous array on cuda:0, got strides (1, 3)" in error.message
        assert "ascontiguousarray" in str(error.hint)

    def test_another_device_is_refused(self) -> None:
        error = refused(borrow, Exporter(rows(), (2, 1)), "x", CUDA)
        assert error.code == "E_INPUT_DEVICE"
        assert "expected an array on cuda:0, where the program runs, got one on cuda:1" in error.message
        assert "CUDA_VISIBLE_DEVICES" in str(error.hint)

    def test_refusing_exporters_are_named(self) -> None:
        class Refusing(Exporter):
            def __dlpack__(self, **options: Any) -> Any:
                raise BufferError("not now")

        assert (
            "Refusing on cuda:0 could not be taken by DLPack: not now"
            in refused(borrow, Refusing(rows()), "x", CUDA).message
        )

    def test_where_things_lie(self) -> None:
        torch = pytest.importorskip("torch")
        assert device_of(rows()) == device_of(torch.ones(3)) == CPU
        assert device_of(Exporter(rows())) == CUDA
        assert device_of([1.0]) is device_of(torch.ones(3, device="meta")) is None

    def test_results_are_tensors_of_the_library_of_the_input(self, monkeypatch: pytest.MonkeyPatch) -> None:
        library = ModuleType("lent")
        monkeypatch.setattr(library, "from_dlpack", lambda tensor: ("lent", tensor.shape), raising=False)
        monkeypatch.setitem(sys.modules, "lent", library)
        derived = type("Derived", (type("Base", (Exporter,), {"__module__": "lent.core"}),), {})
        got = borrow(derived(rows()), "x", CUDA)
        assert lend(got.tensor, got.library) == ("lent", (4, 3))

    def test_results_for_unknown_libraries_are_exporters(self) -> None:
        got = borrow(Exporter(rows()), "x", CUDA)
        assert got.library is None
        np.testing.assert_array_equal(np.from_dlpack(lend(got.tensor, got.library)), rows())

    def test_torch_tensors_come_and_go_without_a_copy(self) -> None:
        torch = pytest.importorskip("torch")
        x = torch.ones(4, 3, requires_grad=True)
        got = borrow(x, "x", CPU)
        again = lend(got.tensor, got.library)
        assert isinstance(again, torch.Tensor)
        assert got.tensor.data_ptr() == again.data_ptr() == x.data_ptr()


class TestEdge:
    def test_tensors_on_the_device_stay_and_others_come_to_the_host(self) -> None:
        inputs = (TensorSpec("a", "f32", ("n", 3)), TensorSpec("b", "f32", ("n", 3)))
        a, b = Edge(Signature(inputs, ()), CUDA).read([Exporter(rows()), rows().tolist()])
        assert isinstance(a, DeviceArray)
        np.testing.assert_array_equal(b, rows())

    @pytest.mark.parametrize("pack", [lambda x: x, lambda x: [x], lambda x: {"x": x}])
    def test_shapes_are_checked(self, pack: Callable[[object], object]) -> None:
        edge = Edge(NET, CUDA)
        assert edge.bind(edge.read(pack(Exporter(rows(7))))) == {"n": 7}
        error = refused(edge.bind, edge.read(pack(Exporter(np.ones((2, 5), np.float32)))))
        assert "expected shape (n, 3), got (2, 5)" in error.message

    def test_element_types_are_not_converted(self) -> None:
        error = refused(Edge(NET, CUDA).read, Exporter(rows().astype(np.float64)))
        assert error.message == "input 'x': expected float32, got float64 on cuda:0"
        assert "x.to(torch.float32)" in str(error.hint)

    def test_positions_are_checked_by_the_library_of_the_tensor(self) -> None:
        torch = pytest.importorskip("torch")
        edge = Edge(Signature((TensorSpec("ids", "i64", ("n",), limits=(0, 9)),), ()), CPU)
        assert isinstance(edge.read(torch.tensor([0, 9]))[0], DeviceArray)
        assert isinstance(edge.read(torch.zeros(0, dtype=torch.int64))[0], DeviceArray)
        assert refused(edge.read, torch.tensor([3, 10])).message == "input 'ids' picks entries 0 to 9, got 10"
        assert "no methods min and max" in refused(edge.read, Exporter(np.array([0]), CPU)).message

    def test_a_program_of_the_host_names_the_device(self) -> None:
        class Elsewhere(Exporter):
            def __dlpack__(self, **options: Any) -> Any:
                raise BufferError("not on the host")

        assert "it lies on cuda:0: copy it to the host" in str(refused(as_array, Elsewhere(rows()), "x").hint)


class Recording:
    """Stands for a program that runs on the device: gives every row the class 1."""

    def run(self, inputs: Sequence[Any], out: object = None) -> list[Any]:
        self.inputs = list(inputs)
        return [np.ones(inputs[0].shape[0], np.int64)]


CLASSES = TensorSpec("class", "i64", ("n",))
DECODED = {"methods": (MethodSpec("predict", (0,), labels=(Labels(("no", "yes"), "<U3"),)),), "run": ("predict",)}


@pytest.mark.parametrize(
    ("more", "kind"),
    [({}, DeviceArray), (DECODED, np.ndarray), ({"table": TableSpec(3, (ColumnFeed((0, 1, 2)),))}, np.ndarray)],
    ids=["network", "labels", "table"],
)
def test_what_the_host_must_look_at_comes_to_the_host(more: dict[str, Any], kind: type) -> None:
    torch = pytest.importorskip("torch")
    program = Recording()
    model = CompiledModel(Signature(NET.inputs, (CLASSES,), **more), program, device=CPU)
    (result,) = model.run([torch.ones(2, 3)])
    assert [type(x) for x in program.inputs] == [kind]
    assert result.tolist() == (["yes", "yes"] if more is DECODED else [1, 1])


class TestMemory:
    """The path of CUDA, with the CPU standing in as the other device."""

    def test_host_arrays_are_copied_there_and_back(self) -> None:
        memory = DeviceMemory(CPU)
        x = rows().T
        tensor = memory.feed(x)
        assert tensor.data_ptr() != x.ctypes.data
        back = memory.fetch(tensor)
        assert back.ctypes.data != tensor.data_ptr()
        np.testing.assert_array_equal(back, x)

    def test_aligned_tensors_stay_others_are_copied_there(self) -> None:
        block = np.zeros(64, np.uint8)
        start = -block.ctypes.data % 8
        for offset, stays in ((start, True), (start + 4, False)):
            x = block[offset : offset + 12].view(np.float32).reshape(1, 3)
            x[:] = 1, 2, 3
            tensor = DeviceMemory(CPU, alignment=8).feed(borrow(Exporter(x), "x", CUDA))
            assert (tensor.data_ptr() == x.ctypes.data) == stays
            assert not tensor.data_ptr() % 8
            np.testing.assert_array_equal(np.from_dlpack(tensor), x)

    def test_strides_are_those_of_the_shape(self) -> None:
        x = np.lib.stride_tricks.as_strided(rows(), (1, 3), (4, 4))
        tensor = DeviceMemory(CPU, alignment=4).feed(borrow(Exporter(x), "x", CUDA))
        assert tensor.strides == (3, 1)
        assert tensor.data_ptr() == x.ctypes.data

    def test_no_rows(self) -> None:
        tensor = DeviceMemory(CPU).feed(borrow(Exporter(rows(0)), "x", CUDA))
        assert (tensor.shape, tensor.strides) == ((0, 3), (3, 1))
