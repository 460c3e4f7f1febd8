"""One word for one thing: the words that this package once coined do not come back.

The field has a word for each of them; where it says what the word was used for, the remedy is named.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The word as a regular expression, and what to say.
COINED: dict[str, str] = {
    r"births?|born": "immediate influence",
    r"earn(s|ed|ing)?": "contribute, receive or accumulate a gradient",
    r"ow(e|es|ed|ing)": "pending gradient",
    r"(un)?paid|pays?|paying": "accumulate a gradient; cost",
    r"sleepers?|asleep|sle(ep|eps|eping|pt)": "dormant slice, dormant, dormancy",
    r"wak(e|es|en|ing)|wok(e|en)|waken(s|ed|ing)?": "reactivate, reactivation",
    r"leads?|led": "bring up to date, propagate",
    r"onward|anew": "say what is done, or again",
    r"whoever|whatever": "any, every, or the noun",
    r"told": "declared",
    r"laid|lay(s|ing)? down|lay(s|ing)? it down": "recorded, forced, given",
    r"so many": "n",
    r"pupils?|lessons?": "trainer, training configuration",
    r"(?<!there )is no(?! longer\b)(?! more than\b)(?! less than\b)": "is not a",
}
# Identifiers that say nothing: the noun that they stand for is meant.
EMPTY_NAMES = ("wanted", "mine")
# Where a word means something else, with the text around it as the reason.
INNOCENT = [
    r"time\.sleep",
    r"\bleading\b",
]
_WORDS = re.compile("|".join(rf"(?P<w{i}>(?<![A-Za-z])(?:{word})(?![A-Za-z]))" for i, word in enumerate(COINED)), re.I)
_NAMES = re.compile(rf"\b_?({'|'.join(EMPTY_NAMES)})(?:_\w+)?\b(?=\s*(?:[=,:)\[.]|\bin\b|\bfor\b))")
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")
_INNOCENT = re.compile("|".join(INNOCENT))

SOURCES = [
    *(path for folder in ("rtrl", "oracles", "examples") for path in (ROOT / folder).rglob("*") if path.is_file()),
    *(ROOT / "docs").rglob("*.md"),
    ROOT / "README.md",
]
SOURCES = [path for path in SOURCES if path.suffix in (".py", ".md", ".j2")]
PLACES = sorted({path.relative_to(ROOT).parts[:2] for path in SOURCES})


def coined(text: str, code: bool = False) -> list[str]:
    """The coined words of a text, each with the number of its line and what to say in its place."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        bare = _HUMP.sub("_", _INNOCENT.sub("", line))
        for match in _WORDS.finditer(bare):
            remedy = list(COINED.values())[int((match.lastgroup or "w0")[1:])]
            found.append(f"{number}: {match[0]!r} ({remedy})")
        if code:
            found += [f"{number}: {match[0]!r} (the noun it stands for)" for match in _NAMES.finditer(bare)]
    return found


@pytest.mark.parametrize("place", [pytest.param(place, id="/".join(place)) for place in PLACES])
def test_no_coined_word(place: tuple[str, ...]) -> None:
    paths = [path for path in SOURCES if path.relative_to(ROOT).parts[: len(place)] == place]
    found = {
        str(path.relative_to(ROOT)): words
        for path in paths
        if (words := coined(path.read_text(encoding="utf-8"), path.suffix == ".py"))
    }
    assert found == {}


@pytest.mark.parametrize(
    "text",
    [
        "what is born in a block",
        "add_births(taps)",
        "class WholeBirth:",
        "_earned = 0",
        "a sleeping slice",
        "wake_up",
        "Unpaid gradients",
        "a list of so many steps",
        "it is no cell",
        "the influence is led to the present",
        "masks are laid down",
    ],
)
def test_a_coined_word_is_found(text: str) -> None:
    assert coined(text) != []


@pytest.mark.parametrize(
    "text",
    [
        "time.sleep(1)",
        "learn, learned",
        "what is called",
        "the leading axis",
        "is no longer there",
        "a payload, a slowed run",
        "misleading",
        "reborn",
    ],
)
def test_an_innocent_word_is_not(text: str) -> None:
    assert coined(text) == []


def test_an_empty_name_is_found_in_code_alone() -> None:
    assert coined("wanted = f(x)", code=True) and coined("for mine in own:", code=True)
    assert coined("what is wanted here", code=True) == []
