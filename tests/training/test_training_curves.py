"""Training: exact learners give one curve, updates come when they are due, and what does not fit is refused."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rtrl
from rtrl import errors, tasks, training
from rtrl.learners import BPTT
from rtrl.tasks.protocol import Task, TaskStep, TaskStream
from rtrl.training import Curve, Progress, Row


def gru(task: Task, hidden: int = 5, seed: int = 0) -> nn.Module:
    return training.make_cell("gru", task.d_in, task.d_out, seed=seed, dtype=torch.float64, hidden=hidden)


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def run(cell: nn.Module, task: Task, learner: Any, **changes: Any) -> Curve:
    settings: dict[str, Any] = {"optimizer": adam, "batch_size": 3, "steps": 36, "every": 6, "log_every": 10}
    return training.train(cell, task, learner=learner, **{**settings, **changes})


class Stub(Task):
    """Numbers to be repeated, with a stream that the test writes: a function of the step."""

    name, d_in, d_out, measure = "stub", 2, 2, "squared error"
    chance, solved = 1.0, 0.0

    def __init__(self, moment: Callable[[int], TaskStep]) -> None:
        self.moment = moment

    def stream(self, batch_size: int, **options: Any) -> TaskStream:
        task = self

        class Steps(TaskStream):
            def __init__(self) -> None:
                self.t = -1

            def __next__(self) -> TaskStep:
                self.t += 1
                return task.moment(self.t)

            def state_dict(self) -> dict[str, Any]:
                return {"t": self.t}

            def load_state_dict(self, state: dict[str, Any]) -> None:
                self.t = state["t"]

        return Steps()

    def loss(self, y: Tensor, moment: TaskStep) -> Tensor | None:
        if not bool(moment.has_target.any()):
            return None
        return (y - moment.target)[moment.has_target].square().sum() / len(y)

    def score(self, y: Tensor, moment: TaskStep) -> tuple[float, int]:
        return float((y.detach() - moment.target)[moment.has_target].square().sum()), int(moment.has_target.sum())


def moment_of(asked: Callable[[int], list[int]], fresh: Callable[[int], list[int]]) -> Callable[[int], TaskStep]:
    """Moments of three samples with random numbers, asked and fresh as told."""

    def moment(t: int) -> TaskStep:
        x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        flags = [torch.tensor([b in chosen(t) for b in range(3)]) for chosen in (asked, fresh)]
        return TaskStep(x, x.roll(1, dims=1), *flags)

    return moment


EVERYONE, NOBODY = (lambda t: [0, 1, 2]), (lambda t: [])
UNEVEN = Stub(  # samples are reset at different steps, and have targets at some steps only
    moment_of(lambda t: [t % 3] if t % 4 else [], lambda t: [b for b in range(3) if t % (5 + b) == 0])
)


def assert_same(one: Curve, two: Curve, tolerance: float = 1e-10) -> None:
    for a, b in zip(one.rows, two.rows, strict=True):
        assert a.step == b.step and (a.loss is None) == (b.loss is None)
        if a.loss is not None:
            assert a.loss == pytest.approx(b.loss, rel=tolerance) and a.score == pytest.approx(b.score, rel=tolerance)


@pytest.mark.parametrize(
    "task", [tasks.make("anbn"), tasks.make("copy", length=2, delay=9), UNEVEN], ids=["anbn", "copy", "uneven resets"]
)
@pytest.mark.parametrize("every", [1, 7])
def test_exact_learners_give_one_curve(task: Task, every: int) -> None:
    cells = [gru(task) for _ in range(3)]
    learners = [training.make_learner("bptt"), training.make_learner("block", block=4, window=3)]
    learners.append(training.make_learner("block", block=9))
    curves = [run(cell, task, learner, every=every) for cell, learner in zip(cells, learners, strict=True)]
    for cell, curve in zip(cells[1:], curves[1:], strict=True):
        assert_same(curves[0], curve)
        for name, parameter in cells[0].named_parameters():
            torch.testing.assert_close(cell.get_parameter(name), parameter, rtol=1e-9, atol=1e-11)
    assert not torch.equal(cells[0].get_parameter("cell.weight_hh"), gru(task).get_parameter("cell.weight_hh"))


def test_that_the_comparison_can_fail() -> None:
    task = UNEVEN
    exact = run(gru(task), task, training.make_learner("bptt"))
    long, short = (run(gru(task), task, training.make_learner("tbptt", k=k, sliding=True)) for k in (7, 2))
    assert_same(exact, long)  # no sample is older than 7 steps
    with pytest.raises(AssertionError):
        assert_same(exact, short)


def test_a_mixture_of_experts_learns_alike_by_both() -> None:
    task = tasks.make("haystack", values=3, lengths=(6, 8))
    sizes = {"d_model": 4, "n_slots": 3, "n_experts": 4, "topk": 1}
    cells = [training.make_cell("moe", task.d_in, 3, dtype=torch.float64, **sizes) for _ in range(2)]
    curves = [
        run(cells[0], task, BPTT, steps=20),
        run(cells[1], task, training.make_learner("block", block=5), steps=20),
    ]
    assert_same(*curves)


@pytest.mark.parametrize("name", training.LEARNERS)
def test_every_learner_learns_something(name: str) -> None:
    task = Stub(moment_of(EVERYONE, lambda t: [0, 1, 2] if t == 0 else []))
    cell = gru(task, 3)
    before = training.evaluate(cell, task, batch_size=3, steps=32)
    curve = run(cell, task, training.make_learner(name), every=None, steps=32, clip=1.0)
    assert [row.step for row in curve.rows] == [10, 20, 30, 32]
    assert training.evaluate(cell, task, batch_size=3, steps=32) < before
    assert all(row.bytes_held > 0 for row in curve.rows)


def test_the_same_seed_gives_an_equal_curve_and_another_another() -> None:
    task = tasks.make("copy")
    make = training.make_learner("block", block=8)
    first, again, other = (run(gru(task), task, make, seed=seed) for seed in (1, 1, 2))
    assert first == again and first != other


# ---------------------------------------------------------------------- when and how parameters are changed


class Note:
    """Makes learners that note what is asked of them."""

    def __init__(self, **options: Any) -> None:
        self.options, self.calls = options, []

    def __call__(self, cell: nn.Module, batch_size: int) -> rtrl.BlockRTRL:
        calls = self.calls

        class Noting(rtrl.BlockRTRL):
            def step(self, x: Any, **options: Any) -> Any:
                calls.append("step")
                return super().step(x, **options)

            def sync(self, dormant: bool = True) -> None:
                calls.append("sync")
                super().sync(dormant)

            def reset(self, rows: Tensor | None = None, **options: Any) -> None:
                calls.append(("reset", None if rows is None else rows.tolist()))
                super().reset(rows, **options)

        return Noting(cell, batch_size, **self.options)


def syncs(calls: list[Any]) -> list[int]:
    """After how many steps there was a sync."""
    return [calls[:place].count("step") for place, call in enumerate(calls) if call == "sync"]


@pytest.mark.parametrize(
    ("block", "every", "expected"), [(4, None, [4, 8, 12]), (4, 3, [3, 6, 9, 12]), (4, 6, [6, 12])]
)
def test_updates_come_once_a_block_or_every_so_many_steps(block: int, every: int | None, expected: list[int]) -> None:
    note, task = Note(block=block), Stub(moment_of(EVERYONE, NOBODY))
    run(gru(task), task, note, every=every, steps=14)
    assert syncs(note.calls) == expected


def test_resets_at_every_step_do_not_put_updates_off_for_ever() -> None:
    note, task = Note(block=4), Stub(moment_of(EVERYONE, lambda t: [t % 3]))
    run(gru(task), task, note, every=None, steps=13)
    assert syncs(note.calls) == [4, 8, 12]
    resets = [call for call in note.calls if call[0] == "reset"]
    assert resets == [("reset", [t % 3 == b for b in range(3)]) for t in range(1, 13)]  # not before the first step


def test_an_update_without_a_loss_is_left_out() -> None:
    note, task = Note(block=2), Stub(moment_of(lambda t: [0] if t == 5 else [], NOBODY))
    cell = gru(task)
    curve = run(cell, task, note, every=2, steps=12, log_every=4)
    assert syncs(note.calls) == [6]
    assert [row.score is None for row in curve.rows] == [True, False, True]
    assert all(parameter.grad is None for parameter in cell.parameters())


def test_gradients_that_were_there_before_do_not_count() -> None:
    task = Stub(moment_of(EVERYONE, NOBODY))
    clean, dirty = gru(task), gru(task)
    for parameter in dirty.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert run(clean, task, BPTT) == run(dirty, task, BPTT)


def test_a_parameter_without_a_gradient_decays_like_one_whose_gradient_is_zero() -> None:
    class Sparing(BPTT):
        """Leaves out parameters without a gradient."""

        def sync(self, dormant: bool = True) -> None:
            super().sync(dormant)
            for parameter in self.cell.parameters():
                if not bool(parameter.grad.any()):
                    parameter.grad = None

    task, cells = Stub(moment_of(EVERYONE, NOBODY)), []
    for learner in (BPTT, Sparing):
        cell = gru(task)
        cell.idle = nn.Parameter(torch.ones(2, dtype=torch.float64))
        run(cell, task, learner, optimizer=lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1))
        cells.append(cell)
    assert torch.equal(cells[0].idle, cells[1].idle) and float(cells[0].idle.detach()[0]) < 1


def test_a_clipped_gradient_is_as_long_as_is_allowed() -> None:
    task, norms = Stub(moment_of(EVERYONE, NOBODY)), []

    class Watching(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            grads = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
            norms.append(float(torch.cat(grads).norm()))

    for clip in (None, 1e-3):
        run(gru(task), task, BPTT, optimizer=lambda p: Watching(p, lr=0.1), clip=clip, steps=6)
    assert norms[0] > 1e-2 and norms[1] == pytest.approx(1e-3, rel=1e-4)


# ---------------------------------------------------------------------- rows and watchers


def test_rows_are_means_over_the_samples_asked() -> None:
    task = UNEVEN
    seen: list[Progress] = []
    curve = run(gru(task), task, BPTT, steps=25, every=100, watch=seen.append)
    assert [row.step for row in curve.rows] == [10, 20, 25] == curve.column("step")
    assert [progress.row for progress in seen] == curve.rows and seen[0].steps == 25 and seen[0].step == 10
    assert all(progress.steps_per_s > 0 for progress in seen)
    cell, h = gru(task), None
    totals = {10: [0.0, 0], 20: [0.0, 0], 25: [0.0, 0]}
    stream = task.stream(3)
    for t in range(25):
        moment = next(stream)
        h = cell.init_state(3) if h is None else torch.where(moment.is_first[:, None], 0.0, h)
        y, h = cell(moment.x, h)
        score, asked = task.score(y, moment)
        row = next(step for step in totals if t < step)
        totals[row][0] += score
        totals[row][1] += asked
    for row in curve.rows:
        mean = totals[row.step][0] / totals[row.step][1]
        assert row.score == pytest.approx(mean) == row.loss  # of this task the loss is the score


def test_when_a_curve_says_solved() -> None:
    task, better = tasks.make("copy"), tasks.make("adding")
    curve = Curve([Row(1, 1.0, None, 0), Row(2, 1.0, 0.5, 0), Row(3, 1.0, 0.995, 0), Row(4, 0.1, 0.005, 0)])
    assert curve.first_solved(task) == 3 and curve.first_solved(better) == 4
    level = [Curve([Row(1, 1.0, each.solved, 0)]).first_solved(each) for each in (task, better)]
    assert level == [1, 1], "the level itself counts"
    assert Curve().first_solved(task) is None and len(curve) == 4 and curve.last.step == 4


def test_evaluate_runs_the_cell_forward_over_held_out_steps() -> None:
    task = UNEVEN
    cell = gru(task)
    (row,) = run(gru(task), task, BPTT, steps=30, every=100, log_every=30).rows
    assert training.evaluate(cell, task, batch_size=3, steps=30) == pytest.approx(row.score, rel=1e-12)
    copy = tasks.make("copy")
    one, two, three = (
        training.evaluate(gru(copy), copy, batch_size=8, steps=110, seed=seed, held_out=held_out)
        for seed, held_out in ((0, True), (0, False), (1, True))
    )
    assert one != two and one != three
    with pytest.raises(errors.ConfigError, match="has no target within 3 steps"):
        training.evaluate(gru(copy), copy, batch_size=8, steps=3)


def test_learning_moves_a_score_over_the_solved_level() -> None:
    task = tasks.make("copy", values=2, length=2, delay=0)
    cell = training.make_cell("gru", task.d_in, task.d_out, hidden=8)
    before = training.evaluate(cell, task, batch_size=16, steps=80)
    fast = {"optimizer": lambda p: torch.optim.Adam(p, lr=2e-2), "batch_size": 16, "every": None}
    run(cell, task, training.make_learner("block", block=4), steps=400, **fast)
    assert before < 0.8 and training.evaluate(cell, task, batch_size=16, steps=80, held_out=False) >= task.solved


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"steps": 0}, "steps"),
        ({"every": 0}, "every"),
        ({"clip": 0.0}, "clip"),
        ({"clip": float("nan")}, "clip"),
        ({"seed": -1}, "seed"),
        ({"log_every": 0}, "log_every"),
    ],
)
def test_bad_numbers_are_refused(changes: dict[str, Any], words: str) -> None:
    task = tasks.make("copy")
    with pytest.raises(errors.ConfigError, match=words):
        run(gru(task), task, BPTT, **changes)


def test_cells_that_do_not_fit_are_refused_before_anything_is_learned() -> None:
    task = tasks.make("copy")
    narrow = training.make_cell("gru", 3, 4, dtype=torch.float64)
    with pytest.raises(errors.ConfigError, match=r"does not take the x of the task 'copy', \(3, 5\)"):
        run(narrow, task, BPTT)
    with pytest.raises(errors.ShapeError, match=r"y of shape \(3, 4\).*returns \(3, 7\)"):
        run(training.make_cell("gru", 5, 7, dtype=torch.float64), task, BPTT)
    with pytest.raises(errors.ShapeError, match="needs a y"):
        training.evaluate(training.make_cell("gru", 5, 7), task, batch_size=3, steps=20)
    with pytest.raises(errors.ConfigError, match="no parameter"):
        run(gru(task).requires_grad_(False), task, BPTT)
    with pytest.raises(errors.ConfigError, match=r"must be a torch\.nn\.Module"):
        run(None, task, BPTT)  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_names_its_step() -> None:
    def poisoned(t: int) -> TaskStep:
        moment = moment_of(EVERYONE, NOBODY)(t)
        return TaskStep(moment.x, moment.target / (0 if t == 17 else 1), moment.has_target, moment.is_first)

    with pytest.raises(errors.NonFiniteError, match="loss of step 17"):
        run(gru(Stub(poisoned)), Stub(poisoned), BPTT)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("nobody", {}, "no learner 'nobody'; there are: block, bptt"),
        ("tbptt", {"horizon": 3}, "no option 'horizon'; it has: k, sliding"),
        ("bptt", {"k": 3}, "it has none"),
    ],
)
def test_learners_that_there_are_not(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(errors.ConfigError, match=words):
        training.make_learner(name, **options)


def test_options_of_learners_arrive() -> None:
    cell = training.make_cell("rnn", 2, 2, hidden=3)

    def made(name: str, **options: Any) -> Any:
        return training.make_learner(name, **options)(cell, 2)

    assert made("block", block=3, window=5, lazy=False).block == 3
    assert (made("tbptt", k=4).horizon, made("tbptt", sliding=True).sliding) == (4, True)
    assert made("snap", order=2).order == 2 and made("rflo", leak=0.5).leak == 0.5
    with pytest.raises(errors.ConfigError, match="horizon"):
        made("tbptt", k=0)


# ---------------------------------------------------------------------- cells by name


def test_cells_by_name_and_seed(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for name in ("moe", "rnn", "gru", "lstm", "mingru", "elstm", "lru", "rtu"):
        one, same, other = (training.make_cell(name, 3, 2, seed=seed) for seed in (0, 0, 1))
        weights = [torch.cat([p.flatten() for p in cell.parameters()]) for cell in (one, same, other)]
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
        assert one(torch.ones(4, 3), one.init_state(4))[0].shape == (4, 2)
    assert torch.equal(before, torch.get_rng_state())
    layered = training.make_cell("lstm", 3, 2, hidden=4, layers=2)
    assert len(layered.unpack(layered.init_state(1))) == 2

    (tmp_path / "owncells.py").write_text(
        "import rtrl, torch\n"
        "def wide(d_in, d_out, hidden=4):\n"
        "    return rtrl.cells.from_torch(torch.nn.RNNCell(d_in, hidden), torch.nn.Linear(hidden, d_out))\n"
        "def fixed(): return wide(3, 2)\n"
        "made = fixed()\n"
        "def broken(d_in, d_out): raise ValueError('no')\n"
        "def nothing(d_in, d_out): return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert training.make_cell("owncells:wide", 3, 2, hidden=6).init_state(1).shape == (1, 6)
    for name in ("fixed", "made"):
        assert training.make_cell(f"owncells:{name}", 3, 2).init_state(1).shape == (1, 4)
    for name, options, words in (
        ("owncells:broken", {}, "raised ValueError: no"),
        ("owncells:nothing", {}, "must give a torch.nn.Module, got int"),
        ("owncells:made", {"hidden": 3}, "takes no options"),
        ("owncells:absent", {}, "has no 'absent'"),
        ("tree", {}, "no cell 'tree'; there are: moe, rnn, gru, lstm"),
        ("gru", {"hidden": 0}, "hidden"),
        ("gru", {"depth": 2}, "no option 'depth'"),
    ):
        with pytest.raises(errors.ConfigError, match=words):
            training.make_cell(name, 3, 2, **options)
