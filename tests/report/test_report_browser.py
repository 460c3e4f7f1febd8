"""The page in a real browser: on a phone, on a desk, in the dark, on paper."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from headless import Browser, found
from report_samples import sample

from rtrl.report import render_page
from rtrl.report.load import record as read
from rtrl.report.style import DARK, LIGHT

pytestmark = pytest.mark.skipif(found() is None, reason="no Chromium is installed; .ci/run says how")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    try:
        started = Browser(tmp_path_factory.mktemp("profile"))
    except (OSError, RuntimeError, TimeoutError) as error:
        pytest.skip(f"a Chromium is installed, but does not start here: {error}")
    with started:
        yield started


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    whole = sample()
    wide = {"title": "Wide", "columns": [f"column {i}" for i in range(30)], "rows": [["x" * 12] * 30] * 40}
    whole["claims"][0]["tables"].append(wide)
    whole["claims"][0]["claimed"] = "long" * 60
    whole["claims"][2]["condition"] = "because " + "q" * 300
    whole["claims"][0]["explanation"] += "\n\n    " + "S_{t+1} = J_t S_t + " * 20
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_page(read(whole)), encoding="utf-8")
    return path.as_uri()


def look(browser: Browser, url: str, width: int, scheme: str = "light", media: str = "screen") -> None:
    browser.ask("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.ask("Emulation.setEmulatedMedia", media=media, features=features)
    browser.open(url)


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


def complaints(browser: Browser) -> list[Any]:
    browser.value("1")  # all events before this answer have come
    return [
        event
        for event in browser.events
        if event["method"] in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    ]


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_sticks_out(browser: Browser, url: str, width: int) -> None:
    look(browser, url, width)
    assert browser.value("innerWidth") == width
    assert browser.value("document.documentElement.scrollWidth") <= width
    browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.value("document.documentElement.scrollWidth") <= width
    outside = """[...document.querySelectorAll('body *')].filter(e =>
        !e.closest('.scroll > *, pre > *, svg *') && e.getBoundingClientRect().right > innerWidth + 1
    ).map(e => e.tagName)"""
    assert browser.value(outside) == []
    sideways = "[...document.querySelectorAll('.scroll, pre')].some(e => e.scrollWidth > e.clientWidth)"
    assert browser.value(sideways) == (width >= 1280)  # thirty columns; on a phone, tables are stacked


def test_stacked_tables_are_tables_to_a_screen_reader(browser: Browser, url: str) -> None:
    look(browser, url, 390)
    nodes = browser.ask("Accessibility.getFullAXTree")["nodes"]
    roles = [node.get("role", {}).get("value") for node in nodes]
    assert {"table", "row", "columnheader", "rowheader", "cell", "navigation", "main", "heading"} <= set(roles)


def test_a_phone_shows_letters_of_a_size_to_read(browser: Browser, url: str) -> None:
    look(browser, url, 390)
    sizes = """[...document.querySelectorAll('svg text')].map(e =>
        parseFloat(getComputedStyle(e).fontSize) * e.ownerSVGElement.getBoundingClientRect().width
        / e.ownerSVGElement.viewBox.baseVal.width)"""
    assert min(browser.value(sizes)) >= 8
    assert browser.value("parseFloat(getComputedStyle(document.querySelector('td')).fontSize)") >= 14


def test_no_complaint_and_no_request(browser: Browser, url: str) -> None:
    look(browser, url, 1280)
    assert complaints(browser) == []
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert [address for address in asked if address not in (url, "data:,")] == []


def test_that_a_request_would_be_seen(browser: Browser, url: str) -> None:
    look(browser, url, 1280)
    browser.value("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))")
    assert complaints(browser) != []  # the page's own policy forbids it


@pytest.mark.parametrize(
    ("scheme", "media", "style", "ground"),
    [
        ("light", "screen", LIGHT, "#ffffff"),
        ("dark", "screen", DARK, "#15181c"),
        ("dark", "print", LIGHT, "#ffffff"),
    ],
)
def test_colours_follow_the_reader(
    browser: Browser, url: str, scheme: str, media: str, style: Any, ground: str
) -> None:
    look(browser, url, 1280, scheme, media)
    assert browser.value("getComputedStyle(document.body).backgroundColor") == rgb(ground)
    strokes = set(browser.value("[...document.querySelectorAll('svg path')].map(e => getComputedStyle(e).stroke)"))
    assert {rgb(colour) for colour in style.colours} <= strokes
    fills = set(browser.value("[...document.querySelectorAll('svg text')].map(e => getComputedStyle(e).fill)"))
    assert fills == {rgb(style.ink)}


def test_it_prints(browser: Browser, url: str) -> None:
    look(browser, url, 1280)
    data = browser.ask("Page.printToPDF", preferCSSPageSize=True)["data"]
    assert base64.b64decode(data).startswith(b"%PDF-")
    look(browser, url, 700, media="print")
    hidden = "[...document.querySelectorAll('.scroll')].filter(e => getComputedStyle(e).overflowY !== 'visible').length"
    assert browser.value(hidden) == 0


def test_pictures_have_their_names_where_readers_ask(browser: Browser, url: str) -> None:
    look(browser, url, 1280)
    nodes = browser.ask("Accessibility.getFullAXTree")["nodes"]
    images = [node["name"]["value"] for node in nodes if node.get("role", {}).get("value") in ("image", "img")]
    assert len(images) == 4
    assert any(name.startswith("Memory against T. Lines: held, bytes against T, steps") for name in images)


def test_that_the_browser_sees_what_sticks_out(browser: Browser, url: str, tmp_path: Path) -> None:
    path = tmp_path / "wide.html"
    path.write_text("<!DOCTYPE html><meta name=viewport content='width=device-width'><div style='width:900px'>x</div>")
    look(browser, path.as_uri(), 360)
    assert browser.value("document.documentElement.scrollWidth") > 360
