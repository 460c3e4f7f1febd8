"""An extension for griffe: doctests that stand in the running text of a docstring are shown as code on the site."""

import re
from typing import Any

import griffe

_SECTION = re.compile(r"^ *Examples?:$", re.MULTILINE)
_DOCTEST = re.compile(r"(?:^|\n\n)(?P<indent> *)>>> .*?(?=\n\s*\n|\Z)", re.DOTALL)


class DoctestFences(griffe.Extension):
    """Puts a fence around each doctest outside of a section ``Example``, where griffe does so by itself."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None and not _SECTION.search(obj.docstring.value):
            obj.docstring.value = fence(obj.docstring.value)


def fence(text: str) -> str:
    """The text with every doctest, from its first prompt to the next empty line, inside a fence."""
    return _DOCTEST.sub(lambda match: f"\n\n```pycon\n{match[0].strip()}\n```", text)
