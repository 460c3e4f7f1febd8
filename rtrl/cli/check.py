"""``rtrl check``: check a cell or a learner of your own."""

import json
from pathlib import Path
from typing import Annotated

import typer

from rtrl.cli.console import progress, show, writable
from rtrl.errors import ConfigError


def check(
    target: Annotated[
        str,
        typer.Argument(
            metavar="PACKAGE.MODULE:NAME",
            help="A function that makes a cell, make_learner(cell, batch_size), gradients(cell, xs, loss_fn), or a "
            "CellSpec, a LearnerSpec or a list of them. The current folder is searched, too.",
        ),
    ],
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="CHECK", help="Run only this check; may be repeated.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all random numbers.", min=0, max=2**32 - 1)] = 0,
    json_path: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="PATH",
            help="Write all results there; '-' for standard output, the table to stderr.",
        ),
    ] = None,
) -> None:
    """Check a cell or an online learner of your own: its contract, or its gradients and other promises.

    Exit code 0: all that could be judged passed; 1: something failed, or nothing could be judged; 2: the command cannot
    be carried out.
    """
    from rtrl.testing import bound_checks, report_table  # only this command and verify need the oracles
    from rtrl.testing.targets import load, specs_of

    try:
        checks = bound_checks(specs_of(load(target), target), seed)
        unknown = sorted(set(only or ()) - {check.name for check in checks})
        if unknown:
            known = ", ".join(dict.fromkeys(check.name for check in checks))
            raise ConfigError(f"there is no check {unknown[0]!r}; there are: {known}")
        path = None if json_path in (None, "-") else writable(Path(str(json_path)))
        chosen = [check for check in checks if not only or check.name in only]
        results = []
        with progress() as bar:
            task = bar.add_task("checking", total=len(chosen))
            for bound in chosen:
                bar.update(task, description=f"{bound.spec.name}: {bound.name}")
                results.append(report_table.CheckResult(bound, bound.report()))
                bar.advance(task)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error

    stderr = json_path == "-"
    show(report_table.table(results), stderr=stderr)
    text = json.dumps([result.record() for result in results], indent=2, allow_nan=False)
    if path is not None:
        path.write_text(text + "\n", encoding="utf-8")
    elif stderr:
        typer.echo(text)
    failed = [result for result in results if result.outcome == "failed"]
    judged = [result for result in results if result.outcome != "not judged"]
    for line in filter(None, (report_table.failures(results), report_table.summary(results))):
        typer.echo(line, err=stderr)
    if failed:
        again = " ".join(f"--only '{name}'" for name in dict.fromkeys(result.check for result in failed))
        typer.echo(f"To see it again: rtrl check {target} {again} --seed {seed}", err=stderr)
    if not judged:
        typer.echo("Nothing was judged.", err=stderr)
    raise typer.Exit(1 if failed or not judged else 0)
