"""``rtrl report``: a page, pictures and tables from what ``rtrl verify --json`` wrote; curves from training logs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rtrl._utils.code_digest import installed_code
from rtrl.cli.console import progress
from rtrl.errors import ConfigError

if TYPE_CHECKING:
    from rtrl.report import Record


def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="What rtrl verify --json wrote; or logs of rtrl train, one or several: run.jsonl."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The HTML page to write.  [default: report.html, if nothing else is asked for]",
            show_default=False,
        ),
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write every picture into this folder.", show_default=False)
    ] = None,
    form: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="svg|pdf|png",
            help="Of the pictures; may be repeated.  [default: svg and pdf]",
            show_default=False,
        ),
    ] = None,
    update: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PAGE.md",
            help="Rewrite what stands between the markers <!-- rtrl:questions -->, <!-- rtrl:claims-table -->, "
            "<!-- rtrl:faults -->, <!-- rtrl:claims -->, <!-- rtrl:claim:ID --> or <!-- rtrl:run --> and their ends; "
            "may be repeated. With --pictures, claims show theirs.",
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Write nothing; exit code 1 if --update or --pictures would change a file."),
    ] = False,
) -> None:
    """Turn results into one self-contained HTML page, into pictures for a paper, and into tables of a README.

    Of logs of rtrl train the page shows curves with their spread, settings and last figures; runs that differ in the
    seed alone become one curve. The files are validated before anything is written. Exit code 0: done, or up to date;
    1: --check found something that is not up to date; 2: the command cannot be carried out.
    """
    from rtrl.report import is_training_log

    forms = tuple(form or ("svg", "pdf"))
    pages = update or []
    try:
        for path in (output, *pages):
            if path is not None and any(path.exists() and file.exists() and path.samefile(file) for file in files):
                raise ConfigError(f"{path} is among the files that are read; the page needs another name")
        if all(map(is_training_log, files)):
            if check or pages:
                raise ConfigError("--check and --update are for results of rtrl verify, not for logs of rtrl train")
            _show_logs(files, output, pictures, forms)
        elif len(files) > 1:
            raise ConfigError("give one results file of rtrl verify, or logs of rtrl train alone")
        else:
            _show_results(files[0], output, pictures, forms, pages, check)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


def _show_results(
    results: Path, output: Path | None, pictures: Path | None, forms: tuple[str, ...], pages: list[Path], check: bool
) -> None:
    from rtrl.report import draw_pictures, load_record, render_page, update_markdown

    record = load_record(results)
    if check:
        if output is not None or not (pages or pictures):
            raise ConfigError("--check goes with --update and --pictures, and not with --output")
        raise typer.Exit(1 if _outdated(record, pages, pictures, forms) else 0)
    if output is None and pictures is None and not pages:
        output = Path("report.html")
    # All is made before any of it is written: what cannot be made leaves no half behind.
    with progress() as bar:
        work = bar.add_task("tables", total=None)
        texts = {path: new for path, (_, new) in update_markdown(record, pages, pictures).items()}
        if output is not None:
            bar.update(work, description=f"drawing {output}")
            texts[output] = render_page(record)
        bar.update(work, description="drawing pictures")
        drawn = [] if pictures is None else draw_pictures(record, pictures, forms)
    for path, text in texts.items():
        _write(path, text)
    if record.code and record.code != (here := installed_code()):
        typer.echo(f"{results} was measured with other code ({record.code}) than is installed here ({here})", err=True)
    if pictures is not None:
        typer.echo(f"{pictures}: {len(drawn)} pictures")
    for path in texts:
        typer.echo(f"{path}: {len(record.claims)} claims")


def _show_logs(files: list[Path], output: Path | None, pictures: Path | None, forms: tuple[str, ...]) -> None:
    from rtrl.report import draw_pictures, load_training_log, render_training_page, training_plots

    with progress() as bar:
        work = bar.add_task("reading", total=None)
        logs = [load_training_log(path) for path in files]
        if empty := [str(path) for path, log in zip(files, logs, strict=True) if not len(log)]:
            raise ConfigError(f"{empty[0]} has no row yet: rtrl train writes one every --log-every steps")
        if output is None and pictures is None:
            output = Path("report.html")
        bar.update(work, description="drawing")
        if output is not None:
            _write(output, render_training_page(logs))
        plots = {f"training-{i}": plot for i, plot in enumerate(training_plots(logs), 1)}
        drawn = [] if pictures is None else draw_pictures(plots, pictures, forms)
    if pictures is not None:
        typer.echo(f"{pictures}: {len(drawn)} pictures")
    if output is not None:
        typer.echo(f"{output}: {len(logs)} training logs")


def _outdated(record: "Record", pages: list[Path], folder: Path | None, forms: tuple[str, ...]) -> bool:
    """Names every file that is not what the record makes of it, and says whether there is one."""
    from rtrl.report import outdated_pictures, update_markdown

    found = [path for path, (old, new) in update_markdown(record, pages, folder).items() if old != new]
    found += [] if folder is None else outdated_pictures(record, folder, forms)
    for path in found:
        typer.echo(f"{path} is not what the results say; update it by the same command without --check", err=True)
    return bool(found)


def _write(path: Path, text: str) -> None:
    try:
        path.write_bytes(text.encode())
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error
