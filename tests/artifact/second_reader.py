"""A second reader of .mle files, written from docs/format.md alone: it shares no code with mlec, not even a JSON parser.

`read(data)` accepts the bytes of a file or raises `RefusedError` with the code of the first check that fails. What the two readers accept
must be the same for every file: where they differ, one of them or the document is wrong.
"""

import re
import struct
import unicodedata
import zlib
from collections.abc import Callable, Mapping
from hashlib import sha256
from math import isinf, prod
from typing import Any

MIB = 1 << 20
ALIGNMENTS = (128, 64, 4096, 4096, 64)
CAPS = (16 * MIB, 256 * MIB, 1 << 40, 2 << 30, 16 * MIB)
NAMES = ("METADATA", "GRAPH", "WEIGHTS", "KERNELS", "SIGNATURE")
WIDTHS = {
    "f64": 8,
    "f32": 4,
    "f16": 2,
    "bf16": 2,
    "i64": 8,
    "i32": 4,
    "i16": 2,
    "i8": 1,
    "u8": 1,
    "u16": 2,
    "u32": 4,
    "bool": 1,
}
STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*"')
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})|\\(.)")
ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


class RefusedError(Exception):
    """The file is refused; `args[0]` is the code of the check."""


def check(holds: object, code: str) -> None:
    if not holds:
        raise RefusedError(code)


def align_up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


def root(section: int, data: bytes) -> bytes:
    leaves = [
        sha256(b"\xa5" + struct.pack("<I", len(data[i : i + MIB])) + data[i : i + MIB]).digest()
        for i in range(0, len(data), MIB)
    ]
    return sha256(b"\x5a" + struct.pack("<BQI", section, len(data), len(leaves)) + b"".join(leaves)).digest()


def parse(data: bytes, cap: int) -> Any:
    """The value of a JSON document within the restrictions of section 2.1."""
    check(len(data) <= cap, "E_JSON_CAP")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise RefusedError("E_JSON_UTF8") from None
    check(not text.startswith("\ufeff"), "E_JSON_UTF8")
    depth = deepest = 0
    outside = re.sub(r'"(?:[^"\\]|\\.)*("|$)', "", text, flags=re.DOTALL)
    for mark in re.findall(r"[\[\]{}]", outside):
        depth += 1 if mark in "[{" else -1
        deepest = max(deepest, depth)
    check(deepest <= 64, "E_JSON_DEPTH")
    check(len(re.findall(r"[\[{,]", outside)) < 4_194_304, "E_JSON_COUNT")
    value, end = parse_value(text, blank(text, 0))
    check(blank(text, end) == len(text), "E_JSON_SYNTAX")
    check(all_text_is_sound(value), "E_JSON_STRING")
    return value


def all_text_is_sound(value: Any) -> bool:
    """No NUL character and no unpaired surrogate in any string or key."""
    if isinstance(value, str):
        return "\0" not in value and not re.search("[\ud800-\udfff]", value)
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return all(map(all_text_is_sound, inner))


def blank(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\n", "\r"):
        at += 1
    return at


def parse_string(text: str, at: int) -> tuple[str, int]:
    found = STRING.match(text, at)
    if not found:
        raise RefusedError("E_JSON_SYNTAX")
    unescaped = ESCAPE.sub(lambda m: chr(int(m[1], 16)) if m[1] else ESCAPES.get(m[2], m[2]), found[0][1:-1])
    paired = re.sub(
        "[\ud800-\udbff][\udc00-\udfff]",
        lambda m: m[0].encode("utf-16-le", "surrogatepass").decode("utf-16-le"),
        unescaped,
    )
    return paired, found.end()


def parse_value(text: str, at: int) -> tuple[Any, int]:
    first = text[at : at + 1]
    if first in ("{", "["):
        return parse_members(text, at, first == "{")
    if first == '"':
        return parse_string(text, at)
    for word, value in (("true", True), ("false", False), ("null", None)):
        if text.startswith(word, at):
            return value, at + len(word)
    found = NUMBER.match(text, at)
    if not found:
        raise RefusedError("E_JSON_NONFINITE" if re.compile("NaN|-?Infinity").match(text, at) else "E_JSON_SYNTAX")
    if found[1] or found[2]:
        check(len(found[0]) <= 128, "E_JSON_NUMBER")
        check(not isinf(float(found[0])), "E_JSON_NONFINITE")
        return float(found[0]), found.end()
    check(len(found[0]) <= 20 and -(2**63) <= int(found[0]) < 2**64, "E_JSON_INT")
    return int(found[0]), found.end()


def parse_members(text: str, at: int, is_object: bool) -> tuple[Any, int]:
    keys: list[str] = []
    values: list[Any] = []
    at = blank(text, at + 1)
    if text[at : at + 1] == "]}"[is_object]:
        return ({} if is_object else []), at + 1
    while True:
        if is_object:
            key, at = parse_string(text, at)
            check(key not in keys, "E_JSON_DUPLICATE")
            keys.append(key)
            at = blank(text, at)
            check(text[at : at + 1] == ":", "E_JSON_SYNTAX")
            at = blank(text, at + 1)
        value, at = parse_value(text, at)
        values.append(value)
        at = blank(text, at)
        if text[at : at + 1] == "]}"[is_object]:
            return (dict(zip(keys, values, strict=True)) if is_object else values), at + 1
        check(text[at : at + 1] == ",", "E_JSON_SYNTAX")
        at = blank(text, at + 1)


def is_hex(value: object, digits: int) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(f"[0-9a-f]{{{digits}}}", value))


