"""What every frontend offers, and what `mlec.compile` passes to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from numpy.typing import NDArray

from mlec.ir import Graph

InputShapes = Mapping[str, Sequence[int | str]] | Sequence[Sequence[int | str]]


@dataclass(frozen=True)
class LowerOptions:
    """How a model is to be lowered.

    Attributes:
        example_inputs: one entry for each input of the model; arrays, tensors or DataFrames.
        input_shapes: by name or by position; a string names a symbolic dim.
        dynamic_batch: make the first axis of every input the symbol ``n`` where the shapes say nothing else.
        trust_pickle: the user allows executing a pickle-based file. ``"sha256:..."`` allows that one file only.
        model_class: ``"package.module:Class"``, the class whose state dict a file holds.
        notes: no option, but filled by the frontend: what it has to say about how it took the model, for the report.
    """

    example_inputs: tuple[Any, ...] | None = None
    input_shapes: InputShapes | None = None
    dynamic_batch: bool = True
    trust_pickle: bool | str = False
    model_class: str | None = None
    notes: list[str] = field(default_factory=list, compare=False)


Oracle = Mapping[str, Callable[..., Any]]
"""The source's own functions, by method name; ``"run"`` for a model without methods (returns a list of arrays)."""


class SourceMethods(dict[str, Callable[..., Any]]):
    """An oracle that knows what the source's own answers are worth.

    Attributes:
        decided: for a table, which of its rows have one right answer, (n,) of bool; None: all.
        exact: as ``"run"``, of the source in float64, where that is more than it computes in; None: it isn't known. It may raise anything.
    """

    def __init__(
        self,
        methods: Mapping[str, Callable[..., Any]],
        decided: Callable[[Any], Any] | None = None,
        exact: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(methods)
        self.decided = decided
        self.exact = exact


class Frontend(Protocol):
    """Lowers the models of one framework. Stateless; the module of a frontend may import its framework, `accepts` must not."""

    name: str

    def accepts(self, model: object) -> bool:
        """Whether this frontend lowers objects of this type; decided by class and module names."""
        ...

    def lower(self, model: Any, options: LowerOptions) -> Graph:
        """The model as a verified graph with a signature, a location on every node.

        Raises:
            UnsupportedModelError, UnsupportedOpError: for what cannot be lowered exactly.
        """
        ...

    def oracle(self, model: Any) -> Oracle:
        """The source's own functions, against which the compiled model is validated."""
        ...

    def sniff(self, head: bytes, path: Path) -> bool:
        """Whether a file with these first bytes (up to 64 KiB) is one of this frontend's; content decides, never the ending."""
        ...

    def load(self, path: Path, options: LowerOptions) -> Any:
        """Reads a file that `sniff` accepted.

        Raises:
            UntrustedPickleError: for a file that would execute code, without permission.
            FrontendError: for a file that cannot be read.
        """
        ...


class FileFrontend(Frontend, Protocol):
    """A frontend whose framework is asked about a model file in a process of its own, by `SourceProcess`."""

    def open_file(self, file: IO[bytes], kind: str) -> Any:
        """The model in the framework itself, for `oracle`.

        Args:
            file: with the content of the model file.
            kind: what it is to be opened as, as the frontend named it to `SourceProcess`.
        """
        ...

    def weights(self, model: Any) -> Mapping[str, NDArray[Any]]:
        """The arrays of an opened file that holds nothing else; for frontends with such files."""
        ...
