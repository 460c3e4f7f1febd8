"""Pictures as files, for a paper or a page in Markdown, and as SVG inside the HTML page.

A file carries a digest of the numbers that it was drawn from, so that one which belongs to other results is found
without drawing it again, with any version of matplotlib.
"""

import hashlib
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rtrl._utils import validation
from rtrl._utils.formatting import number
from rtrl.errors import ConfigError
from rtrl.report.draw import axis_text, drawn, left_out, picture
from rtrl.report.model import Plot, Record
from rtrl.report.style import NEUTRAL, PAPER

FORMS = ("svg", "pdf", "png")
_MARK = "data-rtrl"  # of an SVG that was written here: the digest of its plot
_REFERENCE = re.compile(r"(?:url\(|^)#([\w-]+)")
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


def names(record: Record | dict[str, Plot]) -> dict[str, Plot]:
    """Every plot of the record by the name of its picture: the claim's id and a number that counts from 1."""
    if isinstance(record, dict):
        return record
    return {f"{claim.id}-{i}": plot for claim in record.claims for i, plot in enumerate(claim.plots, 1)}


def draw_pictures(record: Record | dict[str, Plot], folder: Path, forms: Sequence[str] = ("svg", "pdf")) -> list[Path]:
    """Write every plot as ``<claim>-<number>.<form>``; the folder is made if need be.

    SVG and PNG have no background and can be read on white and on black; PDF is for paper.

    Args:
        record: the results; or plots by the names of their pictures.
        folder: where the files go.
        forms: any of "svg", "pdf" and "png".

    Returns:
        The paths of the files.

    Raises:
        ConfigError: a form is unknown, matplotlib is not installed, or a file cannot be written; the message says
            which, and the remedy.
    """
    for form in forms:
        validation.known("form", form, FORMS)
    files = {
        folder / f"{name}.{form}": _file(plot, form)
        for name, plot in names(record).items()
        for form in dict.fromkeys(forms)
    }
    try:
        if files:
            folder.mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            path.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"{error.filename or folder} cannot be written: {error.strerror or error}") from error
    return list(files)


def outdated_pictures(record: Record, folder: Path, forms: Sequence[str] = ("svg", "pdf")) -> list[Path]:
    """Find pictures that are missing or show other numbers, and SVGs whose plot the record no longer has.

    Args:
        record: the results.
        folder: where the pictures lie.
        forms: the forms that are looked for.

    Returns:
        The paths of the files.
    """
    marks = {folder / f"{name}.{form}": digest(plot) for name, plot in names(record).items() for form in forms}
    found = [path for path, mark in marks.items() if not path.is_file() or mark.encode() not in path.read_bytes()]
    others = sorted(set(folder.glob("*.svg")) - set(marks)) if "svg" in forms else []
    return found + [path for path in others if f'{_MARK}="'.encode() in path.read_bytes()[:2000]]


def digest(plot: Plot) -> str:
    """Sixteen hexadecimal digits that stand for all that a picture shows."""
    shown = asdict(plot)
    for part in (shown, *shown["series"]):
        for name in ("vertical_lines", "x_names", "y_names", "low", "high"):
            if not part.get(name, True):  # what is empty draws nothing
                del part[name]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:16]


def describe(plot: Plot) -> str:
    """The picture in words: what is drawn against what, and every series with its first and last value."""
    logarithmic = " and ".join(axis for axis, log in (("x", plot.log_x), ("y", plot.log_y)) if log)
    axes = f"{plot.y_label} against {plot.x_label}" + (f", logarithmic in {logarithmic}" if logarithmic else "")
    parts = [plot.title, f"{'Lines' if plot.kind == 'line' else 'Points'}: {axes}"]
    for series in plot.series:
        points = drawn(plot, series)
        name = series.name + (" (predicted)" if series.dashed else "")
        if not points:
            parts.append(f"{name}: no points")
        elif plot.kind == "raster":
            parts.append(f"{name}: {len(points)} points")
        else:
            (x0, y0), (x1, y1) = points[0], points[-1]
            ends = (f"{number(y)} at {axis_text(x, plot.x_names)}" for x, y in ((x0, y0), (x1, y1)))
            parts.append(f"{name}: {', '.join(ends)}" + (", with its spread" if series.low else ""))
    parts += [f"A line at {number(mark.x)}: {mark.label}" for mark in plot.vertical_lines if mark.x is not None]
    return ". ".join(part.strip().rstrip(".") for part in parts if part.strip()) + "." + note(plot)


