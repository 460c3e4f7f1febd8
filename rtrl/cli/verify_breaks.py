"""``rtrl verify --break`` and ``--matrix``: claims measured alone, and with faults planted on purpose."""

import time
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from rtrl.cli.console import progress, show
from rtrl.cli.verify_run import Run, one_line

if TYPE_CHECKING:
    from rtrl.report import ClaimResult
    from rtrl.verification.claim import Claim
    from rtrl.verification.matrix import Attempt


def list_breaks() -> None:
    """Print every break with what is wrong while it is planted."""
    from rtrl.verification.breaks import BREAKS

    listing = Table("--break", "what is wrong then")
    for name, found in BREAKS.items():
        listing.add_row(name, found.fault)
    show(listing)


def try_breaks(run: Run, chosen: list[str], whole: bool) -> None:
    """Measure the claims of a run alone, and with breaks; print what each break changes.

    Args:
        run: the claims.
        chosen: names of breaks.
        whole: whether all breaks are planted, one after the other.

    Raises:
        ConfigError: a break is unknown, or the results cannot be resumed.
        typer.Exit: always, with the exit code.
    """
    from rtrl.verification import breaks, matrix, record, runner

    names = list(breaks.BREAKS) if whole else [breaks.find(name).name for name in dict.fromkeys(chosen)]
    run.read_kept()
    width = max(len(claim.id) for claim in run.chosen)
    began, wrong = time.perf_counter(), []
    with progress() as bar:
        task = bar.add_task("reading", total=len(run.chosen) * len(names))
        for at, claim in enumerate(run.chosen):

            def report(piece: str, done: int, at: int = at) -> None:
                bar.update(task, description=piece, completed=at * len(names))

            if claim.id not in run.found or run.found[claim.id].failures:
                (outcome,) = runner.measure([claim], run.settings, report)
                run.add(record.entry(outcome))
                run.print(run.found[claim.id], width)
            found = run.found[claim.id]
            for number, name in enumerate(matrix.missing(found, names)):
                bar.update(task, description=f"{claim.id} with {name}", completed=at * len(names) + number)
                new = matrix.attempt(claim, found, name, run.settings)
                found = matrix.added(found, new)
                run.add(found)
                if not whole:
                    run.say(f"{claim.id:{width}}  {name}: {_change(found, new)}")
            wrong += [f"{claim.id}: {line}" for line in _conclude(run, claim, found, whole, width)]
    final = run.whole()
    run.results.write(final)
    wrong += record.failures(final.claims)
    opening = f"FAIL: {len(wrong)} failures, first: {one_line(wrong[0])}; " if wrong else "PASS: "
    duration_s = time.perf_counter() - began
    run.say(f"{opening}{len(run.chosen)} claims, {len(names)} breaks ({duration_s:.0f} s)")
    raise typer.Exit(1 if wrong else 0)


def _change(found: "ClaimResult", new: "Attempt") -> str:
    if not new.noticed:
        return f"not noticed, still {found.verdict!r}"
    failure = f": {one_line(new.failure)}" if new.failure else ""
    return f"noticed, {found.verdict!r} → {new.verdict!r}{failure}"


def _conclude(run: Run, claim: "Claim[Any, Any]", found: "ClaimResult", whole: bool, width: int) -> list[str]:
    """Say which breaks a claim notices, and return what is wrong with that."""
    from rtrl.verification import matrix

    if whole:
        reason = f"  ({found.no_break})" if found.no_break else ""
        noticed = ", ".join(found.noticed) or "none"
        run.say(f"{claim.id:{width}}  {len(found.noticed)} of {len(found.tried)} breaks noticed: {noticed}{reason}")
    wrong = matrix.deaf(claim, found, whole=whole)
    for line in wrong:
        run.say(f"{'':{width}}  DEAF: {line}")
    return wrong
