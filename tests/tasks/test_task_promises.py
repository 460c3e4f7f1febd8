"""What every task promises: streams, levels, and answers that reach them."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rtrl import tasks
from rtrl.errors import ConfigError
from rtrl.tasks.protocol import Task, TaskStep, TaskStream

TEXT = (
    "the quick brown fox jumps over the lazy dog; " * 40 + "pack my box with five dozen liquor jugs. " * 40
).encode()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text"
    path.write_bytes(TEXT)
    return path


@pytest.fixture(params=["anbn", "haystack", "copy", "adding", "bytes", "rows", "pixels", "tmaze"])
def task(request: pytest.FixtureRequest, text: Path) -> Task:
    if request.param in ("rows", "pixels"):
        pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
        return tasks.make("digits", by=request.param[:-1])
    return tasks.make(request.param, **({"path": str(text)} if request.param == "bytes" else {}))


def parts(moment: TaskStep) -> list[Tensor]:
    return [moment.x, moment.target, moment.has_target, moment.is_first]


def take(stream: TaskStream, steps: int) -> list[TaskStep]:
    return [next(stream) for _ in range(steps)]


def same(one: list[TaskStep], two: list[TaskStep]) -> bool:
    return all(
        torch.equal(a, b) for m, n in zip(one, two, strict=True) for a, b in zip(parts(m), parts(n), strict=True)
    )


def test_every_name_makes_a_task_that_is_called_so() -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    for name in tasks.TASKS:
        assert tasks.make(name).name == name


def test_moments_have_their_forms(task: Task) -> None:
    for dtype in (torch.float32, torch.float64):
        stream = task.stream(3, dtype=dtype)
        assert iter(stream) is stream
        for t, moment in enumerate(take(stream, 140)):
            assert moment.x.shape == (3, task.d_in) and moment.x.dtype == dtype
            numbers = task.measure == "squared error"
            assert moment.target.shape == ((3, task.d_out) if numbers else (3,))
            assert moment.target.dtype == (dtype if numbers else torch.int64)
            for flags in (moment.has_target, moment.is_first):
                assert flags.shape == (3,) and flags.dtype == torch.bool
            assert t > 0 or bool(moment.is_first.all())
    assert task.d_out >= 1 and task.measure in ("accuracy", "bits per symbol", "squared error")


def test_the_seed_decides(task: Task) -> None:
    first = take(task.stream(3, seed=5), 80)
    assert same(first, take(task.stream(3, seed=5), 80))
    assert not same(first, take(task.stream(3, seed=6), 80))
    assert not same(first, take(task.stream(3, seed=5, held_out=True), 80))


def test_a_stream_is_taken_up_again_at_any_step(task: Task) -> None:
    whole = take(task.stream(2, seed=1), 160)
    stream = task.stream(2, seed=1)
    for t in range(90):
        if t % 7 == 0:
            again = task.stream(2, seed=1)
            next(again)  # it has been elsewhere
            again.load_state_dict(stream.state_dict())
            assert same(take(again, 70), whole[t : t + 70]), t
        next(stream)


def test_a_state_is_small_and_of_plain_values(task: Task) -> None:
    stream = task.stream(2)
    take(stream, 50)
    state = stream.state_dict()
    assert len(repr(state)) < 500
    assert all(isinstance(value, str | int | bool) for value in state.values())


def test_a_state_of_another_stream_is_refused(task: Task) -> None:
    stream = task.stream(2, seed=3)
    others = [task.stream(3, seed=3), task.stream(2, seed=4), task.stream(2, seed=3, held_out=True)]
    before = take(task.stream(2, seed=3), 20)
    for other in others:
        with pytest.raises(ConfigError):
            stream.load_state_dict(other.state_dict())
    with pytest.raises(ConfigError):
        stream.load_state_dict({})
    assert same(take(stream, 20), before)


@pytest.mark.parametrize("name", ["copy", "adding", "digits", "tmaze"])
def test_a_sample_does_not_depend_on_how_many_there_are(name: str) -> None:
    if name == "digits":
        pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    task = tasks.make(name)
    few, many = take(task.stream(2, seed=1), 60), take(task.stream(33, seed=1), 60)
    assert same(few, [TaskStep(*(part[:2] for part in parts(moment))) for moment in many])


def test_whatever_the_default_device_and_dtype(task: Task) -> None:
    expected = take(task.stream(2, seed=1), 30)
    assert torch.get_default_dtype() == torch.float32
    with torch.device("meta"):
        found = take(task.stream(2, seed=1, device="cpu"), 30)
    assert same(found, expected)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"batch_size": True}, {"batch_size": 2, "seed": 0.5}])
def test_bad_streams_are_refused(task: Task, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=list(wrong)[-1]):
        task.stream(**wrong)


# ---------------------------------------------------------------------- levels


def asked(task: Task, steps: int, **stream: Any) -> list[tuple[tuple[float, ...], Any]]:
    """(x, target) of every sample that was asked."""
    found = []
    for moment in take(task.stream(64, **stream), steps):
        places = moment.has_target.nonzero().flatten().tolist()
        found.extend((tuple(moment.x[b].tolist()), moment.target[b]) for b in places)
    return found


@pytest.mark.parametrize("name", ["anbn", "haystack", "copy", "digits"])
def test_the_best_answer_from_x_alone_is_at_chance(name: str) -> None:
    if name == "digits":
        pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    task = tasks.make(name)
    table: dict[tuple[float, ...], Counter[int]] = defaultdict(Counter)
    for x, target in asked(task, 700, seed=1):
        table[x][int(target)] += 1
    assert len(table) <= 4  # so few that the table cannot learn the answers by heart
    answers = asked(task, 700, seed=2)
    right = sum(table[x].most_common(1)[0][0] == int(target) for x, target in answers) / len(answers)
    assert abs(right - task.chance) < 4 * (0.25 / len(answers)) ** 0.5 + 0.01


def test_the_best_answer_from_x_alone_is_at_chance_in_adding() -> None:
    task = tasks.make("adding")
    pairs = asked(task, 1600, seed=1)
    x = torch.tensor([[*x, 1.0] for x, _ in pairs], dtype=torch.float64)
    target = torch.stack([target for _, target in pairs]).double()
    best = x @ torch.linalg.lstsq(x, target, driver="gelsd").solution
    assert float((best - target).square().mean()) == pytest.approx(task.chance, rel=0.05)
    assert float((1 - target).square().mean()) == pytest.approx(task.chance, rel=0.05)


def test_each_half_of_adding_has_one_mark_and_the_last_step_none() -> None:
    marks = torch.stack([m.x[:, 1] for m in take(tasks.make("adding", length=5).stream(32), 5 * 10)]).unflatten(
        0, (10, 5)
    )
    assert bool((marks[:, :2].sum(dim=1) == 1).all()) and bool((marks[:, 2:].sum(dim=1) == 1).all())
    assert not bool(marks[:, -1].any()) and bool(marks.any(dim=(0, 2))[:4].all())


def test_the_cue_of_copy_stands_at_the_first_step_of_the_answer() -> None:
    moments = take(tasks.make("copy", values=3, length=2, delay=2).stream(4), 12)
    for t, moment in enumerate(moments):
        assert moment.x[:, 3].tolist() == [float(t % 6 == 4)] * 4
        assert moment.x[:, :3].sum(dim=1).tolist() == [float(t % 6 < 2)] * 4
        assert moment.has_target.tolist() == [t % 6 >= 4] * 4


def test_tables_of_a_text_are_the_levels_of_bytes(text: Path) -> None:
    task = tasks.make("bytes", path=text)
    part = TEXT[: len(TEXT) * 9 // 10]
    for order, level in ((1, task.chance), (2, task.solved)):
        counts: dict[bytes, Counter[int]] = defaultdict(Counter)
        for t in range(len(part) - order):
            counts[part[t : t + order]][part[t + order]] += 1
        bits = 0.0
        for seen in counts.values():
            shares = torch.tensor(list(seen.values()), dtype=torch.float64)
            bits -= float((shares * (shares / shares.sum()).log2()).sum())
        assert bits / (len(part) - order) == pytest.approx(level, rel=1e-9)
    assert 0 < task.solved < task.chance < 8


def answer(task: Task, seen: list[TaskStep]) -> Tensor:
    """What one who knows the task answers at the last of these moments, the episode's first being the first."""
    now, x = seen[-1], torch.stack([moment.x for moment in seen])
    if isinstance(task, tasks.AnBn):
        count = x.sum(dim=0)
        return torch.stack([count[:, 0] != count[:, 1], count[:, 0] == count[:, 1]], dim=1).float()
    if isinstance(task, tasks.Haystack):
        v = task.values
        after_key = torch.cat([torch.zeros_like(x[:1]), x[:-1]])[..., v + 1 : v + 2]
        return (x * after_key).sum(dim=0)[:, :v]
    if isinstance(task, tasks.Copy):
        return x[(len(seen) - 1) % (task.length + task.delay)][:, : task.values]  # type: ignore[no-any-return]
    if isinstance(task, tasks.Adding):
        return (x[..., :1] * x[..., 1:]).sum(dim=0)
    if isinstance(task, tasks.TMaze):
        return x[0, :, :2]
    return now.x


