"""Where the files of this user's mlec lie: settings, state, caches."""

from __future__ import annotations

import os


def user_folder(variable: str, default: str) -> str | None:
    """``mlec`` in the folder that an environment variable names, as the XDG base directories are.

    Args:
        variable: ``"XDG_STATE_HOME"`` or its like; what is no absolute path counts as unset.
        default: in the home directory, where it is unset.

    Returns:
        None where there is no home.
    """
    configured = os.environ.get(variable, "")
    base = configured if os.path.isabs(configured) else os.path.expanduser(f"~/{default}")
    return f"{base}/mlec" if os.path.isabs(base) else None