def is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def frame_content(stored: bytes, raw: int | None, cap: int, code: str, size_code: str) -> bytes:
    """The bytes of one Zstandard frame (section 2.6); `raw`: how many there are, None: as the frame says."""
    check(stored[:4] == b"\x28\xb5\x2f\xfd" and len(stored) >= 6, code)
    descriptor, single = stored[4], bool(stored[4] & 32)
    at, width = 5 if single else 6, (1 if single else 0, 2, 4, 8)[descriptor >> 6]
    check(descriptor & 0b1011 == 0 and width and len(stored) >= at + width, code)  # no dictionary, the size is stated
    says = int.from_bytes(stored[at : at + width], "little") + (256 if width == 2 else 0)
    window = says if single else (1 << 10 + (stored[5] >> 3)) * (8 + (stored[5] & 7)) // 8
    check(says <= cap and len(stored) < says <= max(MIB, 1024 * len(stored)), size_code)
    check(window <= 8 * MIB, code)
    check(raw is None or says == raw, code)
    from backports import zstd

    decoder = zstd.ZstdDecompressor()
    try:
        decoded = decoder.decompress(stored, max_length=says + 1)
    except zstd.ZstdError:
        raise RefusedError(code) from None
    check(decoder.eof and not decoder.unused_data and len(decoded) == says, code)
    return decoded


def stream_content(stored: bytes, cap: int) -> bytes:
    """The bytes of one zlib stream (section 2.6) behind their number."""
    check(stored[:4] == b"MLEZ" and len(stored) >= 12, "E_SECTION_ZLIB")
    says = int.from_bytes(stored[4:12], "little")
    check(says <= cap and len(stored) < says <= max(MIB, 1024 * len(stored)), "E_SECTION_RAW")
    stream = zlib.decompressobj()
    try:
        decoded = stream.decompress(stored[12:], says + 1)
        decoded += stream.decompress(stream.unconsumed_tail, 1)  # nothing, but the end is seen
    except zlib.error:
        raise RefusedError("E_SECTION_ZLIB") from None
    check(stream.eof and not stream.unused_data and len(decoded) == says, "E_SECTION_ZLIB")
    return decoded


def section_content(stored: bytes, codec: int, cap: int) -> bytes:
    """Graph or kernels as they were before they were compressed."""
    if codec == 1:
        return frame_content(stored, None, cap, "E_SECTION_ZSTD", "E_SECTION_RAW")
    return stream_content(stored, cap) if codec else stored


