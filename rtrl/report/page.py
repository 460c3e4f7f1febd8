"""One HTML page of a record that needs nothing but itself: no script, no font, no picture from elsewhere."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import rtrl
from rtrl._utils.code_digest import installed_code
from rtrl.errors import ConfigError
from rtrl.report import cards, pictures, questions, tables
from rtrl.report.model import ClaimResult, Plot, Record, Table
from rtrl.report.style import DARK, LIGHT
from rtrl.report.training_curves import training_plots, training_tables
from rtrl.report.training_log import TrainingLog

SPREADS = (
    "Runs that differ in the seed alone are one curve: their median, and a band from the lowest to the highest.",
    "A single run is smoothed: each point is the mean of the rows before it, a twentieth of all and five at least; the "
    "band is from the lowest of them to the highest.",
)

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


def render_page(record: Record) -> str:
    """Render one HTML page: five questions and their answers, all claims in a table, a card per claim, and the run.

    With one version of matplotlib and of this package, equal records give equal pages. All text of the record is
    escaped.

    Args:
        record: the results.

    Returns:
        The page.

    Raises:
        ConfigError: jinja2 or matplotlib is not installed; install the extra ``report``.
    """
    template = _environment().get_template("page.html.j2")
    asked = [
        (answer, None if answer.figure is None else _figure(answer.figure[1], f"question-{answer.name}"))
        for answer in questions.answers(record)
    ]
    return template.render(
        record=record,
        faults=cards.faults(record),
        answers=asked,
        claims=[(claim, cards.card(claim), _figures(claim), cards.explanation(claim)) for claim in record.claims],
        failures=[(claim, line) for claim in record.claims for line in claim.failures],
        run=dict(tables.run(record, installed_code())),
        summary=tables.summary(record),
        sign=tables.SIGNS,
        long=tables.LONG,
        trust=tables.TRUST,
    )


def render_training_page(logs: Sequence[TrainingLog]) -> str:
    """Render one HTML page: the curves of training runs with their spread, their last figures and their settings.

    Args:
        logs: the logs of the runs.

    Returns:
        The page.

    Raises:
        ConfigError: jinja2 or matplotlib is not installed; install the extra ``report``.
    """
    template = _environment().get_template("training.html.j2")
    plots = training_plots(logs)
    several = "s" * (len(logs) > 1)
    rows = sum(map(len, logs))
    return template.render(
        names=", ".join(dict.fromkeys(str(log.settings.get("task", log.name)) for log in logs)),
        summary=f"{len(logs)} run{several} of rtrl train, {rows} row{'s' * (rows != 1)}.",
        notes=[
            *SPREADS,
            *(f"{log.name}: the last line is not whole and is left out." for log in logs if log.incomplete),
        ],
        figures=[_figure(plot, f"training-{i}") for i, plot in enumerate(plots, 1)],
        tables=training_tables(logs),
    )


class Figure(NamedTuple):
    """A picture on a page, what it cannot show, its numbers, and what was left out of them."""

    title: str
    picture: "Markup"
    note: str
    numbers: Table
    left_out: str


def _environment() -> "Environment":
    try:
        import jinja2
    except ImportError as error:
        raise ConfigError("jinja2 writes the page, and it is not installed: pip install 'rtrl[report]'") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rtrl.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(cell=tables.cell)
    environment.tests["numeric"] = tables.is_number
    environment.globals.update(numeric=tables.numeric, light=LIGHT, dark=DARK, version=rtrl.__version__)
    return environment


def _figures(claim: ClaimResult) -> list["Figure"]:
    return [_figure(plot, f"{claim.id}-{i}") for i, plot in enumerate(claim.plots, 1)]


def _figure(plot: Plot, key: str) -> "Figure":
    from markupsafe import Markup

    picture = Markup(pictures.inline(plot, key))  # an element tree wrote it, and escaped it
    return Figure(plot.title, picture, pictures.note(plot).strip(), *tables.numbers(plot))
