"""What is written is what is read."""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from mlec.artifact import DTYPES, Artifact, KernelBlob, compression, limits, metadata, weights, write
from mlec.artifact.sections import CHUNK, SectionHash
from mlec.artifact.weights import numpy_dtype
from mlec.errors import ArtifactError, CorruptedFileError, UsageError
from tests.artifact.surgery import join, split

GOLDEN = Path(__file__).parents[1] / "artifacts" / "v1_0.mle"

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)
names = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=12).filter(
    lambda s: unicodedata.is_normalized("NFC", s) and s.isprintable()
)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    dtype = numpy_dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    seed = draw(st.integers(0, 2**32 - 1))
    raw = np.random.default_rng(seed).integers(0, 256, math.prod(shape) * dtype.itemsize, np.uint8)
    array = (raw % 2 if dtype == np.bool_ else raw).view(dtype).reshape(shape)
    change = draw(st.sampled_from(["none", "transpose", "reverse", "big-endian"]))
    if change == "transpose":
        return array.T
    if change == "reverse":
        return array[::-1] if array.ndim else array
    if change == "big-endian" and dtype.kind in "fiu":
        return array.astype(dtype.newbyteorder(">"))
    return array


def as_bytes(array: np.ndarray) -> bytes:
    """Bytes in C order and little endian: the comparison that tells NaNs and signed zeros apart."""
    dtype = array.dtype if array.dtype.name == "bfloat16" else array.dtype.newbyteorder("<")
    return array.astype(dtype).tobytes()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=st.dictionaries(names, arrays(), max_size=5),
    meta=st.dictionaries(text, json_values, max_size=4),
    ir=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    blobs=st.lists(st.binary(min_size=1, max_size=200), max_size=3),
    full=st.booleans(),
    copy=st.booleans(),
)
def test_write_then_read_is_equal(tmp_path: Path, tensors, meta, ir, blobs, full, copy) -> None:
    meta = {k: v for k, v in meta.items() if k not in metadata.Owned.__struct_fields__} | {"targets": ["cpu"]}
    kernels = [KernelBlob(6, 0, blob) for blob in blobs]
    path = tmp_path / "m.mle"
    saved = write(path, metadata=meta, graph=ir, tensors=tensors, kernels=kernels)
    assert saved.size_bytes == path.stat().st_size
    with Artifact.open(path, verify="full" if full else "fast", copy_weights=copy) as artifact:
        assert artifact.graph == ir
        assert {k: v for k, v in artifact.metadata.items() if k in meta} == meta
        assert artifact.kernels == tuple(kernels)
        assert artifact.code_id == saved.code_id
        assert list(artifact.tensors) == list(tensors)
        for name, array in tensors.items():
            loaded = artifact.tensors[name]
            assert loaded.shape == array.shape
            assert loaded.dtype.name == array.dtype.name
            assert loaded.tobytes() == as_bytes(array)
            assert not loaded.flags.writeable
            assert loaded.ctypes.data % 64 == 0 or loaded.size == 0


def test_a_second_implementation_writes_the_same_bytes(sample: bytes) -> None:
    assert join(split(sample)) == sample


def test_same_input_same_bytes(tmp_path: Path, sample: bytes) -> None:
    for order in (1, -1):
        write(
            tmp_path / f"{order}.mle",
            metadata=dict([("b", 1), ("a", {"y": 2, "x": 3})][::order]),
            graph="g",
            tensors={"w": np.ones(3)},
        )
    assert (tmp_path / "1.mle").read_bytes() == (tmp_path / "-1.mle").read_bytes()