@pytest.mark.parametrize("name", ["anbn", "haystack", "copy", "adding", "tmaze"])
@pytest.mark.parametrize("held_out", [False, True])
def test_who_knows_the_task_solves_it(name: str, held_out: bool) -> None:
    task = tasks.make(name)
    total, count, seen = 0.0, 0, []
    for moment in take(task.stream(8, seed=3, held_out=held_out), 200):
        seen = [moment] if bool(moment.is_first.all()) else [*seen, moment]
        score, number = task.score(answer(task, seen), moment)
        total, count = total + score, count + number
    assert count > 8
    score = total / count
    assert score == 1 if task.measure == "accuracy" else score <= task.solved and score < 1e-10


def test_the_corridor_says_nothing_about_the_sign() -> None:
    """Neither the size of a number nor its last bit goes with the sign."""
    steps = take(tasks.make("tmaze", corridor=3).stream(1000, seed=2), 5)
    sign = steps[0].x[:, 1]
    for step in steps[1:-1]:
        number = step.x[:, 2].double()
        for bit in ((number * 2**19).floor() % 2, number > 0.5):
            assert abs(float((bit.double() == sign).double().mean()) - 0.5) < 0.08


def test_who_knows_the_pictures_solves_the_digits() -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    for by in ("row", "pixel"):
        task = tasks.make("digits", by=by)
        known: dict[tuple[float, ...], int] = {}
        right = total = 0
        for turn, seed in enumerate((1, 1)):  # what was seen in the first turn comes again in the second
            seen: list[TaskStep] = []
            for moment in take(task.stream(8, seed=seed), 130):
                seen = [moment] if bool(moment.is_first.all()) else [*seen, moment]
                picture = torch.stack([m.x for m in seen])
                for b in moment.has_target.nonzero().flatten().tolist():
                    key = tuple(picture[:, b].flatten().tolist())
                    assert len(key) == 64 + task.d_in and not any(key[64:])
                    if turn == 0:
                        known[key] = int(moment.target[b])
                    y = torch.nn.functional.one_hot(torch.tensor([known[key]]), 10).float().expand(8, -1)
                    alone = TaskStep(moment.x, moment.target, torch.arange(8) == b, moment.is_first)
                    score, count = task.score(y, alone)
                    right, total = right + score, total + count
        assert total > 0 and right / total >= task.solved


