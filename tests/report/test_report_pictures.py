"""Pictures show all points, can be read on white and on black and without colour, and are the same every time."""

import itertools
import json
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_samples import MEMORY, RASTER, nasty, sample, written

from rtrl.errors import ConfigError
from rtrl.report import Plot, Record, Series, draw_pictures, load_record, outdated_pictures
from rtrl.report.draw import _bars, runs
from rtrl.report.load import record as read
from rtrl.report.pictures import describe, digest, inline, names, note
from rtrl.report.style import DARK, LIGHT, MARKS, NEUTRAL, PAPER
from rtrl.report.tables import numbers

XML = "{http://www.w3.org/2000/svg}"


def plot_of(shape: dict[str, Any], **changes: Any) -> Plot:
    whole = sample()
    whole["claims"][0]["plots"] = [json.loads(json.dumps({**shape, **changes}))]
    return read(whole).claims[0].plots[0]


def series(x: list[Any], y: list[Any], name: str = "a") -> list[dict[str, Any]]:
    return [{"name": name, "x": x, "y": y}]


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ET.fromstring(svg).iter(f"{XML}text")]


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return load_record(written(tmp_path / "r.json", sample()))


def test_a_file_for_every_plot_and_form(record: Record, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "pictures"
    paths = draw_pictures(record, folder, ("svg", "pdf", "png", "svg"))
    assert sorted(paths) == sorted(folder.iterdir())
    assert {path.stem for path in paths} == {"memory-1", "depends-1", "depends-2"}
    begins = {".svg": b"<svg ", ".pdf": b"%PDF-", ".png": b"\x89PNG"}
    assert all(path.read_bytes().startswith(begins[path.suffix]) for path in paths)
    assert all(digest(names(record)[path.stem]).encode() in path.read_bytes() for path in paths)
    one = replace(record, claims=record.claims[:1])
    for path in draw_pictures(one, tmp_path / "again", ("svg", "pdf", "png")):
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_outdated_pictures_are_found_without_drawing(record: Record, tmp_path: Path) -> None:
    forms = ("svg", "png")
    draw_pictures(record, tmp_path, forms)
    (tmp_path / "somebody-elses.svg").write_text("<svg/>")
    assert outdated_pictures(record, tmp_path, forms) == []
    changed = sample()
    changed["claims"][0]["plots"][0]["series"][0]["y"][0] += 1
    del changed["claims"][1]["plots"][1]
    found = outdated_pictures(read(changed), tmp_path, forms)
    assert [path.name for path in found] == ["memory-1.svg", "memory-1.png", "depends-2.svg"]
    (tmp_path / "depends-1.svg").unlink()
    assert tmp_path / "depends-1.svg" in outdated_pictures(record, tmp_path, ("svg",))


def test_text_stays_text_and_has_units(record: Record) -> None:
    svg = inline(names(record)["memory-1"], "k")
    assert {"T, steps", "held, bytes", "rtrl", "\u2060_BPTT", "T·B", "100", "1000"} <= set(texts(svg))
    assert "DejaVu" not in svg  # the page's own font


def test_the_page_sets_the_colours(record: Record) -> None:
    svg = inline(names(record)["depends-2"], "k")
    assert all(f"var(--series-{i})" in svg for i in range(6))
    assert "var(--ink)" in svg
    assert not any(colour in svg for style in (LIGHT, DARK, NEUTRAL) for colour in (style.ink, *style.colours))
    assert "#000" not in svg and "#fff" not in svg


def test_no_name_is_used_twice(record: Record) -> None:
    plots = list(names(record).values())
    found = [
        element.attrib["id"]
        for i, plot in enumerate([*plots, *plots])
        for element in ET.fromstring(inline(plot, f"k{i}")).iter()
        if "id" in element.attrib
    ]
    assert found
    assert len(set(found)) == len(found)


def test_every_reference_has_a_target(record: Record) -> None:
    for svg in (inline(names(record)["memory-1"], "k"), inline(names(record)["depends-1"], "k")):
        root = ET.fromstring(svg)
        ids = {element.attrib["id"] for element in root.iter() if "id" in element.attrib}
        used = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href") or v.startswith("url(")]
        assert used
        assert {v.removeprefix("url(").rstrip(")").removeprefix("#") for v in used} == ids


def test_pictures_have_words(record: Record) -> None:
    plots = names(record)
    root = ET.fromstring(inline(plots["memory-1"], "k"))
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"] == describe(plots["memory-1"])
    assert describe(plots["memory-1"]) == (
        "Memory against T. Lines: held, bytes against T, steps, logarithmic in x and y. rtrl: 500\u202f000 at 10, "
        "500\u202f000 at 1000. _BPTT: 100\u202f000 at 100, 100\u202f000 at 100. T·B (predicted): 10\u202f000 at 10, "
        "1\u202f000\u202f000 at 1000. 1 point has no place on a logarithmic axis, being 0 or less."
    )
    assert "experts: 6 points" in describe(plots["depends-1"])


def test_neighbours_in_a_raster_are_one_bar() -> None:
    plot = plot_of(RASTER)
    assert runs(plot, 0) == [(0, 5, 6), (1, 0, 2), (3, 6, 6)]
    assert numbers(plot)[0].rows[:3] == [["experts", 0, "5 – 6"], ["experts", 1, "0 – 2"], ["experts", 3, "6"]]


def test_numbers_behind_lines() -> None:
    grid = numbers(plot_of(MEMORY))[0]
    assert grid.columns == ["T, steps", "rtrl", "_BPTT", "T·B (predicted)"]
    assert grid.rows == [[10, 5e5, 0, 1e4], [100, 5.1e5, 1e5, None], [1000, 5e5, None, 1e6]]
    many = numbers(plot_of(MEMORY, series=series(list(range(1000)), [0] * 1000)))
    assert len(many[0].rows) == 200
    assert many[1] == "One row in 5 of 1000; the results file has them all."
    assert len(numbers(plot_of(MEMORY, series=series(list(range(201)), [0] * 201)))[0].rows) == 101


def test_bands_of_several_series_lie_beside_one_another() -> None:
    """Three series at the same places: each has its own share of the height and its own colour."""
    from matplotlib.figure import Figure

    plot = plot_of(RASTER)
    alike = [replace(plot.series[0], name=name, x=[0.0, 1.0, 5.0], y=[0.0, 0.0, 1.0]) for name in "abc"]
    axes = Figure().add_subplot()
    _bars(axes, replace(plot, series=alike), PAPER)
    assert len({patch.get_facecolor() for patch in axes.patches}) == 3
    spans = []
    for patch in axes.patches:
        heights = patch.get_path().vertices[:, 1]
        for y in (0.0, 1.0):
            own = heights[abs(heights - y) < 0.5]
            spans.append((float(own.min()), float(own.max())))
    spans.sort()
    assert all(stop <= start + 1e-9 for (_, stop), (start, _) in itertools.pairwise(spans))
    assert len(spans) == 6 and all(stop - start == pytest.approx(0.8 / 3) for start, stop in spans)


SPREAD = {
    "title": "Seconds",
    "x_label": "learner",
    "y_label": "seconds",
    "kind": "points",
    "log_y": True,
    "series": [{"name": "H = 32", "x": [0, 1], "y": [1, 4], "low": [0, 2], "high": [2, 8]}],
    "x_names": ["BlockRTRL", "BPTT"],
    "vertical_lines": [{"x": 0.5, "label": "T* = 70"}],
}


@pytest.mark.parametrize("kind", ["points", "line"])
def test_a_spread_a_mark_and_categories_are_drawn_and_said(kind: str) -> None:
    plot = plot_of(SPREAD, kind=kind)
    svg = inline(plot, "k")
    assert {"BlockRTRL", "BPTT", "T* = 70", "H = 32"} <= set(texts(svg))
    assert describe(plot).endswith("H = 32: 1 at BlockRTRL, 4 at BPTT, with its spread. A line at 0.5: T* = 70.")
    grid = numbers(plot)[0]
    assert grid.columns == ["learner", "H = 32", "H = 32, low", "H = 32, high"]
    assert grid.rows == [["BlockRTRL", 1, 0, 2], ["BPTT", 4, 2, 8]]
    bare = replace(plot, vertical_lines=[], series=[replace(plot.series[0], low=[], high=[])])
    assert len({digest(plot), digest(bare), digest(replace(plot, x_names=[]))}) == 3
    assert len({svg, inline(bare, "k")}) == 2


def test_runs_become_their_median_and_their_spread() -> None:
    found = Series.of_runs("a", [1, 2], [[1, 5], [3, 4], [2, 9]])
    assert (found.y, found.low, found.high) == ([2, 5], [1, 4], [3, 9])


@pytest.mark.parametrize("kind", ["line", "raster"])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([], []),
        ([1], [3]),
        ([None, None], [1, None]),
        ([0, 1], [0, -1]),
        ([1, 2, 3], [5, 5, 5]),
        ([1, 2], [1e300, -1e300]),
        ([1e-300, 1e300], [1e-320, 1e299]),
        ([1, 1, 1], [0.5, 0.25, 0.125]),
        ([3, 1, 2], [1e-9, 1.0000001e-9, 1e-9]),
        ([0, 10**6], [0, 500]),
    ],
)
def test_degenerate_plots_are_drawn(kind: str, log: bool, x: list[Any], y: list[Any]) -> None:
    plot = plot_of(MEMORY, kind=kind, log_x=log, log_y=log, series=series(x, y))
    assert ("no points" in texts(inline(plot, "k"))) == ("no points" in describe(plot))
    numbers(plot)


