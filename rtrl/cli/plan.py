"""``rtrl plan``: what each way to learn will cost on a cell, before anything is trained."""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import rtrl
from rtrl.cli.console import progress, show, writable
from rtrl.errors import ConfigError, RTRLError


def plan(
    steps: Annotated[int, typer.Option(help="T, how many steps the run has.", min=1)],
    cell: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE.MODULE:NAME",
            help="A function that makes a cell, or a pair of a cell and the inputs of some steps. The present folder "
            "is looked in, too.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="In place of --cell: rnn, gru, lstm, moe, mingru, elstm, lru or rtu.", show_default=False),
    ] = None,
    hidden: Annotated[int, typer.Option(help="Of --kind: units of its state; of moe, of one slot.", min=1)] = 64,
    inputs: Annotated[int, typer.Option(help="Of --kind: the width of x, and of y.", min=1)] = 64,
    slots: Annotated[int, typer.Option(help="Of --kind moe: slots of the state.", min=1)] = 8,
    experts: Annotated[int, typer.Option(help="Of --kind moe: how many there are.", min=1)] = 16,
    topk: Annotated[int, typer.Option(help="Of --kind moe: experts a step uses.", min=1)] = 2,
    batch_size: Annotated[
        int | None,
        typer.Option(help="B; by default that of the inputs, or 1.", min=1, show_default=False),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="The budget, for what is needed at once: 4GiB, 512MB, or a number of bytes. By default none.",
            show_default=False,
        ),
    ] = None,
    block: Annotated[
        list[int] | None,
        typer.Option(
            help="Steps a block to try; may be repeated. By default powers of two, and H.", show_default=False
        ),
    ] = None,
    window: Annotated[
        list[int] | None,
        typer.Option(help="Blocks to remember; may be repeated. By default 16 and 64.", show_default=False),
    ] = None,
    horizon: Annotated[
        list[int] | None,
        typer.Option(help="Of truncated BPTT; may be repeated. By default 16, 64 and 256.", show_default=False),
    ] = None,
    rate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=MACS_PER_S",
            help="A device of your own and its multiply-adds a second, 'cluster=2e13'; may be repeated.",
            show_default=False,
        ),
    ] = None,
    measure: Annotated[bool, typer.Option(help="Time a matrix product on the devices that are here.")] = True,
    json_path: Annotated[
        str | None,
        typer.Option(
            "--json", metavar="PATH", help="Write the plan there; '-' for standard output, the table then to stderr."
        ),
    ] = None,
) -> None:
    """Predict multiply-adds, bytes and the least time of full RTRL, BPTT, truncated BPTT and BlockRTRL for a cell.

    Exit code 0: something exact fits the budget; 1: nothing does; 2: the command cannot be carried out.
    """
    from rtrl._utils import formatting
    from rtrl.costs import measured_rates, nominal_rates
    from rtrl.training import load_cell

    try:
        if (cell is None) == (kind is None):
            raise ConfigError(
                "give --cell, a function that makes a cell, or --kind: rnn, gru, lstm, moe, mingru, elstm, lru or rtu"
            )
        if cell is not None:
            made, xs = load_cell(cell)
        else:
            made, xs = _usual(str(kind), inputs, hidden, slots, experts, topk), None
        path = None if json_path in (None, "-") else writable(Path(str(json_path)))
        with progress() as bar:
            bar.add_task("planning", total=None)
            dtype = next((p.dtype for p in made.parameters()), torch.float32)
            own = dict(_rate(text) for text in rate or [])
            devices = {
                **own,
                **(measured_rates(dtype) if measure else {}),
                **nominal_rates(str(dtype).removeprefix("torch.")),
            }
            found = rtrl.plan(
                made,
                steps=steps,
                batch_size=batch_size,
                memory_bytes=None if memory is None else formatting.parse_bytes(memory),
                xs=xs,
                blocks=block or None,
                windows=window or None,
                horizons=horizon or None,
                devices=devices,
            )
    except RTRLError as error:
        raise typer.BadParameter(str(error)) from error

    stderr = json_path == "-"
    show(found.render(), stderr=stderr)
    text = json.dumps(found.to_dict(), indent=2, allow_nan=False)
    if path is not None:
        path.write_text(text + "\n", encoding="utf-8")
    elif stderr:
        typer.echo(text)
    raise typer.Exit(0 if found.best is not None else 1)


def _usual(kind: str, width: int, hidden: int, slots: int, experts: int, topk: int) -> nn.Module:
    """A cell of a usual kind, as wide in y as in x."""
    from rtrl.training import CELLS, make_cell

    if kind not in CELLS:
        raise ConfigError(f"there is no kind {kind!r}; there are: {', '.join(CELLS)}")
    if kind != "moe":
        return make_cell(kind, width, width, hidden=hidden)
    few = min(2, slots)
    sizes: dict[str, Any] = {"n_slots": slots, "n_experts": experts, "topk": topk, "n_heads": 1 if hidden % 2 else 2}
    return make_cell(kind, width, width, d_model=hidden, read_slots=few, write_slots=few, **sizes)


def _rate(text: str) -> tuple[str, float]:
    """A device and its multiply-adds a second."""
    name, _, number = text.rpartition("=")
    try:
        if name.strip():
            return name.strip(), float(number)
    except ValueError:
        pass
    raise ConfigError(f"--rate takes NAME=MACS_PER_S, such as cluster=2e13, got {text!r}")