def test_held_out_pictures_and_sums_are_in_no_training() -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

    def episodes(task: Task, held_out: bool, steps: int, d: int) -> set[tuple[float, ...]]:
        moments = take(task.stream(64, held_out=held_out), steps * 20)
        x = torch.stack([m.x[:, :d] for m in moments]).unflatten(0, (20, steps))
        return {tuple(row) for row in x.permute(0, 2, 1, 3).flatten(0, 1).flatten(1).tolist()}

    for task, steps in ((tasks.make("digits"), 9), (tasks.make("copy", values=3, length=2, delay=0), 4)):
        assert not episodes(task, False, steps, task.d_in) & episodes(task, True, steps, task.d_in)
    numbers = [episodes(tasks.make("adding"), held_out, 20, 1) for held_out in (False, True)]
    flat = [{value for episode in one for value in episode} for one in numbers]
    assert not flat[0] & flat[1]


@pytest.mark.parametrize(("values", "length"), [(3, 2), (2, 6), (4, 3), (5, 4)])
def test_symbols_to_be_copied_are_all_as_likely_and_none_is_in_both_parts(values: int, length: int) -> None:
    task, parts = tasks.make("copy", values=values, length=length, delay=0), []
    for held_out in (False, True):
        moments = take(task.stream(256, held_out=held_out), 2 * length * 40)
        told = torch.stack([m.x[:, :values].argmax(dim=1) for m in moments]).unflatten(0, (40, 2 * length))[:, :length]
        shares = torch.nn.functional.one_hot(told, values).double().mean(dim=(0, 2))
        assert bool(((shares - 1 / values).abs() < 0.025).all())
        parts.append({tuple(row) for row in told.transpose(1, 2).flatten(0, 1).tolist()})
    assert not parts[0] & parts[1]
    tied = min(length - 1, next(k for k in range(1, 9) if values**k >= 16))
    assert len(parts[1]) == values ** (length - tied) and len(parts[0] | parts[1]) == values**length


