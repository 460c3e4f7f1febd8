"""Rewrite what stands between the markers of a page in Markdown, from a record.

``<!-- rtrl:claims-table -->`` … ``<!-- /rtrl:claims-table -->`` holds the table of all claims, ``rtrl:questions`` the
five questions and their answers, ``rtrl:faults`` which planted faults change which verdicts, ``rtrl:claims`` one
section per claim, ``rtrl:claim:ID`` one claim without its heading, ``rtrl:run`` how, when and where it was measured.
All else on the page is left as it is.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from rtrl.errors import ConfigError
from rtrl.report import cards, prose, questions, tables
from rtrl.report.model import Cell, ClaimResult, Record, Table

NAMES = ("questions", "claims-table", "faults", "claims", "run", "claim:ID")
_MARKER = re.compile(r"<!-- (/?)rtrl:([\w:-]+) -->")


def update_markdown(record: Record, pages: Sequence[Path], folder: Path | None = None) -> dict[Path, tuple[str, str]]:
    """Render the record into the pages' texts; nothing is written.

    Where one of the pages holds the claims' sections, tables of claims link to them.

    Args:
        record: the results.
        pages: the pages, each with at least one pair of markers.
        folder: where the pictures lie that sections show; None for no pictures.

    Returns:
        For every page its present text and its new one.

    Raises:
        ConfigError: a page cannot be read, has no marker, its markers do not stand in pairs, or one names a claim that
            the record lacks; the message says where.
    """
    texts = {page: _read(page) for page in pages}
    spans = {page: _spans(text, page) for page, text in texts.items()}
    sections = next((page for page, found in spans.items() if "claims" in found), None)
    new = {}
    for page, text in texts.items():
        link = None if sections is None else "" if sections == page else _path(sections, page)
        images = None if folder is None else _path(folder, page)
        parts, at = [], 0
        for name, (begin, end) in spans[page].items():
            parts += [text[at:begin], f"\n\n{_content(record, name, link, images, page)}\n\n"]
            at = end
        new[page] = (text, "".join([*parts, text[at:]]))
    return new


def _read(page: Path) -> str:
    try:
        return page.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{page} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _spans(text: str, page: Path) -> dict[str, tuple[int, int]]:
    """What is between the markers of each name, in the order of the page."""
    found: dict[str, tuple[int, int]] = {}
    opened: re.Match[str] | None = None
    for marker in _MARKER.finditer(text):
        closes, name = marker[1], marker[2]
        line = text.count("\n", 0, marker.start()) + 1
        if name not in NAMES and not name.startswith("claim:"):
            raise ConfigError(
                f"{page}:{line}: the marker rtrl:{name} is unknown; known are rtrl:{', rtrl:'.join(NAMES)}"
            )
        if not closes and opened is None and name not in found:
            opened = marker
        elif closes and opened is not None and opened[2] == name:
            found[name] = (opened.end(), marker.start())
            opened = None
        else:
            raise ConfigError(
                f"{page}:{line}: {marker[0]} does not belong here; markers stand in pairs, each pair once"
            )
    if opened is not None:
        raise ConfigError(f"{page}: {opened[0]} is never closed by <!-- /rtrl:{opened[2]} -->")
    if not found:
        raise ConfigError(
            f"{page} has no marker; put <!-- rtrl:claims-table --> and <!-- /rtrl:claims-table --> into it"
        )
    return found


def _path(target: Path, page: Path) -> str:
    return Path(os.path.relpath(target.resolve(), page.resolve().parent)).as_posix()


def _content(record: Record, name: str, link: str | None, images: str | None, page: Path) -> str:
    if name == "claims-table":
        return claims_table(record, link)
    if name == "questions":
        return "\n\n".join(_answer(answer, link, images) for answer in questions.answers(record))
    if name == "faults":
        found = cards.faults(record)
        return _grid(found) if found.rows else "No fault was planted while these were measured."
    if name == "claims":
        return "\n\n".join(section(claim, images) for claim in record.claims)
    if name.startswith("claim:"):
        for claim in record.claims:
            if claim.id == name.removeprefix("claim:"):
                return body(claim, images)
        raise ConfigError(f"{page}: the marker rtrl:{name} names a claim that the results do not have")
    rows = [[escape(entry), escape(text)] for entry, text in tables.run(record)]
    return f"{_table(['', ''], rows)}\n\n{tables.TRUST}"


def _answer(answer: questions.Answer, link: str | None, images: str | None) -> str:
    """A question under its heading: the answer, its sentences, the claims and a picture."""
    parts = [f"### {answer.question}", f"**{tables.SIGNS[answer.verdict]} {answer.word}.**"]
    parts += [escape(sentence) for sentence in answer.sentences]
    if answer.claims:
        parts.append("Claims: " + ", ".join(_name(claim, link) for claim in answer.claims) + ".")
    if images is not None and answer.figure is not None:
        claim, plot = answer.figure
        parts.append(f"![{escape(plot.title or claim.id)}]({images}/{claim.id}-1.svg)")
    return "\n\n".join(parts)


def _name(claim: ClaimResult, link: str | None) -> str:
    """The claim's id, as a link to its section where there is one."""
    return f"`{claim.id}`" if link is None else f"[`{claim.id}`]({link}#{anchor(claim.id)})"


