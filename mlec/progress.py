"""Progress of long work: a bar on a terminal, nothing elsewhere; and how long each stage took."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Progress:
    """Called with what is being done, how much of it is done, and how much there is.

    Attributes:
        seconds: by the first word of a stage, in the order in which they began: how long the work was in it. A stage lasts until
            another one is named.
    """

    def __init__(self, show: Callable[[str, int, int], None] | None = None) -> None:
        self._show = show
        self._stage, self._since = "", time.perf_counter()
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if self._stage:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage.partition(" ")[0], now
        if self._show is not None:
            self._show(stage, done, total)


@contextmanager
def progress_bar(show: bool | None, title: str) -> Iterator[Progress]:
    """A bar on stderr while the block runs.

    Args:
        show: None shows it on a terminal only.
        title: what is being worked on.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield Progress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)

        def update(stage: str, done: int, total: int) -> None:
            bar.update(task, description=f"{title}: {stage}", completed=done, total=total)

        yield Progress(update)