# ---------------------------------------------------------------------- bytes


def test_bytes_are_read_on_and_begin_again(text: Path) -> None:
    task = tasks.make("bytes", path=text)
    held = [TEXT[: len(TEXT) * 9 // 10], TEXT[len(TEXT) * 9 // 10 :]]
    for held_out in (False, True):
        section = (len(held[held_out]) - 1) // 2
        moments = take(task.stream(2, seed=4, held_out=held_out), 2 * section)
        place = None
        for t, moment in enumerate(moments):
            now, following = moment.x.argmax(dim=1), moment.target
            if place is None:
                fits = [p for p in range(section) if _bytes_at(held[held_out], section, moments[:60], p)]
                place = fits[0]
            expected = [held[held_out][b * section + place : b * section + place + 2] for b in (0, 1)]
            assert [bytes(pair) for pair in zip(now.tolist(), following.tolist(), strict=True)] == expected
            assert bool(moment.is_first.all()) == (t == 0 or place == 0) and bool(moment.has_target.all())
            place = (place + 1) % section


def _bytes_at(part: bytes, section: int, moments: list[TaskStep], place: int) -> bool:
    for t, moment in enumerate(moments):
        here = (place + t) % section
        if [part[b * section + here] for b in (0, 1)] != moment.x.argmax(dim=1).tolist():
            return False
    return True


def test_a_score_in_bits_and_a_loss_in_nats(text: Path) -> None:
    task = tasks.make("bytes", path=text)
    moment = next(task.stream(4))
    uniform = torch.zeros(4, 256)
    assert task.score(uniform, moment) == (pytest.approx(32.0), 4)
    loss = task.loss(uniform, moment)
    assert loss is not None and float(loss) == pytest.approx(8 * torch.log(torch.tensor(2.0)).item())


def test_a_file_that_has_changed_or_is_too_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"abcdefghij" * 20)
    task = tasks.make("bytes", path=path)
    with pytest.raises(ConfigError, match="too short"):
        task.stream(200)
    with pytest.raises(ConfigError, match="seed"):
        task.stream(1, seed=-1)
    path.write_bytes(b"abcdefghij" * 20 + b"x")
    with pytest.raises(ConfigError, match="changed"):
        task.stream(1)
    path.write_bytes(b"abc")
    with pytest.raises(ConfigError, match="too short"):
        tasks.make("bytes", path=path)
    with pytest.raises(ConfigError, match="does not exist"):
        tasks.make("bytes", path=tmp_path / "nothing")
    stream = task.stream  # a place outside is refused, too
    path.write_bytes(b"abcdefghij" * 20)
    with pytest.raises(ConfigError, match="place"):
        stream(1).load_state_dict({**stream(1).state_dict(), "place": 10**6})


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("nothing", {}, "there is no task 'nothing'; there are: anbn"),
        ("copy", {"dealy": 3}, "no option 'dealy'; it has: values, length, delay"),
        ("copy", {"values": 1}, "values"),
        ("copy", {"length": 1}, "length"),
        ("copy", {"delay": -1}, "delay"),
        ("copy", {"delay": 2.0}, "delay"),
        ("adding", {"length": 3}, "length"),
        ("digits", {"by": "column"}, "by must be"),
        ("anbn", {"train_n": 3}, "does not take these options"),
    ],
)
def test_bad_tasks_are_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tasks.make(name, **options)


def test_without_scikit_learn_the_digits_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'rtrl\[tasks\]'"):
        tasks.make("digits")


def test_a_span_of_a_text(text: Path) -> None:
    assert tasks.ByteStream(text, span=(0.5, 1.0)).text() == TEXT[len(TEXT) // 2 :]
    for span in ((0.5, 0.5), (-0.1, 1.0), (0.0, 1.1)):
        with pytest.raises(ConfigError, match="span"):
            tasks.ByteStream(text, span=span)
