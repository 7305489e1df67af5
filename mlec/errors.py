"""The error tree of mlec.

Every error that mlec raises on purpose is an `MlecError`: it has a stable ``code`` for programs, a ``message`` that
states the fact (what was expected, what came), a ``hint`` that says what to do, and a ``loc`` that says where. Code and hint of a
class hold for those of its errors that are raised without one.
The command line prints it without a traceback and exits 1, after wrong usage of its options 2.
"""

from __future__ import annotations

from typing import Any

from mlec.wording import visible


class MlecError(Exception):
    """Base of every error raised by mlec.

    Args:
        message: the fact, with what was expected and what came.
        code: stable identifier for programs, e.g. ``"E_INPUT_SHAPE"``; the class default when omitted.
        hint: what the user can do about it; that of the class when omitted.
        loc: where it happened (an `mlec.ir.Location`, or text).
        notes: further lines, e.g. a bounded excerpt of the graph.
    """

    code = "E_MLEC"
    hint: str | None = None

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        hint: str | None = None,
        loc: object | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.hint = hint or type(self).hint
        self.loc = loc
        self.notes = notes

    def __str__(self) -> str:
        return self.render()

    def render(self) -> str:
        """The whole message as text to be shown: the fact, the place, the notes, the hint."""
        lines = [self.message]
        if self.loc is not None and str(self.loc):
            lines.append(f"  at {self.loc}")
        lines += [f"  {line}" for note in self.notes for line in note.splitlines()]
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return visible("\n".join(lines))

    def to_dict(self) -> dict[str, object]:
        """The error as a JSON-ready mapping (what ``--json`` prints)."""
        return {
            "error": type(self).__name__,
            "code": self.code,
            "message": self.message,
            "location": None if self.loc is None else str(self.loc),
            "notes": list(self.notes),
            "hint": self.hint,
        }


class UsageError(MlecError):
    """A call or an option that makes no sense as given."""

    code = "E_USAGE"


class FrontendError(MlecError):
    """A model could not be read or lowered."""

    code = "E_FRONTEND"


class UnsupportedModelError(FrontendError):
    """A model (or one of its settings) that no frontend can lower exactly."""

    code = "E_UNSUPPORTED_MODEL"


class NotFittedModelError(FrontendError):
    """An estimator that was never fitted."""

    code = "E_NOT_FITTED"


class UntrustedPickleError(FrontendError):
    """A pickle-based file was given without permission to execute it."""

    code = "E_UNTRUSTED_PICKLE"


class IRError(MlecError):
    """Base of the errors about a graph itself."""

    code = "E_IR"


class ParseError(IRError):
    """Text that is not a graph; names line and column."""

    code = "E_PARSE"
    hint: str | None = (
        "`mlec ops` lists the ops, their operands and attributes; `mlec inspect MODEL --graph` prints a graph in this form"
    )


class VerifyError(IRError):
    """A graph that breaks the rules of the IR; holds every violation found."""

    code = "E_VERIFY"
    hint: str | None = (
        "change the lines named here, or what made them: `mlec ops` lists the ops, operands and attributes"
    )


class TypeRuleError(IRError):
    """Operands or attributes that an op's type rule refuses.

    Attributes:
        dims: the two extents (`mlec.ir.dim.Dim`) that would have to be equal, where that is what is wrong.
    """

    code = "E_TYPE"
    dims: tuple[Any, Any] | None = None
    hint: str | None = "`mlec ops` lists the ops, their operands and their attributes"


class PassError(MlecError):
    """A pass failed or broke its contract; names the pass and its position."""

    code = "E_PASS"


class ToleranceError(PassError):
    """A result is further from the reference than the declared tolerance.

    Attributes:
        reduced: a small graph that the pass at fault does wrong, where one was looked for (an `mlec.Graph`).
    """

    code = "E_TOLERANCE"
    reduced: Any = None


class LoweringError(MlecError):
    """A backend could not turn a graph into kernels."""

    code = "E_LOWERING"


class UnsupportedOpError(LoweringError):
    """An op that a frontend or backend does not implement; names the op and where it came from."""

    code = "E_UNSUPPORTED_OP"


class TargetError(LoweringError):
    """A compile target that does not exist or whose tools are missing."""

    code = "E_TARGET"


class ArtifactError(MlecError):
    """Base of the errors about a .mle file."""

    code = "E_ARTIFACT"


class CorruptedFileError(ArtifactError):
    """A .mle file whose bytes break the format; says which check failed."""

    code = "E_CORRUPTED"
    hint: str | None = "the file is damaged, incomplete, or was changed: fetch it or compile the model again"


class VersionMismatchError(ArtifactError):
    """A .mle file of a format version that this reader does not know."""

    code = "E_VERSION"


class SecurityError(ArtifactError):
    """Something in a .mle file must not be trusted or executed."""

    code = "E_SECURITY"


class WriteError(ArtifactError):
    """A .mle file could not be written; nothing half-written stays behind."""

    code = "E_WRITE"


class RuntimeUnavailableError(MlecError):
    """A library or device that running the model needs is missing on this machine."""

    code = "E_RUNTIME"


class InputError(MlecError):
    """Input of a wrong shape, dtype, column set or count; says what was expected and what came."""

    code = "E_INPUT"
