"""The threads of the libraries of source models: as many as the model has that is timed beside them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

JOBS = "LOKY_MAX_CPU_COUNT"
"""What joblib takes for the number of processors: estimators with ``n_jobs=-1``, and LightGBM's, start as many threads."""


@contextmanager
def limited_threads(threads: int) -> Iterator[bool]:
    """Holds the thread pools of all libraries that are loaded to a number, as long as it is open.

    Args:
        threads: of each pool, at most.

    Yields:
        Whether that could be done: without `threadpoolctl`, which comes with scikit-learn, for torch only.
    """
    with ExitStack() as undo:
        before = os.environ.get(JOBS)
        if before is None:
            undo.callback(os.environ.pop, JOBS, None)
        else:
            undo.callback(os.environ.update, {JOBS: before})
        os.environ[JOBS] = str(threads)
        torch = sys.modules.get("torch")
        try:
            from threadpoolctl import threadpool_limits
        except ImportError:
            done = torch is not None
        else:
            undo.enter_context(threadpool_limits(threads))
            done = True
        if torch is not None:  # last: it also keeps a number of its own, by which it shares work out
            undo.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)
        yield done
