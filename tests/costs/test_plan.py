"""``rtrl.plan``, ``Plan`` and ``choose_block``: what they take, refuse, choose, show and leave alone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cost_cases import DENSE, SPARSE, inputs, mixture, torch_cell
from helpers.toy_cells import PlainRNN, seeded
from rich.console import Console
from torch import Tensor, nn
from typer.testing import CliRunner

import rtrl
from rtrl._utils import formatting
from rtrl.cli.app import app
from rtrl.costs import auto_block, block_rtrl, choose_block, measured_rates, nominal_rates, others
from rtrl.errors import CellError, ConfigError, NonFiniteError, ShapeError, UnknownOperationError
from rtrl.training import CELLS


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """How well they predict is tested elsewhere."""
    for name, value in (("MOST_STEPS", 30), ("MOST_LENGTH", 8), ("MOST_ROUTING_BLOCKS", 3)):
        monkeypatch.setattr(block_rtrl, name, value)
    for name in ("SHORT", "SHORT_HORIZONS"):
        monkeypatch.setattr(others, name, (1, 2, 4))


def gru() -> nn.Module:
    return torch_cell(nn.GRUCell, 8)


# ------------------------------------------------------------------ what is chosen


def test_the_best_is_the_cheapest_exact_one_that_fits() -> None:
    sizes: dict[str, Any] = {"steps": 2_000, "blocks": [1, 4, 16], "horizons": [16]}
    free = rtrl.plan(gru(), **sizes)
    assert free.best is not None and free.best.method == "BPTT"
    middle = sorted(row.peak_bytes for row in free.rows)[3]
    assert rtrl.plan(gru(), **sizes, memory_bytes=middle) == replace(free, memory_bytes=middle)
    for budget in sorted({row.peak_bytes for row in free.rows}):
        found = replace(free, memory_bytes=budget)
        fitting = [row for row in found.rows if row.exact and row.peak_bytes <= budget]
        best = found.best
        assert (best is None) == (not fitting)
        if best is not None:
            assert best in fitting
            assert best.macs == min(row.macs for row in fitting)
    least = min(row.peak_bytes for row in free.rows if row.exact)
    nothing = replace(free, memory_bytes=least - 1)
    assert nothing.best is None
    assert nothing.best_block is not None  # there is still a T* to be told
    assert "nothing exact fits" in str(nothing)


def test_truncation_is_never_the_best_of_a_longer_run() -> None:
    found = rtrl.plan(gru(), steps=2_000, horizons=[4, 4_000], memory_bytes=10_000)
    truncated = [row for row in found.rows if row.method == "TBPTT"]
    assert {row.exact for row in truncated if row.horizon == 4} == {False}
    assert {row.exact for row in truncated if row.horizon == 4_000} == {True}
    assert found.best is None or found.best.exact


def test_every_size_that_is_asked_for_has_a_row() -> None:
    cell = SPARSE["rows and slices in x"]()
    found = rtrl.plan(cell, xs=inputs(cell, 6, 1), steps=6, blocks=[2, 5, 5], windows=[3, 9], horizons=[7])
    assert [row.name for row in found.rows if row.method != "BPTT"] == [
        "DenseRTRL",
        "TBPTT(horizon=7)",
        "TBPTT(horizon=7, sliding=False)",
        "BlockRTRL(block=2, window=3)",
        "BlockRTRL(block=2, window=9)",
        "BlockRTRL(block=5, window=3)",
        "BlockRTRL(block=5, window=9)",
    ]


def test_a_cell_whose_slices_cannot_sleep_needs_no_window() -> None:
    rows = [row for row in rtrl.plan(gru(), steps=50).rows if row.method == "BlockRTRL"]
    assert [row.block for row in rows] == [1, 2, 4, 8, 16]
    assert all(row.window is None for row in rows)


# ------------------------------------------------------------------ what it is given


@pytest.mark.parametrize("kind", ["GRU", "embedding", "layers"])
def test_without_an_example_the_width_is_found_in_the_cell(kind: str) -> None:
    cell = DENSE[kind]()
    sizes: dict[str, Any] = {"steps": 9, "blocks": [2], "horizons": []}
    guessed = rtrl.plan(cell, batch_size=3, **sizes)
    given = rtrl.plan(cell, inputs(cell, 1, 3)[0], **sizes)
    assert guessed != given and guessed == replace(given, notes=guessed.notes)


def test_the_batch_of_the_example_is_repeated_or_cut() -> None:
    cell = gru()
    x = inputs(cell, 1, 3)[0]
    sizes: dict[str, Any] = {"steps": 2, "blocks": [2], "horizons": []}
    assert rtrl.plan(cell, x, **sizes).batch_size == 3
    for size in (2, 7):
        assert rtrl.plan(cell, x, **sizes, batch_size=size).rows == rtrl.plan(cell, **sizes, batch_size=size).rows


class Silent(nn.Module):
    """Says nothing about the width of x, and has no first state."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(x @ self.weight + h)
        return h, h


