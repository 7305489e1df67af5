"""The keys of the metadata that the format itself owns, and the graph document around the IR text.

Everything else in the metadata belongs to the caller and is kept as it is.
"""

# Annotations are not postponed here: msgspec would compile the text of each when the first file is loaded, which takes 1 ms.

import sys
from collections.abc import Mapping
from typing import Annotated, Any, Final, TypeVar

import msgspec

from mlec.artifact import json_safe, limits
from mlec.artifact.header import MAJOR, MINOR, NEWER, Header
from mlec.artifact.weights import TensorEntry
from mlec.errors import CorruptedFileError, VersionMismatchError

GRAPH_FORMAT: Final = 1
"""Version of the graph document."""

FEATURES: Final = {"variants": 1}
"""What ``critical`` can name, with the minor version that brought it."""

_Hex = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}\\Z")]


class Digests(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Roots of the digest tree in hexadecimal; None for an absent section."""

    graph: _Hex
    weights: _Hex | None
    kernels: _Hex | None


class Encryption(msgspec.Struct, frozen=True):
    """What the metadata of an encrypted file holds under ``encryption``.

    Attributes:
        salt: random bytes that the file's keys are made with.
        check: tells a wrong key.
    """

    salt: _Hex
    check: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}\\Z")]


class Owned(msgspec.Struct, frozen=True):
    """The part of the metadata that the format owns. The writer sets all of it but ``targets`` and ``critical``, which the caller gives."""

    format: str
    mlec_version: str
    digests: Digests
    targets: list[Any]
    critical: list[str] = []


class GraphDocument(msgspec.Struct, frozen=True):
    """The graph section: the text of the IR and the tensor index."""

    format: int
    ir: str
    tensors: list[TensorEntry]


_Document = TypeVar("_Document", Owned, Encryption, GraphDocument)


def mlec_version() -> str:
    """Version of mlec itself."""
    return str(sys.modules["mlec"].__version__)  # the package that this module is part of is imported by then


def parse_metadata(data: bytes | bytearray, header: Header) -> tuple[dict[str, Any], Owned]:
    """Parse the metadata section.

    Returns:
        all of it, and the keys that the format owns.
    """
    value = json_safe.parse(data, what="metadata", max_bytes=limits.SECTION_BYTES["metadata"])
    owned = _convert(value, Owned, "metadata", "E_METADATA_SCHEMA")
    if owned.format != header.version:
        raise CorruptedFileError(
            f"the metadata says format {owned.format!r:.40}, the header {header.version}", code="E_METADATA_VERSION"
        )
    if unknown := [name for name in owned.critical if name not in FEATURES]:
        names = ", ".join(unknown)
        raise VersionMismatchError(
            f"the file, written by mlec {owned.mlec_version[:40]}, needs features that mlec {mlec_version()} does not know: {names[:200]}",
            code="E_CRITICAL",
            hint=NEWER,
        )
    return value, owned


def parse_graph(data: bytes | bytearray) -> GraphDocument:
    """Parse the graph section. The tensor index is not checked yet, the IR text is never looked into."""
    value = json_safe.parse(data, what="graph section", max_bytes=limits.SECTION_BYTES["graph"])
    document = _convert(value, GraphDocument, "graph section", "E_GRAPH_SCHEMA")
    if document.format != GRAPH_FORMAT:
        raise VersionMismatchError(
            f"the graph section has format {document.format}, this version of mlec reads {GRAPH_FORMAT}",
            code="E_GRAPH_FORMAT",
            hint=NEWER,
        )
    return document


def dump_graph(ir: str, entries: list[TensorEntry]) -> bytes:
    """The bytes of the graph section."""
    value = {"format": GRAPH_FORMAT, "ir": ir, "tensors": msgspec.to_builtins(entries)}
    return json_safe.dump(value, what="graph", max_bytes=limits.SECTION_BYTES["graph"], sort_keys=False)


def minor_version(given: Mapping[str, Any]) -> int:
    """The lowest minor version that can express what the caller gave."""
    return max((FEATURES[name] for name in given.get("critical", ())), default=MINOR)


def parse_encryption(metadata: Mapping[str, Any], data: bytes | bytearray, owned: Owned) -> tuple[Encryption, bytes]:
    """What the metadata of an encrypted file says of that.

    Args:
        metadata: the parsed document.
        data: its text.
        owned: the keys that the format owns.

    Returns:
        the entry, and the text without the digests: what `dump_metadata` gives for None.

    Raises:
        CorruptedFileError: ``E_ENCRYPTION_METADATA``.
    """
    code = "E_ENCRYPTION_METADATA"
    found = _convert(metadata.get("encryption"), Encryption, "entry `encryption` of the metadata", code)
    written = _digests_text(owned.digests)
    if bytes(data).count(written) != 1:
        raise CorruptedFileError("the digests do not stand in the metadata once, in the shortest form", code=code)
    return found, bytes(data).replace(written, _digests_text(None))


def _digests_text(digests: Digests | None) -> bytes:
    value = {"digests": None if digests is None else msgspec.to_builtins(digests)}
    return json_safe.dump(value, what="digests", max_bytes=1024)[1:-1]


def dump_metadata(
    given: Mapping[str, Any], digests: Digests | None, encryption: Mapping[str, str] | None = None
) -> bytes:
    """The bytes of the metadata section: what the caller gave and the keys that the format owns.

    Without digests, the text that encrypted sections are bound to: no reader accepts it.
    """
    value = {
        **{key: value for key, value in given.items() if key != "encryption"},
        **({"encryption": encryption} if encryption else {}),
        "format": f"{MAJOR}.{minor_version(given)}",
        "mlec_version": mlec_version(),
        "digests": None if digests is None else msgspec.to_builtins(digests),
        "targets": given.get("targets", []),
        "critical": given.get("critical", []),
    }
    return json_safe.dump(value, what="metadata", max_bytes=limits.SECTION_BYTES["metadata"])


def _convert(value: Any, schema: type[_Document], what: str, code: str) -> _Document:
    try:
        return msgspec.convert(value, schema, strict=True)
    except msgspec.ValidationError as error:
        raise CorruptedFileError(
            f"the {what} does not have the form that the format asks for: {error}"[:400], code=code
        ) from None