def test_files_of_format_1_0_stay_readable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file kept from the first release: read it, and write the same bytes again."""
    with Artifact.open(GOLDEN) as artifact:
        assert artifact.header.version == "1.0"
        assert artifact.metadata["name"] == "golden"
        np.testing.assert_array_equal(artifact.tensors["w"], np.arange(6, dtype=np.float32).reshape(2, 3))
        assert artifact.tensors["half"].dtype == ml_dtypes.bfloat16
        assert artifact.kernels == (KernelBlob(6, 0, b"object file"),)
        monkeypatch.setattr(metadata, "mlec_version", lambda: "0.1.0")
        write(
            tmp_path / "again.mle",
            metadata=artifact.metadata,
            graph=artifact.graph,
            tensors=artifact.tensors,
            kernels=artifact.kernels,
        )
    assert (tmp_path / "again.mle").read_bytes() == GOLDEN.read_bytes()


def test_smallest_file(tmp_path: Path) -> None:
    saved = write(tmp_path / "m.mle", metadata={}, graph="", tensors={})
    with Artifact.open(tmp_path / "m.mle") as artifact:
        assert (artifact.graph, len(artifact.tensors), artifact.kernels) == ("", 0, ())
        assert artifact.metadata["targets"] == []
        assert artifact.digests["weights"] is None
        assert artifact.digests["kernels"] is None
    assert saved.sections["weights"] == saved.sections["kernels"] == 0


def test_arrays_outlive_the_artifact(tmp_path: Path) -> None:
    write(tmp_path / "m.mle", metadata={}, graph="", tensors={"w": np.arange(1000)})
    artifact = Artifact.open(tmp_path / "m.mle")
    view = artifact.tensors["w"]
    artifact.close()
    artifact.close()
    del artifact
    gc.collect()
    np.testing.assert_array_equal(view, np.arange(1000))


def test_closing_unmaps_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.mle"
    write(path, metadata={}, graph="", tensors={"w": np.arange(1000)})
    with Artifact.open(path) as artifact:
        assert artifact.tensors["w"][3] == 3
        assert str(path) in Path("/proc/self/maps").read_text()
    assert str(path) not in Path("/proc/self/maps").read_text()
    with pytest.raises(UsageError) as caught:
        artifact.tensors  # noqa: B018
    assert caught.value.code == "E_CLOSED"


def test_views_cannot_be_made_writable(load, sample: bytes) -> None:
    for copy in (False, True):
        view = load(sample, copy_weights=copy).tensors["w"]
        with pytest.raises(ValueError, match="read-only"):
            view[0, 0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            view.setflags(write=True)


def test_weights_are_mapped_or_copied(tmp_path: Path, sample: bytes) -> None:
    path = tmp_path / "m.mle"
    for copy, mode, mapped in ((False, 0o644, True), (True, 0o644, False), (False, 0o666, False)):
        path.write_bytes(sample)
        path.chmod(mode)
        with Artifact.open(path, copy_weights=copy) as artifact:
            assert (str(path) in Path("/proc/self/maps").read_text()) is mapped
            assert artifact.writable_by_others is (mode == 0o666)


def test_weights_are_not_copied_where_there_is_no_memory_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file may be long and take no room on its disk; filling memory with it could end the process."""
    path = tmp_path / "m.mle"
    write(path, metadata={}, graph="", tensors={"w": np.zeros(5 << 20, np.int32)})
    monkeypatch.setattr(compression, "_available", lambda: 19 << 20)
    Artifact.open(path).close()
    with pytest.raises(ArtifactError) as caught:
        Artifact.open(path, copy_weights=True)
    assert caught.value.code == "E_NO_MEMORY"