def test_a_cell_that_does_not_say_what_it_takes_is_planned_with_an_example() -> None:
    state = torch.zeros(2, 4, dtype=torch.float64)
    with pytest.raises(ConfigError, match="init_state"):
        rtrl.plan(Silent(), steps=5)
    with pytest.raises(ConfigError, match="give an example input of one step, x="):
        rtrl.plan(Silent(), steps=5, batch_size=2, state=state)
    assert rtrl.plan(Silent(), torch.ones(2, 3, dtype=torch.float64), steps=5, state=state).batch_size == 2


BAD: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "no steps": (None, {"steps": 0}, ConfigError, "steps"),
    "steps of another kind": (None, {"steps": 2.5}, ConfigError, "steps"),
    "no batch": (None, {"batch_size": 0}, ConfigError, "batch_size"),
    "a budget of nothing": (None, {"memory_bytes": 0}, ConfigError, "memory_bytes"),
    "a budget in words": (None, {"memory_bytes": "4GiB"}, ConfigError, "memory_bytes"),
    "an empty block": (None, {"blocks": [4, 0]}, ConfigError, "block"),
    "an empty window": (None, {"windows": [0]}, ConfigError, "window"),
    "no horizon": (None, {"horizons": [-1]}, ConfigError, "horizon"),
    "both kinds of x": (torch.ones(1, 3).double(), {"xs": [torch.ones(1, 3).double()]}, ConfigError, "not both"),
    "no steps in xs": (None, {"xs": []}, ConfigError, "xs is empty"),
    "no tensor": ({}, {}, ShapeError, "no tensor"),
    "float32": (torch.ones(1, 3), {}, ShapeError, "float32"),
    "another width": (torch.ones(1, 4).double(), {}, ShapeError, "does not take"),
    "NaN": (torch.full((1, 3), float("nan")).double(), {}, NonFiniteError, "NaN"),
    "a standstill": (None, {"devices": {"mine": 0.0}}, ConfigError, "mine"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_plan_is_refused(case: str) -> None:
    x, options, error, match = BAD[case]
    with pytest.raises(error, match=match):
        rtrl.plan(gru(), x, **{"steps": 5, **options})


def test_no_cell_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"torch.nn.Module"):
        rtrl.plan("gru", steps=5)  # type: ignore[arg-type]
    frozen = gru().requires_grad_(False)
    with pytest.raises(ConfigError, match="requires a gradient"):
        rtrl.plan(frozen, steps=5)


class Convolving(nn.Module):
    """An operation that has no count."""

    d_in = 5

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1, 3, dtype=torch.float64))

    def init_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 3, dtype=torch.float64)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(nn.functional.conv1d(x.unsqueeze(1), self.weight).squeeze(1) + h)
        return h, h


