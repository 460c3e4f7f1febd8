"""What can be asked about the newest step and the next one without changing anything."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rtrl._engine import checks, deferred
from rtrl._engine import step as forward_step
from rtrl._engine.newest_step import separate_losses
from rtrl._engine.surroundings import linearizing
from rtrl._utils import pytrees
from rtrl._utils.real_pairs import unpaired
from rtrl.cells.protocol import Sparsity
from rtrl.errors import ConfigError, LossError, NonFiniteError
from rtrl.learners.exclusive import exclusive
from rtrl.learners.rule import LearningRule


class NewestStepQueries(LearningRule):
    """A learner that gives the gradients of several losses apart, and looks ahead; ``Learner`` is built on it."""

    _stepping: nn.Module
    _takes_replay: bool

    @exclusive
    @torch.inference_mode(False)
    def gradients(self, losses: Mapping[str, Tensor], *, per_sample: bool = False) -> dict[str, dict[str, Tensor]]:
        """Return the gradients of several losses of the newest step, each by itself.

        Nothing changes: no ``.grad``, nothing that the learner carries. These losses are not added to the stream, and
        the graph of each is kept, so that it can still be passed to ``backward`` or be asked about again.

        Equation:
            ``dℓ/dθ = ∂ℓ/∂θ + δ S`` for each loss ℓ: its gradient through the steps of the open block, and its adjoint δ
            at the block's start times the influence S there, as the learning rule carries it.

        Args:
            losses: name → scalar, computed from what the last ``step`` returned.
            per_sample: keep what goes through each sample's y apart.

        Returns:
            Name of the loss → name of the parameter → gradient of the parameter's shape, (B, *shape) if ``per_sample``.
            Tensors outside the cell that a loss depends on are not among them; ``torch.autograd.grad`` gives theirs.

        Raises:
            ConfigError: ``losses`` is not a dict of at least one loss, or the learner cannot take losses apart.
            LossError: a loss is not a scalar of the newest step alone; or its block has closed; or, with
                ``per_sample``, it depends on a parameter other than through y.
            ParameterChangedError: a parameter was replaced, or changed inside the open block of ``BlockRTRL``.
            CellError: run again, the cell does something else than it did.
            NonFiniteError: NaN or infinity in a loss or a gradient.

        Cost:
            One run of the open block, and one backward pass for each loss, B for each with ``per_sample``; and for each
            loss a product (1 × H) @ (H × P) for every sample. Best at ``block=1``.
        """
        self._check_intact()
        self._check_parameters()
        size = self.batch_size
        apart = per_sample and size > 1
        with linearizing(self._parameters.values()):
            separate = separate_losses(losses, self._open_steps, self._steps_taken - 1, self._parameters)
            for name, direct in zip(separate.names, separate.direct, strict=True):
                if apart and direct:
                    raise LossError(
                        f"{name!r} depends on parameter {next(iter(direct))!r} other than through y; that part belongs "
                        "to no sample. Leave it out, or pass per_sample=False"
                    )
            with torch.no_grad():
                pulled = self._pull_losses(separate.by_sample() if apart else separate.cotangents, apart)
            pulled = {key: unpaired(value, self._parameters[key]) for key, value in pulled.items()}
        named = [(f"the loss {name!r}", loss.detach()) for name, loss in losses.items()]
        named += [(f"the gradient of parameter {n!r}", v) for of in (pulled, *separate.direct) for n, v in of.items()]
        if not checks.all_finite([value for _, value in named]):
            for what, value in named:
                checks.check_finite(what, value, self._steps_taken - 1)
        by_loss = {}
        for i, name in enumerate(separate.names):
            of_loss = {key: value[i * size : (i + 1) * size] if apart else value[i] for key, value in pulled.items()}
            of_loss |= {key: of_loss[key] + value for key, value in separate.direct[i].items()}
            by_loss[name] = {key: v.unsqueeze(0) if per_sample and not apart else v for key, v in of_loss.items()}
        return by_loss

    @exclusive
    @torch.inference_mode(False)
    def peek(self, x: Any, *, replay: Sparsity | None = None) -> Any:
        """Return the y of one step from the present state, without taking the step: nothing changes.

        This is for values that a loss is to be compared with, such as the value of the next state in reinforcement
        learning. No loss can be added there: no tensor of y requires grad.

        Args:
            x: as for ``step``.
            replay: as for ``step``.

        Returns:
            y as the cell returns it, without a graph.

        Raises:
            RTRLError: see ``step``, which checks the same.

        Cost:
            One forward pass without a graph.
        """
        self._check_intact()
        self._check_parameters()
        named, number = self._guard.named, self._steps_taken
        if replay is not None:
            forward_step.check_replay(replay, self._takes_replay, self._state, named)
        first = number == 0
        _, y, _ = forward_step.take(self._stepping, x, self._state, replay, number, first, named, self._keeps_x)
        if not (deferred.on_host(self._state) or checks.all_finite(pytrees.tensors((x, y)))):
            raise NonFiniteError(f"NaN or infinity in x or y, one step ahead of step {number - 1}")
        return pytrees.map_tensors(torch.detach, y)

    def _pull_losses(self, cotangents: Sequence[Tensor], per_sample: bool) -> dict[str, Tensor]:
        """Pull cotangents of the newest step's y back to the parameters.

        Args:
            cotangents: for each tensor of y, R of them (R, *y.shape), of a complex one as pairs.
            per_sample: R = L·B, and number ``l·B + b`` is zero but for sample b.

        Returns:
            Name → (R, *shape), of a complex parameter as pairs.
        """
        raise ConfigError(
            f"{type(self).__name__} does not give the gradients of losses apart; use BlockRTRL, or backward() and "
            "sync() with one loss"
        )