def test_weights_of_another_users_file_are_copied(
    tmp_path: Path, sample: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.mle"
    path.write_bytes(sample)
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with Artifact.open(path):
        assert str(path) not in Path("/proc/self/maps").read_text()


def test_weights_that_others_can_change_are_checked_in_the_copy(tmp_path: Path, sample: bytes) -> None:
    path = tmp_path / "m.mle"
    path.write_bytes(sample)
    path.chmod(0o666)
    artifact = Artifact.open(path, verify="fast")
    start = sample.index(np.arange(12, dtype=np.float32).tobytes())
    path.write_bytes(sample[:start] + bytes([9] * 48) + sample[start + 48 :])
    assert artifact.tensors["w"].ravel().tolist() == list(range(12))
    assert artifact.tensors["idx"].tolist() == [0, 1, 2, 3, 4]


def test_copies_survive_truncation_and_edits_of_the_file(tmp_path: Path, sample: bytes) -> None:
    path = tmp_path / "m.mle"
    path.write_bytes(sample)
    artifact = Artifact.open(path, copy_weights=True)
    mapped = Artifact.open(path)
    kernels = [bytes(kernel.data) for kernel in mapped.kernels]
    mapped.close()
    path.write_bytes(b"")
    assert artifact.tensors["w"].sum() == 66
    assert [kernel.data for kernel in mapped.kernels] == kernels


def written_to(path: Path, at: int, data: bytes) -> None:
    """Write to a file in place, at another moment than it was made, however coarse the clock of the file system is."""
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), data, at)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


def test_a_mapped_file_that_was_written_to_gives_nothing_more(tmp_path: Path, sample: bytes) -> None:
    """What was handed out shows the change, as every map does; what was copied does not, and nothing new is made of the file."""
    path = tmp_path / "m.mle"
    path.write_bytes(sample)
    start = sample.index(np.arange(12, dtype=np.float32).tobytes())
    artifact, copied = Artifact.open(path), Artifact.open(path, copy_weights=True)
    kernels, view = [bytes(kernel.data) for kernel in artifact.kernels], artifact.tensors["w"]
    written_to(path, start, np.float32(7).tobytes())
    assert view[0, 0] == 7
    for _ in range(2):
        with pytest.raises(CorruptedFileError, match="tensor 'w' is damaged") as caught:
            artifact.tensors  # noqa: B018
        assert caught.value.code == "E_CHANGED"
        assert str(path) in caught.value.render()
    assert ([kernel.data for kernel in artifact.kernels], artifact.graph) == (kernels, copied.graph)
    assert copied.tensors["w"][0, 0] == 0
    written_to(path, start, np.float32(0).tobytes())
    assert artifact.tensors["w"][0, 0] == 0


def test_a_write_whose_date_is_set_back_is_seen(tmp_path: Path, sample: bytes) -> None:
    path = tmp_path / "m.mle"
    path.write_bytes(sample)
    before = path.stat()
    with Artifact.open(path) as artifact:
        while path.stat().st_ctime_ns == before.st_ctime_ns:  # a clock tick may be milliseconds
            written_to(path, sample.index(np.arange(12, dtype=np.float32).tobytes()), np.float32(7).tobytes())
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(CorruptedFileError, match="tensor 'w' is damaged"):
            artifact.tensors  # noqa: B018


def test_a_mapped_file_of_another_length_gives_nothing_more(tmp_path: Path, sample: bytes) -> None:
    path = tmp_path / "m.mle"
    for length in (200, len(sample) + 1):
        path.write_bytes(sample)
        with Artifact.open(path) as artifact:
            os.truncate(path, length)
            with pytest.raises(CorruptedFileError, match=f"{len(sample)} bytes when it was opened, and has {length}"):
                artifact.tensors  # noqa: B018


