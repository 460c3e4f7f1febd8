"""Where a warning points to: the line of the user, however many calls of this package lie between."""

import inspect
from pathlib import Path

import torch

_SKIPPED = tuple(str(Path(module).parent) for module in (Path(__file__).parent, torch.__file__))


def users_level() -> int:
    """Return the ``stacklevel`` with which ``warnings.warn``, called where this is called, points to the user's line.

    Cost: that of walking up the stack, so for warnings alone.
    """
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_code.co_filename.startswith(_SKIPPED):
        frame, level = frame.f_back, level + 1
    return max(level, 1)