def test_an_operation_without_a_count_is_named_and_can_be_given_one() -> None:
    with pytest.raises(UnknownOperationError, match="rules="):
        rtrl.plan(Convolving(), steps=5)
    rules = dict.fromkeys(("aten.convolution", "aten.convolution_backward"), lambda args, kwargs, out: 9)
    assert rtrl.plan(Convolving(), steps=5, rules=rules, blocks=[1]).rows[0].macs > 0


# ------------------------------------------------------------------ what is left alone


class Noisy(PlainRNN):
    """Draws random numbers, where that does not matter."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        torch.rand(1)
        return super().forward(x, h)


@pytest.mark.parametrize("make", [gru, mixture, lambda: seeded(PlainRNN(3, 4), 0)])
def test_the_cell_and_the_random_numbers_stay_as_they_were(make: Any) -> None:
    cell = make()
    first = next(cell.parameters())
    first.grad = torch.ones_like(first)
    before = {name: (value.clone(), value._version) for name, value in cell.state_dict(keep_vars=True).items()}
    grads = {name: p.grad if p.grad is None else p.grad.clone() for name, p in cell.named_parameters()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    rtrl.plan(cell, steps=3, batch_size=2, blocks=[2], windows=[2], horizons=[2])
    choose_block(cell, 2)
    assert torch.equal(torch.rand(3), expected)
    for name, value in cell.state_dict(keep_vars=True).items():
        assert torch.equal(value, before[name][0]) and value._version == before[name][1], name
    for name, parameter in cell.named_parameters():
        was = grads[name]
        assert (parameter.grad is None) == (was is None)
        assert was is None or torch.equal(parameter.grad, was)


def test_an_impure_cell_is_refused_as_by_the_learner() -> None:
    cell, x = seeded(Noisy(3, 4), 0), torch.ones(2, 3, dtype=torch.float64)
    state = torch.get_rng_state()
    with pytest.raises(CellError, match="random"):
        rtrl.plan(cell, x, steps=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_can_be_asked_for_anywhere() -> None:
    cell = gru()
    sizes: dict[str, Any] = {"steps": 5, "blocks": [2], "horizons": [3]}
    here = rtrl.plan(cell, **sizes)
    with torch.no_grad():
        assert rtrl.plan(cell, **sizes) == here
    with torch.inference_mode():
        x = torch.zeros(1, 3, dtype=torch.float64)
        assert rtrl.plan(cell, x, **sizes).rows == here.rows


def test_plans_of_the_same_are_the_same() -> None:
    cell, sizes = mixture(topk=1), {"steps": 9, "blocks": [2], "windows": [2], "horizons": []}
    assert rtrl.plan(cell, **sizes) == rtrl.plan(cell, **sizes)


# ------------------------------------------------------------------ devices


def test_time_is_multiply_adds_over_the_rate() -> None:
    found = rtrl.plan(gru(), steps=50, devices={"slow": 1e6, "fast": 2e6})
    for row in found.rows:
        seconds = found.seconds_per_step(row)
        assert seconds == {"slow": row.macs_per_step / 1e6, "fast": row.macs_per_step / 2e6}
    assert "fast" in str(found)
    assert "at least" in str(found) and "lower bounds" in str(found)


def test_rates_of_devices() -> None:
    assert nominal_rates("float32")["NVIDIA H100 SXM"] == 33.5e12
    assert nominal_rates("float64")["NVIDIA H100 SXM"] == 17e12
    assert nominal_rates("bfloat16") == {}
    measured = measured_rates(seconds=0.001)
    assert any("CPU" in name for name in measured)
    assert all(1e6 < rate < 1e16 for rate in measured.values())


# ------------------------------------------------------------------ how it is shown


def test_a_table_for_people_and_a_record_for_programs() -> None:
    found = rtrl.plan(gru(), steps=3_000, memory_bytes=50_000)
    console = Console(width=150, color_system=None)
    with console.capture() as captured:
        console.print(found)
    assert captured.get().splitlines()[1:] == str(found).splitlines()[1:]
    text = str(found)
    assert found.best is not None
    for word in ("→", found.best.name, f"T* = {found.crossover_steps:,} steps", "too much", "48.8 KiB"):
        assert word in text, word
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["best"] == found.best.name
    assert record["crossover_steps"] == found.crossover_steps
    assert [row["name"] for row in record["rows"]] == [row.name for row in found.rows]
    for row, choice in zip(record["rows"], found.rows, strict=True):
        assert row["fits"] == found.fits(choice)
        assert row["held_bytes"] == sum(row["held"].values()) == choice.held_bytes


def test_units() -> None:
    assert [formatting.parse_bytes(text) for text in ("7", "1KiB", "2k", "3 MB", "1.5GiB", ".5kb")] == [
        7, 1024, 2048, 3_000_000, 3 * 2**29, 500,
    ]  # fmt: skip
    for text in ("", "much", "-4", "4 potatoes", "0", "ib", "4iB"):
        with pytest.raises(ConfigError):
            formatting.parse_bytes(text)
    assert [formatting.show_bytes(n) for n in (0, 1023, 1024, 1048575, 3 * 2**40)] == [
        "0 B", "1023 B", "1.00 KiB", "1.00 MiB", "3.00 TiB",
    ]  # fmt: skip
    assert [formatting.show_seconds(s) for s in (3e-9, 2e-6, 0.5, 90.0, 1e6)] == [
        "3.00 ns", "2.00 µs", "500 ms", "1.50 min", "11.6 d",
    ]  # fmt: skip


# ------------------------------------------------------------------ block="auto"


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
@pytest.mark.parametrize("hidden", [8, 48])
def test_a_dense_cell_gets_blocks_of_about_its_state(kind: type[nn.Module], hidden: int) -> None:
    cell = torch_cell(kind, hidden)
    full = cell.init_state(1)[0].numel()
    learner = rtrl.BlockRTRL(cell, 2, block="auto")
    assert type(learner.block) is int
    assert full / 4 <= learner.block <= 2 * full


def test_where_nothing_is_known_the_block_is_the_state() -> None:
    state = torch.zeros(3, 4, dtype=torch.float64)
    assert rtrl.BlockRTRL(Silent(), 3, block="auto", state=state).block == 4
    assert rtrl.BlockRTRL(mixture(), 3, block="auto").block == mixture().init_state(1).numel()


def test_blocks_stay_within_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_block, "ROOM_BYTES", 1)
    narrow = nn.RNNCell(1, 64)
    assert choose_block(rtrl.cells.from_torch(narrow), 4) < 64
    silent = Silent()
    few = choose_block(silent, 3, state=torch.zeros(3, 4, dtype=torch.float64))
    assert few < 4
    monkeypatch.setattr(auto_block, "ROOM_BYTES", 2**40)
    assert choose_block(rtrl.cells.from_torch(narrow), 4) >= 32


def test_auto_learns_and_is_loaded_again() -> None:
    cell, xs = gru(), inputs(gru(), 25, 2)
    first, second = (rtrl.BlockRTRL(cell, 2, block="auto") for _ in range(2))
    for x in xs[:13]:
        first.backward(first.step(x).square().sum())
    second.load_state_dict(first.state_dict())
    third = rtrl.BlockRTRL(cell, 2, block=first.block)
    third.load_state_dict(first.state_dict())
    grads = []
    for learner in (first, second, third):
        for x in xs[13:]:
            learner.backward(learner.step(x).square().sum())
        learner.sync()
        grads.append([p.grad.clone() for p in cell.parameters() if p.grad is not None])
        cell.zero_grad()
    assert len(grads[0]) == len(list(cell.parameters()))
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


@pytest.mark.parametrize("block", ["Auto", "automatic", "", 0, None, 1.0, True])
def test_other_words_for_a_block_are_refused(block: Any) -> None:
    with pytest.raises(ConfigError, match="block"):
        rtrl.BlockRTRL(gru(), 2, block=block)


def test_auto_refuses_what_no_learner_takes() -> None:
    with pytest.raises(ConfigError, match=r"torch\.nn\.Module"):
        rtrl.BlockRTRL("gru", 2, block="auto")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="init_state"):
        rtrl.BlockRTRL(Silent(), 2, block="auto")
    with pytest.raises(ConfigError, match="requires a gradient"):
        rtrl.BlockRTRL(gru().requires_grad_(False), 2, block="auto")


# ------------------------------------------------------------------ the command


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", "--no-measure", *arguments])


@pytest.mark.parametrize("kind", CELLS)
def test_the_command_plans_for_usual_kinds(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    sizes = ("--hidden", "3", "--inputs", "3", "--slots", "1", "--experts", "4", "--topk", "1")
    found = command(
        "--kind",
        kind,
        *sizes,
        "--steps",
        "300",
        "--batch-size",
        "2",
        "--block",
        "2",
        "--horizon",
        "3",
        "--json",
        str(path),
    )
    assert found.exit_code == 0, found.output
    assert "best: BPTT" in found.output
    record = json.loads(path.read_text())
    assert record["batch_size"] == 2
    assert {row["block"] for row in record["rows"]} == {None, 2}


OWN = """
import torch
import rtrl
from torch import nn

