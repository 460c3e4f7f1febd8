"""A call with other values leaves the module as it was, whatever the module stores meanwhile."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rtrl._utils.functional_call import functional_call

F64 = torch.float64


class Storing(nn.Module):
    """Computes y = 2 w x, and stores tensors on the way: in place of an attribute, of a buffer, and as a new one."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(3.0, dtype=F64))
        self.twice = torch.zeros((), dtype=F64)
        self.register_buffer("last", torch.zeros((), dtype=F64))
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        self.twice = 2 * self.w
        self.last = self.twice * x
        self.new = self.twice + 1
        if self.fails:
            raise ValueError("not today")
        return self.last


def held(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in [*vars(module).items(), *module._buffers.items()] if name != "_buffers"}


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_module_stores_is_put_back(fails: bool) -> None:
    module, x = nn.Sequential(Storing()), torch.tensor(5.0, dtype=F64)
    inner = module[0]
    inner.fails = fails
    before, w = held(inner), torch.tensor(7.0, dtype=F64, requires_grad=True)
    if fails:
        with pytest.raises(ValueError, match="not today"):
            functional_call(module, {"0.w": w}, (x,))
    else:
        y = functional_call(module, {"0.w": w}, (x,))
        assert y.item() == 70.0 and torch.autograd.grad(y, w)[0].item() == 10.0
    after = held(inner)
    assert after.keys() == before.keys()
    assert all(after[name] is value for name, value in before.items())
    assert inner.w.item() == 3.0
