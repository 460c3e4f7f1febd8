"""The few signs that docstrings use: paragraphs, indented equations, lists, and code between backticks."""

import re
import textwrap
from typing import Literal, NamedTuple

_CODE = re.compile(r"(`+)(.+?)\1", re.DOTALL)


class Piece(NamedTuple):
    """A piece of a line: text, or code."""

    text: str
    code: bool


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
            found.append(Block("lines", [Piece(textwrap.dedent(part).strip("\n"), code=True)]))
        else:
            for item in re.split(r"^(?=[ ]{0,3}[-*] )", part, flags=re.MULTILINE):
                listed = re.match(r"[ ]{0,3}[-*] ", item)
                if item.strip():
                    words = item[listed.end() :] if listed else item
                    found.append(Block("item" if listed else "paragraph", pieces(" ".join(words.split()))))
    return found


def pieces(text: str) -> list[Piece]:
    """Text and code in turns; a role before code, as in :func:`name`, is dropped."""
    found, at = [], 0
    for match in _CODE.finditer(text):
        before = re.sub(r":\w+:$", "", text[at : match.start()])
        found += [Piece(before, code=False)] * bool(before) + [Piece(match[2].strip(), code=True)]
        at = match.end()
    return found + [Piece(text[at:], code=False)] * bool(text[at:])


def dedent(text: str) -> str:
    """A docstring without its margin, which its first line lacks."""
    first, _, rest = text.strip("\n").expandtabs().partition("\n")
    return f"{first.lstrip()}\n{textwrap.dedent(rest)}".strip()
