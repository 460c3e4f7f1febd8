"""What is said of one claim: its card, the same on the page and in Markdown."""

import re
from datetime import datetime

from rtrl._utils.formatting import duration
from rtrl.report import prose
from rtrl.report.model import Cell, ClaimResult, Record, Table

_LEFT_OPEN = re.compile(r"^\*\*What it leaves open\.?\*\*\s*", re.MULTILINE)

FEW = 5  # faults that are named, though they change nothing

Entry = tuple[str, list[prose.Piece]]
"""The name of an entry, and its text in pieces."""


def card(claim: ClaimResult) -> list[Entry]:
    """What was claimed, what was measured and asked, on what, whether that could fail, and what it does not show."""
    verdict = claim.verdict + (f": {claim.condition}" if claim.condition else "")
    entries = [
        ("claimed", _plain(claim.claimed)),
        ("measured", _plain(claim.result)),
        ("threshold", _plain(claim.threshold)),
        ("verdict", _plain(verdict)),
        ("model and seeds", _plain(claim.model)),
        ("could this fail?", _plain(could_fail(claim))),
        ("what it does not show", left_open(claim)),
        ("took", _plain("" if claim.duration_s is None else duration(claim.duration_s))),
        ("kept", _plain(kept(claim))),
    ]
    return [(name, pieces) for name, pieces in entries if pieces]


def could_fail(claim: ClaimResult) -> str:
    """Which faults were planted in the code to see whether the verdict changes, and which of them changed it."""
    deaf = [name for name in claim.tried if name not in claim.noticed]
    others = _listed(deaf) if len(deaf) <= FEW else f"the other {len(deaf)}"
    unchanged = f"; not with {others}" if deaf else ""
    if claim.noticed:
        faults = f"{len(claim.noticed)} of {len(claim.tried)} faults planted in the code"
        return f"Yes: the verdict changes with {faults}: {_listed(claim.noticed)}{unchanged}."
    if claim.no_break:
        return f"No fault in the code can change it: {claim.no_break.rstrip('.')}."
    if claim.tried:
        planted = _listed(deaf) if len(deaf) <= FEW else f"each of {len(deaf)} faults"
        return f"Not seen to fail: the verdict is the same with {planted} planted in the code."
    return "Not tried: no fault was planted in the code." if claim.question and claim.result else ""


def faults(record: Record) -> Table:
    """One row per fault that was planted while claims were measured: the claims whose verdict it changes."""
    names = list(dict.fromkeys(name for claim in record.claims for name in claim.tried))
    rows: list[list[Cell]] = []
    for name in names:
        tried = [claim for claim in record.claims if name in claim.tried]
        noticed = [claim.id for claim in tried if name in claim.noticed]
        rows.append([name, f"{len(noticed)} of {len(tried)}", _listed(noticed)])
    return Table("Which planted faults change which verdicts", ["fault", "claims", "whose verdict changes"], rows)


def kept(claim: ClaimResult) -> str:
    """That a result was kept from an earlier run, and from when it is."""
    when = f" of {datetime.fromisoformat(claim.measured):%Y-%m-%d %H:%M}" if claim.measured else ""
    return f"from an earlier run{when}: not measured in this one" if claim.kept else ""


def left_open(claim: ClaimResult) -> list[prose.Piece]:
    """What the explanation says that the measurement leaves open, as one paragraph."""
    _, text = _split(claim.explanation)
    return prose.pieces(" ".join(text.split()))


def explanation(claim: ClaimResult) -> list[prose.Block]:
    """How the claim is measured: the explanation without what it leaves open, which has an entry of its own."""
    text, _ = _split(claim.explanation)
    return prose.blocks(text)


def _split(text: str) -> tuple[str, str]:
    """The explanation without the part on what it leaves open, and that part."""
    text = prose.dedent(text)
    found = _LEFT_OPEN.search(text)
    if found is None:
        return text, ""
    rest = re.search(r"\n\s*\n(?=\*\*)", text[found.end() :])
    end = len(text) if rest is None else found.end() + rest.start()
    return text[: found.start()] + text[end:], text[found.end() : end]


def _plain(text: str) -> list[prose.Piece]:
    words = " ".join(text.split())
    return [prose.Piece(words, "text")] if words else []


def _listed(names: list[str]) -> str:
    return ", ".join(names)