def claims_table(record: Record, link: str | None) -> str:
    """All claims, a row each; ``link`` is the page with their sections, "" this one, None no page."""
    rows = [
        [
            _name(claim, link),
            escape(claim.claimed),
            escape(claim.result),
            escape(claim.threshold),
            _verdict(claim),
        ]
        for claim in record.claims
    ]
    return _table(["claim", "claimed", "measured", "threshold", "verdict"], rows)


def section(claim: ClaimResult, images: str | None) -> str:
    """A claim under its heading."""
    return f"## `{claim.id}`\n\n{body(claim, images)}"


def body(claim: ClaimResult, images: str | None) -> str:
    """The card of a claim, its tables, its pictures from the folder ``images``, if any, and how it was measured."""
    parts = ["\n".join(f"- **{name}**: {''.join(map(_piece, pieces))}" for name, pieces in _card(claim))]
    if claim.failures:
        lines = "\n".join(f"- {escape(line)}" for line in claim.failures)
        parts.append(f"**✗ The code does not do what it says:**\n\n{lines}")
    parts += [_grid(grid) for grid in claim.tables]
    if images is not None:
        parts += [
            f"![{escape(plot.title or claim.id)}]({images}/{claim.id}-{i}.svg)" for i, plot in enumerate(claim.plots, 1)
        ]
    if explained := _prose(cards.explanation(claim)):
        parts.append(f'<details markdown="1">\n<summary>How it is measured</summary>\n\n{explained}\n\n</details>')
    return "\n\n".join(parts)


def _card(claim: ClaimResult) -> list[cards.Entry]:
    """The card; the verdict has its sign."""
    return [
        (name, [prose.Piece(f"{tables.SIGNS[claim.verdict]} ", "text"), *pieces] if name == "verdict" else pieces)
        for name, pieces in cards.card(claim)
    ]


def anchor(heading: str) -> str:
    """The name under which a heading is linked to."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def escape(text: str) -> str:
    """The text on one line with nothing in it that Markdown or HTML would interpret."""
    return _escape_signs(" ".join(text.split()))


def _escape_signs(text: str) -> str:
    line = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~$])|((?<!\w)_|_(?!\w))", lambda sign: f"\\{sign[0]}", line)


def _verdict(claim: ClaimResult) -> str:
    word = f"**{claim.verdict}**" if claim.verdict == "does not hold" else claim.verdict
    return f"{tables.SIGNS[claim.verdict]} {word}" + (f": {escape(claim.condition)}" if claim.condition else "")


def _grid(grid: Table) -> str:
    right = tables.numeric(grid.columns, grid.rows)
    rows = [[_cell(value) for value in row] for row in grid.rows]
    body = _table([escape(name) for name in grid.columns], rows, right)
    title = escape(grid.title)
    if len(rows) <= tables.LONG:
        return f"{title}:\n\n{body}" if title else body
    summary = (
        f"{title or 'Table'} ({len(rows)} rows)"  # the attribute is for MkDocs, which else takes all inside for HTML
    )
    return f'<details markdown="1">\n<summary>{summary}</summary>\n\n{body}\n\n</details>'


def _cell(value: Cell) -> str:
    return escape(tables.cell(value)) if isinstance(value, str) else tables.cell(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool] = ()) -> str:
    rule = ["---:" if i < len(right) and right[i] else "---" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def _prose(blocks: Sequence[prose.Block]) -> str:
    """A docstring as Markdown; items of a list stand together."""
    out, before = "", ""
    for block in blocks:
        if block.kind == "lines":
            part = "\n".join(f"    {line}".rstrip() for line in block.pieces[0].text.splitlines())
        else:
            part = ("- " if block.kind == "item" else "") + "".join(map(_piece, block.pieces))
        out += ("" if not out else "\n" if block.kind == before == "item" else "\n\n") + part
        before = block.kind
    return out


def _piece(piece: prose.Piece) -> str:
    if piece.kind == "code":
        return f"`` {piece.text} ``" if "`" in piece.text else f"`{piece.text}`"
    sign = {"strong": "**", "stress": "*"}.get(piece.kind)
    return f"{sign}{escape(piece.text)}{sign}" if sign else _escape_signs(piece.text)
