"""What surrounds a step: contexts that would change what the cell computes when the step is run again."""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from rtrl._engine.parameter_hooks import hooks_suspended
from rtrl._utils.undo import CHANGES
from rtrl.errors import CellError, ConfigError

any_autocast = torch._C._is_any_autocast_enabled


def check_surroundings() -> None:
    """Refuse to work under autocast, or under ``torch.nn.utils.parametrize.cached``.

    Raises:
        ConfigError: one of them is in force.
    """
    if any_autocast():
        raise ConfigError(
            "a learner does not work under torch.autocast, because its gradients would be those of other roundings; "
            "leave the context for it, and convert the cell as a whole, for example by cell.bfloat16(), if it is to "
            "compute in fewer bits"
        )
    if parametrize._cache_enabled:
        raise ConfigError(
            "a learner does not work under torch.nn.utils.parametrize.cached(), which would keep weights without their "
            "graph; leave the context for it"
        )


def linearizing(parameters: Iterable[Tensor]) -> AbstractContextManager[None]:
    """A context without hooks on these parameters, in which what ``torch.compile`` compiled runs as it was written.

    Raises:
        ConfigError: see ``check_surroundings``.
    """
    check_surroundings()
    hooked = [parameter for parameter in parameters if parameter._backward_hooks]
    compiled = "torch._dynamo" in sys.modules  # else nothing can have been compiled
    return _linearizing(hooked, compiled) if hooked or compiled else _NOTHING


_NOTHING = nullcontext()


@contextmanager
def _linearizing(hooked: list[Tensor], compiled: bool) -> Iterator[None]:
    with hooks_suspended(hooked), torch.compiler.set_stance("force_eager") if compiled else _NOTHING:
        yield


function_modes = torch._C._len_torch_function_stack


def switch_back(grad: bool, modes: int, number: int) -> None:
    """Switch back what an error left switched that struck as a context was being left.

    Args:
        grad: whether gradients were enabled.
        modes: what ``function_modes`` returned.
        number: of the changes noted by then, see ``CHANGES``.
    """
    while function_modes() > modes:
        torch._C._pop_torch_function_stack()
    CHANGES.put_back(number)
    torch._C._set_grad_enabled(grad)


class RefuseUnsupported(TorchFunctionMode):
    """Refuses what a cell may not do in its forward: autocast, and embeddings whose gradient is sparse or depends on
    the other samples.

    Raises:
        CellError: the cell does it.
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any_autocast():
            raise CellError(
                "the cell uses torch.autocast, and run again in other batches it would round differently; remove it, "
                "and convert the cell as a whole, for example by cell.bfloat16()"
            )
        if func in (F.embedding, F.embedding_bag):
            given = inspect.signature(func).bind(*args, **kwargs).arguments
            for option in ("sparse", "scale_grad_by_freq"):
                if given.get(option):
                    raise CellError(
                        f"the cell calls {func.__name__} with {option}=True; only dense gradients that do not depend "
                        f"on other samples are exact, so pass {option}=False"
                    )
        return func(*args, **kwargs)