def note(plot: Plot) -> str:
    """What the picture cannot show, as a sentence; nothing if it shows all."""
    missing = left_out(plot)
    if not missing:
        return ""
    what = "1 point has" if missing == 1 else f"{missing} points have"
    return f" {what} no place on a logarithmic axis, being 0 or less."


def inline(plot: Plot, key: str) -> str:
    """The plot as an ``<svg>`` element for a page: colours are the page's variables, names begin with ``key``."""
    return _svg(plot, key, page=True)


def _file(plot: Plot, form: str) -> bytes:
    if form == "svg":
        return f"{_svg(plot, 'plot', page=False)}\n".encode()
    return picture(plot, PAPER if form == "pdf" else NEUTRAL, form, digest(plot))


def _svg(plot: Plot, key: str, page: bool) -> str:
    """What matplotlib draws, made fit to stand in a page: no header, no style for all, no name twice."""
    style = replace(NEUTRAL, titled=False) if page else NEUTRAL
    root = ET.fromstring(picture(plot, style, "svg", digest(plot)))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    values = [value for element in root.iter() for value in element.attrib.values()]
    referenced = {name for value in values for name in _REFERENCE.findall(value)}
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        if element.tag != "text" and not (element.text or "").strip():
            element.text = None
        element.tail = None
        for name, value in list(element.attrib.items()):
            del element.attrib[name]
            if name != "id":
                element.set(name.replace(_XLINK, "xlink:"), _value(name, value, key, page))
            elif value in referenced:
                element.set("id", f"{key}-{value}")
    width, height = (float(value) for value in root.attrib["viewBox"].split()[2:])
    spaces = {"xmlns": "http://www.w3.org/2000/svg", "xmlns:xlink": "http://www.w3.org/1999/xlink"}
    meaning = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": describe(plot)}
    own = {"width": f"{width:g}pt", "height": f"{height:g}pt", _MARK: digest(plot)}
    root.attrib.clear()
    root.attrib.update({**spaces, **meaning} if page else {**own, **spaces, **meaning})
    if not page:
        lines = ET.Element("style")
        lines.text = "*{stroke-linejoin:round;stroke-linecap:butt}"
        root.insert(0, lines)
    return ET.tostring(root, encoding="unicode")


def _value(name: str, value: str, key: str, page: bool) -> str:
    """An attribute's value: references follow the new names; on a page, colours and the font are the page's."""
    if name == f"{_XLINK}href":
        return value.replace("#", f"#{key}-", 1)
    if name in ("d", "x", "y", "transform"):  # a hundredth of a point is seen by nobody
        return re.sub(r"\d+\.\d{3,}", lambda digits: f"{float(digits[0]):.2f}", " ".join(value.split()))
    value = value.replace("url(#", f"url(#{key}-")
    if name != "style":
        return value
    family = "" if page else "; font-family: 'DejaVu Sans', sans-serif"
    value = re.sub(
        r"font: ([\d.]+px) [^;]+|font-size: ([\d.]+px); font-family: [^;]+", rf"font-size: \1\2{family}", value
    )
    if page:
        value = value.replace(NEUTRAL.ink, "var(--ink)")
        for i, colour in enumerate(NEUTRAL.colours):
            value = value.replace(colour, f"var(--series-{i})")
    return value
