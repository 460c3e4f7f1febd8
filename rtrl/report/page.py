"""One HTML page of a record that needs nothing but itself: no script, no font, no picture from elsewhere."""

from typing import TYPE_CHECKING

import rtrl
from rtrl._utils import formatting
from rtrl.errors import ConfigError
from rtrl.report import pictures, prose, tables
from rtrl.report.model import ClaimResult, Record, Table
from rtrl.report.style import DARK, LIGHT

if TYPE_CHECKING:
    from markupsafe import Markup


def render_page(record: Record) -> str:
    """Render one HTML page: all claims in a table, each claim with its pictures, tables and explanation, and the run.

    With one version of matplotlib, equal records give equal pages. All text of the record is escaped.

    Args:
        record: the results.

    Returns:
        The page.

    Raises:
        ConfigError: jinja2 or matplotlib is not installed; install the extra ``report``.
    """
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
    environment.filters.update(cell=tables.cell, duration=formatting.duration)
    environment.tests["numeric"] = tables.is_number
    return environment.get_template("page.html.j2").render(
        record=record,
        claims=[(claim, _figures(claim), prose.blocks(claim.explanation)) for claim in record.claims],
        failures=[(claim, line) for claim in record.claims for line in claim.failures],
        run=tables.run(record),
        summary=tables.summary(record),
        sign=tables.SIGNS,
        numeric=tables.numeric,
        light=LIGHT,
        dark=DARK,
        version=rtrl.__version__,
    )


def _figures(claim: ClaimResult) -> list[tuple[str, "Markup", str, tuple[Table, str]]]:
    """For every plot: its title, its picture, what the picture cannot show, and its numbers with a note."""
    from markupsafe import Markup

    return [
        (
            plot.title,
            Markup(pictures.inline(plot, f"{claim.id}-{i}")),  # an element tree wrote it, and escaped it
            pictures.note(plot).strip(),
            tables.numbers(plot),
        )
        for i, plot in enumerate(claim.plots, 1)
    ]