def read(data: bytes, public_keys: Mapping[bytes, bytes] | None = None, master: bytes | None = None) -> None:
    """Makes all checks of section 7. `public_keys`: by key id; `master`: the key of an encrypted file."""
    check(data[:4] == b"MLE\0"[: len(data)], "E_MAGIC")
    check(len(data) >= 128, "E_HEADER_TRUNCATED")
    _, version, flags, *rest = struct.unpack("<4sII10QIIIIIQ4BI", data[:128])
    places = [(rest[2 * i], rest[2 * i + 1]) for i in range(5)]
    crcs, (file_size, digest_alg, sig_alg, aead_alg, codecs, header_crc) = rest[10:15], rest[15:]
    check(version & 0xFFFF == 1, "E_VERSION_MAJOR")
    check(zlib.crc32(data[:124]) == header_crc, "E_HEADER_CRC")
    check(flags & 0xFFF0 == 0, "E_FLAG_UNKNOWN")
    check(digest_alg == 1, "E_DIGEST_ALG")
    check(sig_alg <= 1, "E_SIG_ALG")
    check(aead_alg <= 2, "E_AEAD_ALG")
    codec = [codecs >> 2 * i & 3 for i in range(4)]
    check(all(number <= most for number, most in zip(codec, (0, 2, 1, 2), strict=True)), "E_CODEC")
    present = [size > 0 for _, size in places]
    agreeing = (present[3], codecs != 0, aead_alg != 0, sig_alg != 0)
    check(
        all(bool(flags >> bit & 1) == fact for bit, fact in enumerate(agreeing)) and present[4] == (sig_alg != 0),
        "E_FLAG_MISMATCH",
    )
    check(all(present[i] or not codec[i] for i in (2, 3)), "E_FLAG_MISMATCH")
    check(file_size == len(data), "E_FILE_SIZE")
    end, gaps, sections = 128, [], []
    for i, (offset, size) in enumerate(places):
        check(present[i] or i > 1, "E_SECTION_MISSING")
        check(present[i] or offset == crcs[i] == 0, "E_SECTION_ABSENT")
        check(size <= CAPS[i], "E_SECTION_CAP")
        check(offset + size <= len(data), "E_SECTION_BOUNDS")
        if present[i]:
            check(offset == align_up(end, ALIGNMENTS[i]), "E_SECTION_PLACEMENT")
            gaps.append(data[end:offset])
            end = offset + size
        sections.append(data[offset : offset + size])
    check(end == file_size, "E_FILE_END")
    check(not any(map(any, gaps)), "E_PADDING")
    for name, section, crc in zip(NAMES, sections, crcs, strict=True):
        check(zlib.crc32(section) == crc, f"E_CRC_{name}")
    metadata, graph, weights, kernels, signature = sections
    if signature:
        check_signature(signature, data[:128], root(1, metadata), public_keys or {})
    facts = parse(metadata, CAPS[0])
    digests = check_metadata(facts, version)
    for i, name in enumerate(("graph", "weights", "kernels"), 1):
        check((digests[name] is not None) == present[i], "E_DIGEST_MISSING")
    for i, name in enumerate(("graph", "weights", "kernels"), 1):
        check(not present[i] or root(i + 1, sections[i]).hex() == digests[name], f"E_DIGEST_{name.upper()}")
    if aead_alg:
        graph, weights, kernels = decrypt(sections, facts, data[:128], places, master)
    graph, kernels = section_content(graph, codec[1], CAPS[1]), section_content(kernels, codec[3], CAPS[3])
    check_weights(parse(graph, CAPS[1]), weights, bool(codec[2]))
    if kernels:
        check_kernels(kernels, len(facts["targets"]), root(2, graph))


def check_signature(block: bytes, header: bytes, metadata_root: bytes, public_keys: Mapping[bytes, bytes]) -> None:
    check(len(block) >= 108, "E_SIGNATURE_BLOCK")
    magic, version, algorithm, key_id, signed, length = struct.unpack("<4sHH32s64sI", block[:108])
    check(
        (magic, version, algorithm) == (b"MLES", 1, 1) and length <= 65_536 and len(block) == 108 + length,
        "E_SIGNATURE_BLOCK",
    )
    if key_id not in public_keys:
        return  # counts as unsigned
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    cleared = header[:108] + bytes(4) + header[112:124] + bytes(4)
    message = (
        b"mle:artifact:v1\0"
        + struct.pack("<HH", algorithm, header[120])
        + key_id
        + cleared
        + metadata_root
        + block[104:]
    )
    try:
        Ed25519PublicKey.from_public_bytes(public_keys[key_id]).verify(signed, message)
    except InvalidSignature:
        raise RefusedError("E_SIGNATURE") from None
    attributes = parse(block[108:], 65_536)
    check(isinstance(attributes, dict), "E_SIGNATURE_ATTRIBUTES")
    for key in ("signer", "created", "model_name", "model_version"):
        check(isinstance(attributes.get(key, ""), str), "E_SIGNATURE_ATTRIBUTES")


