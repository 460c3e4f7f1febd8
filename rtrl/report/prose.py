"""The few signs that docstrings use: paragraphs, indented equations, lists, code in backticks, **strong** and
*stressed* words."""

import re
import textwrap
from typing import Literal, NamedTuple

_MARKED = re.compile(
    r"(`+)(?P<code>.+?)\1|\*\*(?P<strong>\S(?:.*?\S)?)\*\*|(?<![\w*])\*(?P<stress>[^\s*](?:[^*]*[^\s*])?)\*(?![\w*])",
    re.DOTALL,
)


class Piece(NamedTuple):
    """A piece of a line, and what it is."""

    text: str
    kind: Literal["text", "code", "strong", "stress"]


class Block(NamedTuple):
    """A paragraph or an item of a list, in pieces; or lines that are shown as they stand, in one."""

    kind: Literal["paragraph", "item", "lines"]
    pieces: list[Piece]


def blocks(text: str) -> list[Block]:
    """What a docstring is made of, in order."""
    found: list[Block] = []
    for part in re.split(r"\n[ \t]*\n", dedent(text)):
        if not part.strip():
            continue
        if all(line.startswith("    ") for line in part.splitlines() if line.strip()):
            found.append(Block("lines", [Piece(textwrap.dedent(part).strip("\n"), "code")]))
        else:
            for item in re.split(r"^(?=[ ]{0,3}[-*] )", part, flags=re.MULTILINE):
                listed = re.match(r"[ ]{0,3}[-*] ", item)
                if item.strip():
                    words = item[listed.end() :] if listed else item
                    found.append(Block("item" if listed else "paragraph", pieces(" ".join(words.split()))))
    return found


def pieces(text: str) -> list[Piece]:
    """Text, code, strong and stressed words in turns; a role before code, as in :func:`name`, is dropped."""
    found: list[Piece] = []
    at = 0
    for match in _MARKED.finditer(text):
        code = match["code"]
        before = text[at : match.start()]
        found.append(Piece(before if code is None else re.sub(r":\w+:$", "", before), "text"))
        if code is not None:
            found.append(Piece(code.strip(), "code"))
        else:
            found.append(Piece(match["strong"], "strong") if match["strong"] else Piece(match["stress"], "stress"))
        at = match.end()
    found.append(Piece(text[at:], "text"))
    return [piece for piece in found if piece.text]


def dedent(text: str) -> str:
    """A docstring without its margin, which its first line lacks."""
    first, _, rest = text.strip("\n").expandtabs().partition("\n")
    return f"{first.lstrip()}\n{textwrap.dedent(rest)}".strip()
