"""What a file of torch holds, found out with `zipfile` alone: torch itself executes parts of some files when it reads them."""

from __future__ import annotations

import ast
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from mlec.errors import UnsupportedModelError
from mlec.frontends.archives import checked_archive, entry_names, read_json

_ZIP = b"PK\x03\x04"
_OLD_PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before version 1.6
_CALLABLE = re.compile(
    r"torch\.ops\.(aten|prims|higher_order)\.\w+(\.\w+)?|math\.\w+|torch\.sym_\w+|torch\._sym_\w+"
    r"|(torch\.)?_?operator\.(abs|add|and_|eq|floordiv|ge|getitem|gt|le|lshift|lt|mod|mul|ne|neg|not_|or_|pos|pow|rshift|sub|truediv|xor)"
    r"|torch\.fx\.experimental\.sym_node\.\w+"
)

# torch hands sizes to sympy, which evaluates them as Python: only what torch itself writes there may pass.
_SIZE_FUNCTION = re.compile(
    "Symbol|Integer|Rational|Float|Add|Mul|Pow|Mod|Max|Min|Abs|floor|ceiling|And|Or|Not|Piecewise|ExprCondPair"
    "|Equality|Unequality|GreaterThan|LessThan|StrictGreaterThan|StrictLessThan|Eq|Ne|Ge|Le|Gt|Lt"
    "|FloorDiv|ModularIndexing|Where|PythonMod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|IntTrueDiv|FloatTrueDiv|LShift|RShift"
    "|IsNonOverlappingAndDenseIndicator|TruncToFloat|TruncToInt|RoundToInt|RoundDecimal|ToFloat|FloatPow|PowByNatural|Identity"
)
_SIZE_SYNTAX = (
    ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Tuple,
    ast.operator, ast.unaryop, ast.cmpop,
)  # fmt: skip
_SIZE_TEXT = re.compile(r"[A-Za-z_]\w*|[-+]?[\d.]+(e[-+]?\d+)?")  # the name of a symbol, or the digits of a Float

# torch writes names into the source of functions, which it then executes.
_NAME = re.compile(r"""[^()=;\\"'`\n\r]*""")
_TREE_SPEC = re.compile(r"""([^()=;\\'`\n\r]|\\["\\])*""")
_IMPORTING = ("__enum__", "default_factory")  # parts of a tree specification that make torch import a module
_NEVER_CODE = frozenset(
    {
        "as_string", "as_strings", "guards_code",
        "stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "custom", "from_node",  # what torch notes of a node
    }
)  # fmt: skip
_PICKLED = ("custom_obj_", "opaque")

FileKind = Literal["program", "torchscript", "pickle"]


def torch_file_kind(head: bytes, path: Path) -> FileKind | None:
    """What a file with these first bytes is; None if torch did not write it."""
    if head.startswith(_OLD_PICKLE):
        return "pickle"
    if not head.startswith(_ZIP):
        return None
    names = {name.partition("/")[2] if "/" in name else name for name in entry_names(path)}
    if "archive_format" in names or "serialized_exported_program.json" in names:
        return "program"
    if "constants.pkl" in names:
        return "torchscript"
    return "pickle" if "data.pkl" in names else None


def check_program_archive(file: IO[bytes], path: Path) -> None:
    """Looks for what torch.export.load would execute.

    Args:
        file: the archive.
        path: of it, for messages.

    Raises:
        UnsupportedModelError: naming the part that would be executed.
        FrontendError: as `checked_archive` and `read_json` raise it.
    """
    with checked_archive(file, path) as archive:
        for entry in archive.infolist():
            if reason := _executes(entry.filename):
                raise UnsupportedModelError(
                    f"{path.name} holds {entry.filename!r}: {reason}", code="E_FILE_EXECUTES",
                    hint="export a module without custom objects, and save it with torch.export.save of a current torch",
                )  # fmt: skip
            if entry.filename.lower().endswith(".json") and entry.file_size:
                _check_json(path, entry.filename, archive)


def _executes(name: str) -> str:
    """Why an entry of an archive would be executed; empty if it is data."""
    name = name.lower()
    folders, base = name.split("/")[:-1], name.rpartition("/")[2]
    if any(part.startswith(_PICKLED) for part in (*folders, base)):
        return "a pickled object"
    if "models" in folders and not base.endswith(".json"):
        return "a program that is none of those that torch.export.save writes"
    if "data/aotinductor/" in name or "executorch/" in name:
        return "compiled code"
    if base.endswith(".pt") and ("/weights/" in name or "/constants/" in name):
        return "pickled weights of an old format"
    return ""


def _check_json(path: Path, name: str, archive: zipfile.ZipFile) -> None:
    content = read_json(archive, name, path)
    for key, value in _leaves(content):
        if key == "use_pickle" and value:
            raise UnsupportedModelError(
                f"{path.name}: {name!r} stores a pickled tensor",
                code="E_FILE_EXECUTES",
                hint="save the model again with torch.export.save of this version of torch",
            )
        if not isinstance(value, str):
            continue
        if key in ("target", "as_operator") and not _CALLABLE.fullmatch(value):
            raise UnsupportedModelError(
                f"{path.name} calls {value!r}, which is none of PyTorch's own operators", code="E_FILE_EXECUTES",
                hint="models with custom operators cannot be compiled; replace them by PyTorch's own",
            )  # fmt: skip
        if not _is_data(key, value):
            raise UnsupportedModelError(
                f"{path.name}: {name!r} has {value[:80]!r} as {key or 'a name'}, which torch would execute", code="E_FILE_EXECUTES",
                hint="do not use this file if you did not make it; else rename that part of the model and export it again",
            )  # fmt: skip


def _is_data(key: str, value: str) -> bool:
    """Whether torch executes nothing of a text."""
    if key == "expr_str":
        return _is_size(value)
    if key in ("in_spec", "out_spec"):
        return bool(_TREE_SPEC.fullmatch(value)) and not any(word in value for word in _IMPORTING)
    return bool(_NAME.fullmatch(value))


def _is_size(text: str) -> bool:
    """Whether a text is an expression of symbols, numbers and the functions that torch has for sizes."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    for node in ast.walk(tree):
        if not isinstance(node, _SIZE_SYNTAX):
            return False
        if isinstance(node, ast.Call) and not (
            isinstance(node.func, ast.Name) and _SIZE_FUNCTION.fullmatch(node.func.id)
        ):
            return False
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not _SIZE_TEXT.fullmatch(node.value):
            return False
    return True


def _leaves(content: Any) -> Iterator[tuple[str, Any]]:
    """Every value that is no container, and no text that is never code, with the key it stands under, and every key, under no key."""
    pending = [("", content)]
    while pending:
        key, item = pending.pop()
        if isinstance(item, dict):
            yield from (("", name) for name in item)
            pending += item.items()  # the key can be a name that the file chose
        elif isinstance(item, list):
            pending += [(key, part) for part in item]
        elif key not in _NEVER_CODE:
            yield key, item
