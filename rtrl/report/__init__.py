"""Show results: an HTML page, pictures for a paper, and tables in Markdown, from one results file; curves from the logs
of training runs.

Everything here works from the file alone: no claim and no oracle is imported. Pictures, and the page that holds them,
need matplotlib: ``pip install 'rtrl[report]'``.
"""

from rtrl._utils.renamed_names import renamed_names
from rtrl.report.load import load_record
from rtrl.report.markdown import update_markdown
from rtrl.report.model import ClaimResult, Finding, Plot, Record, Series, Table, Verdict, VerticalLine
from rtrl.report.page import render_page, render_training_page
from rtrl.report.pictures import draw_pictures, outdated_pictures
from rtrl.report.save import plain, to_json
from rtrl.report.training_curves import training_plots, training_tables
from rtrl.report.training_log import TrainingLog, is_training_log, load_training_log

__all__ = [
    "ClaimResult",
    "Finding",
    "Plot",
    "Record",
    "Series",
    "Table",
    "TrainingLog",
    "Verdict",
    "VerticalLine",
    "draw_pictures",
    "is_training_log",
    "load_record",
    "load_training_log",
    "outdated_pictures",
    "plain",
    "render_page",
    "render_training_page",
    "to_json",
    "training_plots",
    "training_tables",
    "update_markdown",
]

__getattr__ = renamed_names(__name__, {"Claim": "ClaimResult", "Grid": "Table"})