def test_what_has_no_place_is_said() -> None:
    assert note(plot_of(MEMORY, series=series([0, 1, 2], [1, -1, 2]))).startswith(" 2 points have no place")
    assert note(plot_of(MEMORY, log_x=False, log_y=False)) == ""


def test_nasty_text_is_only_text() -> None:
    plot = read(nasty()).claims[0].plots[0]
    svg = inline(plot, "k")
    root = ET.fromstring(svg)
    assert not [element for element in root.iter() if element.tag == f"{XML}script"]
    assert any("$x$ _a_" in text for text in texts(svg))


def test_the_users_settings_of_matplotlib_change_nothing(record: Record) -> None:
    import matplotlib

    before = inline(names(record)["depends-1"], "k")
    with matplotlib.rc_context({"font.size": 30, "xtick.major.size": 20, "axes.xmargin": 0.4}):
        assert inline(names(record)["depends-1"], "k") == before
        assert matplotlib.rcParams["font.size"] == 30


def test_without_matplotlib_the_remedy_is_named(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.style"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install 'rtrl\[report\]'"):
        draw_pictures(record, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_forms_are_checked_and_folders(record: Record, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no form 'gif'; there are: svg, pdf, png"):
        draw_pictures(record, tmp_path, ("gif",))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        draw_pictures(record, tmp_path / "file", ("svg",))


# ---------------------------------------------------------------------- colours

# Machado, Oliveira and Fernandes (2009), severity 1: what is left to eyes that see no red, no green, no blue.
EYES = {
    "all": np.eye(3),
    "no red": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "no green": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    ),
    "no blue": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]]
    ),
}


def linear(colour: str) -> Any:
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    low, high = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def lab(light: Any) -> Any:
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
    x, y, z = np.cbrt(np.maximum(np.array(to_xyz) @ np.clip(light, 0, 1) / [0.95047, 1, 1.08883], 0.008856))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize(
    ("style", "grounds"),
    [(LIGHT, ["#ffffff"]), (DARK, ["#15181c"]), (NEUTRAL, ["#ffffff", "#000000"]), (PAPER, ["#ffffff"])],
    ids=["light", "dark", "neutral", "paper"],
)
def test_colours_stand_out_for_all_eyes(style: Any, grounds: list[str]) -> None:
    assert all(contrast(colour, ground) >= 3 for colour in (style.ink, *style.colours) for ground in grounds)
    for eye, matrix in EYES.items():
        seen = [lab(matrix @ linear(colour)) for colour in style.colours]
        nearest = min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2))
        assert nearest >= 18, f"{eye}: {nearest:.0f}"  # 2 is just seen side by side


def test_series_differ_without_colour() -> None:
    assert len({(i % len(LIGHT.colours), i % len(MARKS)) for i in range(42)}) == 42
