"""Decide whether the mean of a random learner's gradients is the exact one."""

import torch
from torch import Tensor

from rtrl.testing.compare import RELATIVE
from rtrl.testing.laws import Gradients, Unbiased
from rtrl.testing.learner_checks.driver import drive
from rtrl.testing.learner_checks.mismatch import Mismatch
from rtrl.testing.spec import LearnerSpec
from rtrl.testing.streams import Stream


def evaluate_mean(law: Unbiased, spec: LearnerSpec, stream: Stream, seed: int) -> Mismatch | None:
    """Up to four times as many draws as declared, while they scatter too much."""
    exact = law.reference(stream, None)
    directions = {words: _joined(part) for words, part in law.directions(stream).items()}
    directions = {words: part for words, part in directions.items() if bool(part.any())}
    draws: list[Tensor] = []
    for n in (law.draws, 2 * law.draws, 4 * law.draws):
        for draw in range(len(draws), n):
            torch.manual_seed((seed << 20) + draw)
            gradients = drive(spec, stream).gradients
            draws.append(_joined({name: gradients[name] for name in exact}))
        mismatch = _judge_mean(law, torch.stack(draws), exact, directions)
        if mismatch is None or not mismatch.message.endswith("use more draws"):
            return mismatch
    return mismatch


def _judge_mean(law: Unbiased, draws: Tensor, exact: Gradients, directions: dict[str, Tensor]) -> Mismatch | None:
    flat = _joined(exact)
    units = torch.stack([flat * 0, *(part / part.norm() for part in directions.values())])[1:]
    values = torch.cat([draws, draws @ units.T], dim=1)
    expected = torch.cat([flat, units @ flat])
    mean, error = values.mean(dim=0), values.std(dim=0) / len(draws) ** 0.5
    rounding = RELATIVE * float(flat.norm())  # for entries without chance
    allowed = law.quantile(len(expected)) * error + rounding
    gap = (mean - expected).abs().nan_to_num(nan=torch.inf)
    if float(error.max()) == 0 and bool((gap > allowed).any()):
        return Mismatch("", "", "", None, "all draws are equal; a learner must draw from PyTorch's global generator")
    if bool((gap > allowed).any()):
        worst = int((gap / allowed).argmax())
        where = _entry(exact, worst) if worst < len(flat) else _along(list(directions)[worst - len(flat)])
        n_errors = float(gap[worst] / error[worst]) if float(error[worst]) else float("inf")
        found = f"{float(mean[worst]):.6g} ({n_errors:.3g} standard errors off)"
        return Mismatch(f"{where}, mean of {len(draws)} draws", found, f"{float(expected[worst]):.6g}")
    for i, (words, direction) in enumerate(directions.items(), len(flat)):
        size = float(direction.norm())  # by which a gradient without this part is off
        if float(allowed[i]) >= size:
            found = f"{float(mean[i]):.3g} ± {float(allowed[i]):.3g}"
            message = "the draws scatter so much that a gradient without it would pass as well; use more draws"
            return Mismatch(_along(words), found, f"{float(expected[i]):.3g}", message=message)
    return None


def _joined(gradient: Gradients) -> Tensor:
    return torch.cat([value.flatten() for value in gradient.values()])


def _along(words: str) -> str:
    return f"the component along {words}"


def _entry(exact: Gradients, flat: int) -> str:
    for name, value in exact.items():
        if flat < value.numel():
            index = [int(i) for i in torch.unravel_index(torch.tensor(flat), value.shape)]
            return f"parameter {name}{index if index else ''}"
        flat -= value.numel()
    raise IndexError(flat)
