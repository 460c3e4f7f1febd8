"""What was measured, for people: a page, pictures for a paper, and tables in Markdown, from one results file.

Everything here works from the file alone: no claim and no oracle is imported. Pictures, and the page that holds them,
need matplotlib: ``pip install 'rtrl[report]'``.
"""

from rtrl.report.load import Claim, Grid, Plot, Record, Series, load_record
from rtrl.report.markdown import update_markdown
from rtrl.report.page import render_page
from rtrl.report.pictures import draw_pictures, outdated_pictures

__all__ = [
    "Claim",
    "Grid",
    "Plot",
    "Record",
    "Series",
    "draw_pictures",
    "load_record",
    "outdated_pictures",
    "render_page",
    "update_markdown",
]