def test_a_new_date_alone_changes_nothing(tmp_path: Path, sample: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.mle"
    path.write_bytes(sample)
    checks: list[object] = []
    real = weights.Tensors.check_all
    with Artifact.open(path) as artifact:
        monkeypatch.setattr(weights.Tensors, "check_all", lambda self: (checks.append(self), real(self)))
        assert artifact.tensors["w"].sum() == 66
        assert len(checks) == 0
        os.utime(path)
        for _ in range(3):
            assert artifact.tensors["w"].sum() == 66
        assert len(checks) == 1, "it is checked again once"


def test_nothing_is_held_open_of_an_artifact_that_was_dropped(tmp_path: Path, sample: bytes) -> None:
    path = tmp_path / "m.mle"
    path.write_bytes(sample)
    gc.collect()  # what other tests left
    before = len(os.listdir("/proc/self/fd"))
    view = Artifact.open(path).tensors["w"]
    gc.collect()
    assert view.sum() == 66
    del view
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_an_open_file_keeps_its_content_when_it_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "m.mle"
    write(path, metadata={}, graph="old", tensors={"w": np.zeros(2000)})
    with Artifact.open(path, verify="fast") as old:
        write(path, metadata={}, graph="new", tensors={"w": np.ones(2000)})
        assert old.tensors["w"].sum() == 0
    with Artifact.open(path) as new:
        assert (new.graph, new.tensors["w"].sum()) == ("new", 2000)


def test_describe_is_json(load, sample: bytes) -> None:
    described = load(sample).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["flags"] == ["KERNELS"]
    assert [kernel["kind_name"] for kernel in described["kernels"]] == ["relocatable object", "PTX"]
    assert described["size_bytes"] == len(sample)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"metadata": {"x": float("nan")}}, "E_USAGE_JSON"),
        ({"metadata": {"x": {1: "a"}}}, "E_USAGE_JSON"),
        ({"metadata": {"x": np.int64(3)}}, "E_USAGE_JSON"),
        ({"metadata": {"x": 2**64}}, "E_USAGE_JSON"),
        ({"metadata": {"x": "a\0"}}, "E_USAGE_JSON"),
        ({"metadata": {"x": "\ud800"}}, "E_USAGE_JSON"),
        ({"metadata": {"x": "y" * (16 << 20)}}, "E_USAGE_JSON"),
        ({"metadata": {"targets": "cpu"}}, "E_USAGE_JSON"),
        ({"graph": "\udfff"}, "E_USAGE_JSON"),
        ({"tensors": {"w": np.ones(3, np.complex64)}}, "E_USAGE_TENSOR"),
        ({"tensors": {"w": np.array(["a"])}}, "E_USAGE_TENSOR"),
        ({"tensors": {"": np.ones(3)}}, "E_USAGE_TENSOR"),
        ({"tensors": {"a\u202eb": np.ones(3)}}, "E_USAGE_TENSOR"),
        ({"kernels": [KernelBlob(7, 0, b"x")]}, "E_USAGE_KERNEL"),
        ({"kernels": [KernelBlob(6, 1, b"x")]}, "E_USAGE_KERNEL"),
        ({"kernels": [KernelBlob(6, 0, b"")]}, "E_USAGE_KERNEL"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path: Path, changes: dict[str, Any], code: str) -> None:
    content: dict[str, Any] = {"metadata": {"targets": ["cpu"]}, "graph": "", "tensors": {}, "kernels": []}
    with pytest.raises(UsageError) as caught:
        write(tmp_path / "m.mle", **content | changes)
    assert caught.value.code == code
    assert os.listdir(tmp_path) == []


def test_sections_above_their_cap_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(limits.SECTION_BYTES, "weights", 100)
    write(tmp_path / "m.mle", metadata={}, graph="", tensors={"w": np.ones(12)})
    with pytest.raises(UsageError, match="at most 100") as caught:
        write(tmp_path / "m.mle", metadata={}, graph="", tensors={"w": np.ones(13)})
    assert caught.value.code == "E_USAGE_SIZE"


def test_nested_metadata_is_bounded(tmp_path: Path) -> None:
    value: Any = []
    for _ in range(100):
        value = [value]
    with pytest.raises(UsageError, match="deep"):
        write(tmp_path / "m.mle", metadata={"x": value}, graph="", tensors={})


def test_the_package_is_light() -> None:
    """Reading a file needs NumPy and msgspec only."""
    code = (
        "import sys, mlec.artifact; "
        "print([m for m in ('torch', 'sklearn', 'xgboost', 'tvm', 'onnx', 'ml_dtypes') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 5])
def test_a_section_hashes_the_same_as_a_whole_and_in_pieces(size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    streamed = SectionHash("weights", size)
    for start in range(0, size, 700_001):
        streamed.update(data[start : start + 700_001])
    whole = SectionHash.of("weights", data)
    assert (whole.crc, whole.root()) == (streamed.crc, streamed.root())