def check_metadata(facts: Any, version: int) -> dict[str, str | None]:
    schema = "E_METADATA_SCHEMA"
    check(isinstance(facts, dict), schema)
    check(isinstance(facts.get("format"), str) and isinstance(facts.get("mlec_version"), str), schema)
    check(isinstance(facts.get("targets"), list), schema)
    digests, critical = facts.get("digests"), facts.get("critical", [])
    check(isinstance(digests, dict) and set(digests) == {"graph", "weights", "kernels"}, schema)
    check(all(is_hex(root, 64) or (root is None and name != "graph") for name, root in digests.items()), schema)
    check(isinstance(critical, list) and all(isinstance(name, str) for name in critical), schema)
    check(facts["format"] == f"{version & 0xFFFF}.{version >> 16}", "E_METADATA_VERSION")
    check(set(critical) <= {"variants"}, "E_CRITICAL")
    return digests  # type: ignore[no-any-return]


def decrypt(
    sections: list[bytes], facts: Any, header: bytes, places: list[tuple[int, int]], master: bytes | None
) -> list[bytes]:
    """Graph, weights and kernels as they were before section 2.8."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    secret = facts.get("encryption")
    check(
        isinstance(secret, dict) and is_hex(secret.get("salt"), 64) and is_hex(secret.get("check"), 32),
        "E_ENCRYPTION_METADATA",
    )
    ordered = ",".join(
        f'"{name}":' + (f'"{facts["digests"][name]}"' if facts["digests"][name] else "null")
        for name in ("graph", "kernels", "weights")
    )
    text = b'"digests":{' + ordered.encode() + b"}"
    check(sections[0].count(text) == 1, "E_ENCRYPTION_METADATA")
    if master is None:
        raise RefusedError("E_KEY_MISSING")
    salt, secret_master = bytes.fromhex(secret["salt"]), master

    def derive(info: bytes, length: int) -> bytes:
        return HKDF(SHA256(), length, salt, info).derive(secret_master)

    check(derive(b"mle:v1:check", 16).hex() == secret["check"], "E_KEY_WRONG")
    chunk = MIB + 16
    check(all(not section or (len(section) - 1) % chunk >= 16 for section in sections[1:4]), "E_AEAD_SIZE")
    version, flags = struct.unpack_from("<II", header, 4)
    associated = (
        b"mle:aad:v1\0"
        + struct.pack("<II", version, flags & ~8)
        + header[12:76]
        + bytes([header[120], header[122], header[123]])
    )
    blanked = sha256(sections[0].replace(text, b'"digests":null')).digest()
    cipher: Callable[[bytes], Any] = AESGCM if header[122] == 1 else ChaCha20Poly1305
    opened = []
    for i, section in enumerate(sections[1:4], 2):
        box, pieces = cipher(derive(b"mle:v1:enc:" + bytes([i]), 32)), []
        for number, at in enumerate(range(0, len(section), chunk)):
            nonce = bytes(7) + struct.pack("<IB", number, at + chunk >= len(section))
            try:
                pieces.append(box.decrypt(nonce, section[at : at + chunk], associated + bytes([i]) + blanked))
            except InvalidTag:
                raise RefusedError("E_AEAD_TAG") from None
        opened.append(b"".join(pieces))
    return opened


def widened(half: bytes) -> bytes:
    """A number of f16 as f32; struct itself forgets the mantissa of a NaN."""
    bits = int.from_bytes(half, "little")
    if bits & 0x7C00 == 0x7C00 and bits & 0x3FF:
        return struct.pack("<I", (bits & 0x8000) << 16 | 0x7F800000 | (bits & 0x3FF) << 13)
    return struct.pack("<f", *struct.unpack("<e", half))


def check_weights(document: Any, weights: bytes, compressed: bool) -> None:
    schema = "E_GRAPH_SCHEMA"
    check(
        isinstance(document, dict) and type(document.get("format")) is int and isinstance(document.get("ir"), str),
        schema,
    )
    entries = document.get("tensors")
    check(isinstance(entries, list), schema)
    for entry in entries:
        check(isinstance(entry, dict), schema)
        check(
            all(isinstance(entry.get(key), str) for key in ("name", "dtype", "codec"))
            and is_hex(entry.get("sha256"), 64),
            schema,
        )
        check(
            all(is_count(entry.get(key)) for key in ("off", "size", "raw", "crc32")) and entry["crc32"] < 2**32, schema
        )
        check(isinstance(entry.get("shape"), list) and all(map(is_count, entry["shape"])), schema)
    check(document["format"] == 1, "E_GRAPH_FORMAT")
    check(len(entries) <= 262_144, "E_TENSOR_COUNT")
    names, end, total, some = set(), 0, 0, False
    for entry in entries:
        name, shape, off, size, raw = (entry[key] for key in ("name", "shape", "off", "size", "raw"))
        check(1 <= len(name.encode()) <= 512 and unicodedata.is_normalized("NFC", name), "E_TENSOR_NAME")
        check(all(c == " " or unicodedata.category(c)[0] not in "CZ" for c in name), "E_TENSOR_NAME")
        check(name not in names, "E_TENSOR_DUPLICATE")
        names.add(name)
        check(entry["dtype"] in WIDTHS, "E_TENSOR_DTYPE")
        check(len(shape) <= 32 and max(shape, default=0) <= 2**48, "E_TENSOR_SHAPE")
        check(entry["codec"] in ("raw", "zstd", "f16", "bf16"), "E_TENSOR_CODEC")
        check(raw == prod(shape) * WIDTHS[entry["dtype"]], "E_TENSOR_RAW")
        if entry["codec"] == "raw":
            check(size == raw, "E_TENSOR_SIZE")
        elif entry["codec"] in ("f16", "bf16"):
            check(entry["dtype"] == "f32" and 2 * size == raw, "E_TENSOR_SIZE")
            total += raw
        else:
            check(0 < size < raw <= max(MIB, 1024 * size), "E_TENSOR_RATIO")
            some, total = True, total + raw
        check(off == align_up(end, 64), "E_TENSOR_PLACEMENT")
        end = off + size
        check(end <= len(weights), "E_TENSOR_BOUNDS")
    check(end == len(weights), "E_WEIGHTS_END")
    check(some == compressed, "E_CODEC_WEIGHTS")
    check(total <= 64 << 30, "E_TENSOR_TOTAL")
    end = 0
    for entry in entries:
        check(not any(weights[end : entry["off"]]), "E_WEIGHTS_PADDING")
        end = entry["off"] + entry["size"]
        value = weights[entry["off"] : end]
        if entry["codec"] == "f16":
            value = b"".join(widened(value[at : at + 2]) for at in range(0, len(value), 2))
        if entry["codec"] == "bf16":
            value = b"".join(b"\0\0" + value[at : at + 2] for at in range(0, len(value), 2))
        if entry["codec"] == "zstd":
            value = frame_content(value, entry["raw"], entry["raw"], "E_TENSOR_ZSTD", "E_TENSOR_ZSTD")
        check(zlib.crc32(value) == entry["crc32"], "E_TENSOR_CRC")
        check(sha256(value).hexdigest() == entry["sha256"], "E_TENSOR_DIGEST")
        check(entry["dtype"] != "bool" or set(value) <= {0, 1}, "E_TENSOR_BOOL")


def check_kernels(section: bytes, targets: int, graph_root: bytes) -> None:
    check(section[:4] == b"MLEK" and len(section) >= 8, "E_KERNEL_MAGIC")
    count = int.from_bytes(section[4:8], "little")
    end = 8 + 96 * count
    check(1 <= count <= 4096 and end <= len(section), "E_KERNEL_COUNT")
    for at in range(8, end, 96):
        kind, target, off, size, digest, made_from, reserved = struct.unpack("<IIQQ32s32sQ", section[at : at + 96])
        check(1 <= kind <= 6, "E_KERNEL_KIND")
        check(target < targets, "E_KERNEL_TARGET")
        check(reserved == 0, "E_KERNEL_RESERVED")
        check(size >= 1 and off + size <= len(section), "E_KERNEL_BOUNDS")
        check(off == align_up(end, 64), "E_KERNEL_PLACEMENT")
        check(not any(section[end:off]), "E_KERNEL_PADDING")
        check(sha256(section[off : off + size]).digest() == digest, "E_KERNEL_DIGEST")
        check(made_from == graph_root, "E_KERNEL_GRAPH")
        end = off + size
    check(end == len(section), "E_KERNEL_END")
