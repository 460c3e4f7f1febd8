"""Colours of series and ink, for a light page, a dark page, and a file that may lie on either.

Every colour stands out by at least 3 to 1 against what it may lie on; to any two of one palette, eyes that see no red,
no green or no blue still see a difference. Marks and dashes say the same without colour.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Style:
    """``ink`` is for axes and text, ``titled`` says whether the picture carries its title."""

    ink: str
    colours: tuple[str, ...]
    titled: bool = True


LIGHT = Style("#4a4f57", ("#0b78c8", "#b0401c", "#5a0f9c", "#849c00", "#003c20", "#b03a8c"), titled=False)
DARK = Style("#b4bac4", ("#7cb8f8", "#f4602c", "#a860f0", "#fcd818", "#60fc9c", "#d8789c"), titled=False)
NEUTRAL = Style("#7a7a7a", ("#7890c8", "#b03a1c", "#8430d8", "#a8900c", "#18a86c", "#90486c"))
PAPER = Style("#202020", LIGHT.colours)
"""Of a PDF, which lies on paper."""

MARKS = "os^Dv*P"  # one more than there are colours, so that 42 series differ in one or the other