def make_cell():
    return rtrl.cells.from_torch(nn.GRUCell(3, 4))

cell = make_cell()

def pair():
    return make_cell(), [torch.ones(5, 3), torch.zeros(5, 3)]

def raising():
    raise ValueError("not today")

number = 7
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "planned_by_me", raising=False)
    (tmp_path / "planned_by_me.py").write_text(OWN)
    return tmp_path


@pytest.mark.parametrize(("name", "batch"), [("make_cell", 1), ("cell", 1), ("pair", 5)])
def test_the_command_plans_for_a_users_own_cell(folder: Path, name: str, batch: int) -> None:
    found = command("--cell", f"planned_by_me:{name}", "--steps", "50", "--block", "2", "--horizon", "3", "--json", "-")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["batch_size"] == batch


def test_the_command_fails_where_nothing_fits(folder: Path) -> None:
    found = command("--cell", "planned_by_me:cell", "--steps", "50", "--memory", "10 B")
    assert found.exit_code == 1
    assert "nothing exact fits" in found.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "5"], "--kind"),
        (["--steps", "5", "--cell", "planned_by_me:cell", "--kind", "gru"], "--kind"),
        (["--steps", "5", "--kind", "cnn"], "no kind"),
        (["--steps", "5", "--cell", "planned_by_me:raising"], "not today"),
        (["--steps", "5", "--cell", "planned_by_me:number"], "must give a cell"),
        (["--steps", "5", "--cell", "planned_by_me:nobody"], "nobody"),
        (["--steps", "5", "--kind", "gru", "--memory", "much"], "not a number of bytes"),
        (["--steps", "5", "--kind", "gru", "--rate", "cluster"], "MACS_PER_S"),
        (["--steps", "5", "--kind", "gru", "--rate", "=3"], "MACS_PER_S"),
        (["--steps", "5", "--kind", "gru", "--rate", "cluster=-1"], "cluster"),
        (["--steps", "5", "--kind", "gru", "--block", "0"], "block"),
        (["--steps", "5", "--kind", "moe", "--topk", "20"], "topk"),
        (["--steps", "5", "--kind", "gru", "--json", "/no/such/folder/plan.json"], "cannot be written"),
        (["--steps", "0", "--kind", "gru"], "steps"),
    ],
)
def test_the_command_says_why_it_cannot_be_carried_out(folder: Path, arguments: list[str], words: str) -> None:
    found = command(*arguments)
    assert found.exit_code == 2
    assert words in " ".join(found.output.replace("│", " ").split())


def test_the_command_measures_the_devices_that_are_here() -> None:
    found = CliRunner().invoke(app, ["plan", "--kind", "rnn", "--hidden", "4", "--inputs", "3", "--steps", "9"])
    assert "this CPU" in found.output
    assert "cluster" in command("--kind", "rnn", "--hidden", "4", "--steps", "9", "--rate", "cluster=2e13").output
