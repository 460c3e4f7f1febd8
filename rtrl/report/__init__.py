"""Show results: an HTML page, pictures for a paper, and tables in Markdown, from one results file.

Everything here works from the file alone: no claim and no oracle is imported. Pictures, and the page that holds them,
need matplotlib: ``pip install 'rtrl[report]'``.
"""

import warnings
from typing import Any

from rtrl.report.load import load_record
from rtrl.report.markdown import update_markdown
from rtrl.report.model import ClaimResult, Finding, Plot, Record, Series, Table, Verdict
from rtrl.report.page import render_page
from rtrl.report.pictures import draw_pictures, outdated_pictures
from rtrl.report.save import plain, to_json

__all__ = [
    "ClaimResult",
    "Finding",
    "Plot",
    "Record",
    "Series",
    "Table",
    "Verdict",
    "draw_pictures",
    "load_record",
    "outdated_pictures",
    "plain",
    "render_page",
    "to_json",
    "update_markdown",
]

_RENAMED = {"Claim": ClaimResult, "Grid": Table}


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    renamed = _RENAMED[name]
    warnings.warn(f"rtrl.report.{name} is called {renamed.__name__} now", DeprecationWarning, stacklevel=2)
    return renamed
