"""Lines for the log that leave out the module `logging` where nothing has imported it: it takes 2 of the 50 ms in which a model answers."""

from __future__ import annotations

import sys


def info(name: str, text: str, *arguments: object) -> None:
    """A line of level INFO for the logger of that name. Without the module, nobody has asked to see those."""
    if "logging" in sys.modules:
        import logging

        logging.getLogger(name).info(text, *arguments, stacklevel=2)


def warning(name: str, text: str, *arguments: object) -> None:
    """A line of level WARNING for the logger of that name; standard error shows it where nobody has set up anything else."""
    import logging

    logging.getLogger(name).warning(text, *arguments, stacklevel=2)
