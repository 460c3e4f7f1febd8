"""A run that is left at any step and taken up again goes on bit for bit."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rtrl
from rtrl import tasks, training
from rtrl.errors import CellError, ConfigError
from rtrl.tasks.protocol import Task
from rtrl.training import Trainer
from rtrl.training.run import Settings, load, save

OPTIONS: dict[str, dict[str, Any]] = {"block": {"block": 4, "window": 3}, "tbptt": {"k": 3}}


def trainer_of(task: Task, name: str, cell: str = "gru", **changes: Any) -> Trainer:
    sizes = {"hidden": 3} if cell != "moe" else {"d_model": 4, "n_slots": 3, "n_experts": 4, "topk": 1}
    made = training.make_cell(cell, task.d_in, task.d_out, dtype=torch.float64, **sizes)
    return Trainer(
        made,
        task,
        learner=training.make_learner(name, **OPTIONS.get(name, {})),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
        **{"batch_size": 2, "log_every": 5, "clip": 1.0, **changes},
    )


def walk(trainer: Trainer, steps: int) -> None:
    while trainer.steps_taken < steps:
        trainer.step()


def outcome(trainer: Trainer) -> tuple[Any, ...]:
    weights = [p.detach().clone() for p in trainer.cell.parameters()]
    return trainer.curve, trainer.unfinished(), weights


def assert_equal(one: tuple[Any, ...], two: tuple[Any, ...]) -> None:
    assert one[:2] == two[:2]
    assert all(torch.equal(a, b) for a, b in zip(one[2], two[2], strict=True))


def through_a_file(state: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", training.LEARNERS)
def test_every_learner_goes_on_bit_for_bit_from_any_step(name: str) -> None:
    task = tasks.make("anbn", train_n=[1, 2, 3])
    every, stride = (None, 1) if name == "block" else (3, 4)
    straight = trainer_of(task, name, every=every)
    states = []
    for _ in range(11):
        states.append(through_a_file(straight.state_dict()))
        straight.step()
    walk(straight, 16)
    for step in range(0, 11, stride):
        resumed = trainer_of(task, name, every=every)
        resumed.step()  # it has been elsewhere
        resumed.load_state_dict(states[step])
        assert resumed.steps_taken == step
        walk(resumed, 16)
        assert_equal(outcome(straight), outcome(resumed))


def test_a_mixture_with_dormant_experts_continues_bit_for_bit() -> None:
    task = tasks.make("haystack", values=3, lengths=(6, 7))
    straight = trainer_of(task, "block", "moe")
    states = {}
    for step in range(30):
        if step in (1, 13, 26):
            states[step] = through_a_file(straight.state_dict())
        straight.step()
    for state in states.values():
        resumed = trainer_of(task, "block", "moe")
        resumed.load_state_dict(state)
        walk(resumed, 30)
        assert_equal(outcome(straight), outcome(resumed))


def test_that_the_comparison_can_fail() -> None:
    task = tasks.make("anbn")
    straight, other = trainer_of(task, "block"), trainer_of(task, "block")
    walk(straight, 10)
    state = straight.state_dict()
    walk(straight, 22)
    for part in ("learner", "stream", "optimizer", "cell"):
        fresh = trainer_of(task, "block")
        other = trainer_of(task, "block")
        edited = {**state, part: fresh.state_dict()[part]}
        if part == "learner":
            with pytest.raises(ConfigError, match="10 steps, but its learner 0"):
                other.load_state_dict(edited)
            continue
        other.load_state_dict(edited)
        try:
            walk(other, 22)
        except CellError:
            assert part == "cell"  # the steps of the open block were taken with another
        else:
            with pytest.raises(AssertionError):
                assert_equal(outcome(straight), outcome(other))


def test_a_saved_state_is_a_copy() -> None:
    task = tasks.make("anbn")
    straight, resumed = trainer_of(task, "block"), trainer_of(task, "block")
    walk(straight, 9)
    state = straight.state_dict()
    walk(straight, 22)
    resumed.load_state_dict(state)
    walk(resumed, 22)
    assert_equal(outcome(straight), outcome(resumed))


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda s: {**s, "format": 99}, "not a saved trainer"),
        (lambda s: 3, "not a saved trainer"),
        (lambda s: {k: v for k, v in s.items() if k != "stream"}, "damaged.*stream"),
        (lambda s: {**s, "rows": [[1]]}, "damaged"),
        (lambda s: {**s, "cell": {}}, "damaged"),
        (lambda s: {**s, "learner": {}}, "not a saved learner"),
        (lambda s: {**s, "stream": {}}, "missing"),
        (lambda s: {**s, "optimizer": {}}, "damaged"),
        (lambda s: {**s, "layout": {**s["layout"], "clip": 3.0}}, r"clip=3\.0, this one 1\.0"),
        (lambda s: {**s, "layout": {**s["layout"], "task": "copy"}}, "task='copy', this one 'anbn'"),
    ],
)
def test_a_damaged_or_foreign_state_leaves_the_cell_as_it_was(edit: Any, words: str) -> None:
    task = tasks.make("anbn")
    other = trainer_of(task, "block")
    walk(other, 12)
    mine = trainer_of(task, "block")
    before = [p.detach().clone() for p in mine.cell.parameters()]
    with pytest.raises(ConfigError, match=words):
        mine.load_state_dict(edit(other.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(before, mine.cell.parameters(), strict=True))


def test_a_learner_that_cannot_be_saved_says_so() -> None:
    class Plain:
        def __init__(self, cell: nn.Module, batch_size: int) -> None:
            pass

    task = tasks.make("anbn")
    cell = training.make_cell("gru", 2, 2)
    trainer = Trainer(cell, task, learner=Plain, optimizer=torch.optim.Adam, batch_size=2)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Plain has no state_dict"):
        trainer.state_dict()
    with pytest.raises(ConfigError, match="Plain has no load_state_dict"):
        trainer.load_state_dict(trainer_of(task, "block").state_dict())


# ---------------------------------------------------------------------- files


def test_a_run_goes_on_from_a_file_in_the_same_random_numbers(tmp_path: Path) -> None:
    settings = Settings(
        "anbn", {"slack": 2}, "uoro", {}, "gru", {"hidden": 3}, "sgd", 0.05, batch_size=2, log_every=5, dtype="float64"
    )
    straight = settings.build()
    walk(straight, 12)
    torch.manual_seed(3)
    save(tmp_path / "run.pt", settings, straight, {"steps": 20})
    drawn = torch.rand(3)
    walk(straight, 20)
    torch.manual_seed(4)
    found, resumed, notes = load(tmp_path / "run.pt")
    assert torch.equal(torch.rand(3), drawn) and found == settings and notes == {"steps": 20}
    walk(resumed, 20)
    assert_equal(outcome(straight), outcome(resumed))
    assert list(tmp_path.iterdir()) == [tmp_path / "run.pt"]  # and no half of one


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    with pytest.raises(ConfigError, match="there is no file"):
        load(path)
    path.write_bytes(b"something else")
    with pytest.raises(ConfigError, match="not a checkpoint"):
        load(path)
    torch.save({"format": 1}, path)
    with pytest.raises(ConfigError, match="not a checkpoint"):
        load(path)
    settings = Settings("anbn", cell="gru", cell_options={"hidden": 2}, batch_size=1)
    save(path, settings, settings.build())
    content = torch.load(path, weights_only=True)
    for key, value in (("settings", {"unknown": 1}), ("trainer", {}), ("random", {})):
        torch.save({**content, key: value}, path)
        with pytest.raises(ConfigError, match=r"damaged|not a saved trainer"):
            load(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "newton"}, "no optimizer 'newton'; there are: adam"),
        ({"dtype": "float8"}, "dtype must be one of 'float32', 'float64'"),
        ({"lr": 0}, "lr must be"),
        ({"lr": float("inf")}, "lr must be"),
        ({"seed": -1}, "seed"),
        ({"device": "nowhere"}, "device 'nowhere' cannot be used"),
        ({"cell": "nothing"}, "no cell"),
        ({"learner": "nothing"}, "no learner"),
        ({"task": "nothing"}, "no task"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Settings(**{"task": "anbn", "cell": "gru", **changes}).build()


def test_a_trainer_takes_one_step_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(rtrl.BlockRTRL, "unroll", refused)
    walk(trainer_of(tasks.make("anbn", train_n=[1, 2, 3]), "block"), 5)
