"""One run of ``rtrl verify``: what is kept of an earlier one, a line per claim, and the results file."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from rtrl.cli.console import make_console, progress
from rtrl.cli.results_file import ResultsFile, command

if TYPE_CHECKING:
    from rtrl.report import ClaimResult, Record
    from rtrl.verification.runner import Outcome

STYLES = {
    "holds": "green",
    "holds when": "yellow",
    "does not hold": "red",
    "not measured at the claimed size": "magenta",
    "not measured": "magenta",
}
_SHORT = {"holds when": "holds when …", "not measured at the claimed size": "smaller size"}


class Run:
    """The claims that were chosen, how they are measured, and what is known of them so far.

    Args:
        only: the ids of the claims; all of them if it is empty.
        full: whether the long form is measured.
        small: whether the small form is measured.
        seed: the seed of everything that is drawn.
        device: the torch device.
        json_path: where the results go.
        resume: whether results of the same code that are there already are kept.
        matrix_from: a file of results with breaks, which are added to the results.

    Attributes:
        results: where the results go.
        settings: how the claims are measured.
        chosen: the claims.
        found: id → what it came to; at first what was kept.
        console: where lines are printed.

    Raises:
        ConfigError: a claim is unknown, the device cannot be used, or ``matrix_from`` is of other code.
    """

    def __init__(
        self,
        only: list[str],
        full: bool,
        small: bool,
        seed: int,
        device: str,
        json_path: str | None,
        resume: bool,
        matrix_from: Path | None = None,
    ) -> None:
        from rtrl.verification import matrix, registry  # the oracles are needed here and nowhere else
        from rtrl.verification.claim import Settings
        from rtrl.verification.harness.problems import usable_device

        self.chosen = registry.select(only)
        usable_device(device)
        self.settings = Settings(full, seed, device, small=small)
        self.results, self._resume = ResultsFile(json_path), resume
        self._order = [claim.id for claim in registry.claims()]
        self.found: dict[str, ClaimResult] = {}
        self.console = make_console(self.results.to_stdout)
        self._attempts = {} if matrix_from is None else matrix.attempts(matrix_from)

    def read_kept(self) -> None:
        """Read what an earlier run measured, where the command says so.

        Raises:
            ConfigError: the file is not a record, or was measured by other code or with other settings.
        """
        from rtrl.verification import record

        if self._resume and self.results.path is not None:
            kept = record.kept(self.results.path, self.settings)
            self.found = {entry.id: entry for entry in kept if entry.id in self._order}

    def whole(self) -> "Record":
        """Return all results so far."""
        from rtrl.verification import record

        entries = sorted(self.found.values(), key=lambda entry: self._order.index(entry.id))
        entries = [replace(entry, **self._attempts.get(entry.id, {})) for entry in entries]
        return record.record(entries, self.settings, command())

    def add(self, found: "ClaimResult") -> None:
        """Take a result, and write all of them: a run that is interrupted keeps every claim that is measured."""
        self.found[found.id] = found
        if self.results.path is not None:
            self.results.write(self.whole())

    def measure(self) -> None:
        """Measure the claims; print a line and write the results as each is done.

        Raises:
            ConfigError: see ``read_kept``.
            typer.Exit: always, with the exit code.
        """
        from rtrl.learners import audits_in_this_process
        from rtrl.verification import record, runner

        self.read_kept()
        chosen = [claim for claim in self.chosen if claim.id not in self.found or self.found[claim.id].failures]
        width = max(map(len, [*self.found, *(claim.id for claim in chosen)]))
        repeated = {claim.id for claim in chosen}
        for entry in (entry for entry in self.found.values() if entry.id not in repeated):
            self.print(entry, width)

        def each(outcome: "Outcome") -> None:
            found = record.entry(outcome)
            self.add(found)
            self.print(found, width)

        began = time.perf_counter()
        with progress() as bar:
            task = bar.add_task("reading", total=len(chosen))
            runner.measure(
                chosen, self.settings, lambda piece, done: bar.update(task, description=piece, completed=done), each
            )
        duration_s = time.perf_counter() - began
        final = self.whole()
        self.results.write(final)
        counts = {name: sum(entry.verdict == name for entry in final.claims) for name in STYLES}
        counted = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
        kept = sum(entry.kept for entry in final.claims)
        counted += f"; {kept} kept from an earlier run of the same code" * bool(kept)
        failed = record.failures(final.claims)
        self.say(f"audits: {audits_in_this_process()}")
        opening = f"FAIL: {len(failed)} failures, first: {failed[0]}; " if failed else "PASS: "
        self.say(f"{opening}{len(final.claims)} claims: {counted} ({duration_s:.0f} s)")
        raise typer.Exit(1 if failed else 0)

    def say(self, text: str) -> None:
        """Print a line beside the results."""
        typer.echo(text, err=self.results.to_stdout)

    def print(self, found: "ClaimResult", width: int) -> None:
        """Print one line for a claim, and more for its condition and its failures."""
        verdict, style = _SHORT.get(found.verdict, found.verdict), STYLES[found.verdict]
        self.console.print(
            f"[bold]{found.id:{width}}[/bold]  [{style}]{verdict:13}[/{style}]", end="  ", highlight=False
        )
        threshold = f"  (required: {one_line(found.threshold)})" if found.threshold else ""
        kept = f", kept, measured {one_line(found.measured)}" if found.kept else ""
        text = f"{one_line(found.result)}{threshold}  {found.duration_s or 0.0:.0f} s{kept}"
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        if found.condition:
            condition = f"{'':{width}}  {one_line(found.condition)}"
            self.console.print(condition, highlight=False, markup=False, soft_wrap=True)
        for line in found.failures:
            failure = f"{'':{width}}  FAIL: {one_line(line)}"
            self.console.print(failure, highlight=False, markup=False, soft_wrap=True, style="bold red")
        self.console.file.flush()  # a file or a pipe shows a claim as soon as it is measured


def one_line(text: str) -> str:
    """Return a text without line breaks: what a results file says must not look like another claim's line."""
    return " ".join(text.split())
