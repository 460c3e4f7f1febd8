"""Small cells such as users bring, and for each what a learner must make of it: it is exact, or refused by name.

Each takes x (B, 3) and a state (B, 4) in float64, and returns the new state as y too.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import rtrl
from rtrl.errors import AuditError, CellError, ConfigError, RTRLError

D_IN, H, F64 = 3, 4, torch.float64
Step = Callable[[Any, Tensor, Tensor], Tensor]


class UserCell(nn.Module):
    """``h' = step(cell, x, h)``, with linear maps ``enter``, ``recur``, parameters p (4,), q (4, 4), and more parts."""

    def __init__(self, step: Step, **parts: Any) -> None:
        super().__init__()
        self.step = step
        self.enter, self.recur = nn.Linear(D_IN, H), nn.Linear(H, H)
        self.p, self.q = nn.Parameter(torch.rand(H)), nn.Parameter(0.5 * torch.randn(H, H))
        for name, part in parts.items():
            setattr(self, name, part)
        self.double()

    def init_state(self, batch_size: int) -> Tensor:
        """Return zeros."""
        return self.enter.weight.detach().new_zeros(batch_size, H)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step."""
        h = self.step(self, x, h)
        return h, h


class Case(NamedTuple):
    """A cell and what becomes of it.

    Attributes:
        make: builds the cell.
        error: None if the cell is exact; else the type of error.
        match: a pattern of the error's message.
    """

    make: Callable[[], nn.Module]
    error: type[RTRLError] | None = None
    match: str = ""


def with_more(change: Callable[[Any], None], step: Step) -> Callable[[], nn.Module]:
    """A maker of a ``UserCell`` that is changed once it is made."""

    def make() -> nn.Module:
        cell = UserCell(step)
        change(cell)
        return cell

    return make


def of(step: Step, **parts: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A maker of a ``UserCell`` with parts that are made anew for each."""
    return lambda: UserCell(step, **{name: part() for name, part in parts.items()})


def tanh_of(change: Callable[[Any, Tensor], Tensor]) -> Step:
    """``h' = tanh(enter(x) + change(cell, h))``."""
    return lambda c, x, h: torch.tanh(c.enter(x) + change(c, h))


# ---------------------------------------------------------------------- parameters under other names


def _in_a_closure(c: Any) -> None:
    p, q = c.p, c.q
    c.step = lambda c, x, h: torch.tanh(c.enter(x) + p * (h @ q))


@dataclasses.dataclass
class Held:
    """A plain object that holds tensors."""

    gain: Tensor
    matrix: Tensor


class Computed(UserCell):
    """Its weight is a property."""

    @property
    def weight(self) -> Tensor:
        """A symmetric matrix."""
        return self.q + self.q.T


def _partial(c: Any) -> None:
    c.map = functools.partial(F.linear, weight=c.q, bias=c.p)


def _forward_of_its_own(c: Any) -> None:
    plain = c.recur.forward
    c.recur.forward = lambda value: plain(value) * c.p


def _view(c: Any) -> None:
    c.transposed = c.q.t()


def _cached(c: Any, x: Tensor, h: Tensor) -> Tensor:
    if not hasattr(c, "cache"):
        c.cache = c.q.exp()
    return torch.tanh(c.enter(x) + h @ c.cache)


# ---------------------------------------------------------------------- gradients inside a forward


def _leaf(h: Tensor) -> Tensor:
    return h if h.requires_grad else h.detach().requires_grad_()


def _energy(c: Any, z: Tensor) -> Tensor:
    return 0.5 * (c.recur(z).tanh() ** 2).sum() + (c.p * z**2).sum() / 4


def _descends(c: Any, x: Tensor, h: Tensor) -> Tensor:
    with torch.enable_grad():
        z = _leaf(h)
        (slope,) = torch.autograd.grad(_energy(c, z), z, create_graph=True)
        return h + 0.3 * c.enter(x) - 0.5 * slope


def _descends_late(c: Any, x: Tensor, h: Tensor) -> Tensor:
    """The gradient goes through a linear map that was applied long before it is taken."""
    with torch.enable_grad():
        z = _leaf(h)
        below = c.recur(z)
        above = torch.tanh(c.enter(x) + below)
        (slope,) = torch.autograd.grad(above.square().sum(), z, create_graph=True)
        return above - 0.2 * slope


def _descends_by_backward(c: Any, x: Tensor, h: Tensor) -> Tensor:
    with torch.enable_grad():
        z = h.clone() if h.requires_grad else h.detach().requires_grad_()
        z.retain_grad()
        _energy(c, z).backward(inputs=[z], create_graph=True)
        return h + 0.3 * c.enter(x) - 0.5 * z.grad


def _constant_slope(c: Any, x: Tensor, h: Tensor) -> Tensor:
    with torch.enable_grad():
        z = h.detach().requires_grad_()
        (slope,) = torch.autograd.grad(_energy(c, z), z)
    return torch.tanh(c.enter(x) + c.recur(h)) - 0.5 * slope


def _by_func_grad(c: Any, x: Tensor, h: Tensor) -> Tensor:
    return h + 0.3 * c.enter(x) - 0.5 * torch.func.grad(lambda z: _energy(c, z))(h)


def _by_vmap(c: Any, x: Tensor, h: Tensor) -> Tensor:
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z: torch.tanh(c.recur(z))))(h)
    return torch.tanh(c.enter(x) + (jacobian @ h.unsqueeze(2)).squeeze(2))


def _by_hvp(c: Any, x: Tensor, h: Tensor) -> Tensor:
    with torch.enable_grad():
        _, product = torch.autograd.functional.hvp(lambda z: _energy(c, z), h, torch.ones_like(h), create_graph=True)
        return torch.tanh(c.enter(x) + product)


def _by_functional_call(c: Any, x: Tensor, h: Tensor) -> Tensor:
    weights = {"weight": c.recur.weight * c.p, "bias": c.recur.bias}
    return torch.tanh(c.enter(x) + torch.func.functional_call(c.recur, weights, (h,)))


def _tangent(c: Any, h: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(torch.tanh(c.recur(forward_ad.make_dual(h, h * h)))).tangent


def _fast_weights(c: Any, x: Tensor, h: Tensor) -> Tensor:
    """One step of descent on the weights themselves, which all samples share."""
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(F.linear(h, c.q).square().sum(), c.q, create_graph=True)
        return torch.tanh(c.enter(x) + F.linear(h, c.q - 0.1 * slope))


def _backward_into_parameters(c: Any, x: Tensor, h: Tensor) -> Tensor:
    with torch.enable_grad():
        c.recur(h).square().sum().backward()
    return torch.tanh(c.enter(x) + c.recur(h))


# ---------------------------------------------------------------------- PyTorch's cells, hooked and parametrized


def wrapped(
    change: Callable[[nn.Module], Any], module: Callable[[], Any] = lambda: nn.GRUCell(D_IN, H), *, first: bool = True
) -> Callable[[], nn.Module]:
    """A maker of ``from_torch(module)`` that is changed first, or once it is a cell."""

    def make() -> nn.Module:
        inner = module().double()
        if first:
            change(inner)
        cell = rtrl.from_torch(inner)
        if not first:
            change(inner)
        return cell.eval()

    return make


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, value: Tensor) -> Tensor:
        """Return twice the value."""
        return 2 * value


def _scaled_output(module: Any) -> None:
    module.register_forward_hook(lambda module, args, out: 0.5 * out)


def _shifted_input(module: Any) -> None:
    module.register_forward_pre_hook(lambda module, args: (args[0] + 1.0, *args[1:]))


def _older_weight_norm(module: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(module, "weight_hh")


def _random_mask(module: Any) -> None:
    prune.random_unstructured(module, "weight_hh", amount=0.5)


# ---------------------------------------------------------------------- functions of one's own


class OldProduct(torch.autograd.Function):
    """A product in the old style, without ``setup_context``."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor) -> Tensor:
        """Return the product."""
        ctx.save_for_backward(weight, value)
        return weight * value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return both derivatives."""
        weight, value = ctx.saved_tensors
        return (grad * value).sum(0), grad * weight


class NewProduct(torch.autograd.Function):
    """A product in the new style, for ``torch.func`` too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, value: Tensor) -> Tensor:
        """Return the product."""
        return weight * value

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep the factors."""
        ctx.save_for_backward(*inputs)

    backward = OldProduct.backward


class Reversed(torch.autograd.Function):
    """The identity, whose gradient changes sign."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        """Return a view."""
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Return the negative gradient."""
        return -grad


class Clamped(torch.autograd.Function):
    """The identity, whose gradient is clamped: not linear."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        """Return a view."""
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Return the clamped gradient."""
        return grad.clamp(-0.01, 0.01)


def scripted(thing: Any) -> Any:
    """Script a module or function: what it does with a parameter cannot be seen from Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(thing)


def _product(weight: Tensor, value: Tensor) -> Tensor:
    return weight * value


scripted_product = scripted(_product)


def _straight_through(c: Any, x: Tensor, h: Tensor) -> Tensor:
    soft = torch.sigmoid(c.recur(h))
    return torch.tanh(c.enter(x) + soft + (soft.round() - soft).detach())


def _partly_detached(c: Any, x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(c.enter(x) + h @ c.q + h @ c.q.detach().T + c.p.data * h)


def _edited_copy(c: Any, x: Tensor, h: Tensor) -> Tensor:
    weight = c.q.clone()
    weight[0] = 0.0
    weight[:, 1] = c.p
    return torch.tanh(c.enter(x) + h @ weight)


def _mostly_without_gradient(c: Any, x: Tensor, h: Tensor) -> Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(c.recur(h))
    return gate * h + (1 - gate) * torch.tanh(c.enter(x))


def _complex_inside(c: Any, x: Tensor, h: Tensor) -> Tensor:
    rotation = torch.view_as_complex(c.q[:, :2].reshape(2, 2, 2).contiguous())
    turned = torch.view_as_complex(h.reshape(-1, 2, 2)) @ rotation
    return torch.tanh(c.enter(x) + torch.view_as_real(turned).flatten(1))


class Anything(nn.Module):
    """A wrapper that passes on all it is given."""

    def __init__(self, name: str = "inner") -> None:
        super().__init__()
        self.name = name
        self.add_module(name, UserCell(tanh_of(lambda c, h: c.p * c.recur(h))))

    def init_state(self, batch_size: int) -> Tensor:
        """Return zeros."""
        return torch.zeros(batch_size, H, dtype=F64)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take one step."""
        return self.get_submodule(self.name)(*args, **kwargs)


def _lists_of_modules(c: Any) -> None:
    c.steps = [c.recur, c.enter]


def _observed(c: Any) -> None:
    c.recur.register_full_backward_hook(lambda module, grad_input, grad_output: None)


def _lazy() -> nn.Module:
    return UserCell(lambda c, x, h: torch.tanh(c.lazy(x) + c.recur(h)), lazy=nn.LazyLinear(H))


def _counted(c: Any, x: Tensor, h: Tensor) -> Tensor:
    tokens = torch.zeros(len(x), dtype=torch.int64)
    return torch.tanh(c.enter(x) + F.embedding(tokens, c.q, scale_grad_by_freq=True) + h)


def _lower_precision(c: Any, x: Tensor, h: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return torch.tanh(c.enter(x) + c.recur(h)).to(h.dtype)


def _clamps_by_hook(c: Any, x: Tensor, h: Tensor) -> Tensor:
    h = torch.tanh(c.enter(x) + c.recur(h))
    if h.requires_grad:
        h.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
    return h


HELD = {
    "in a list": with_more(lambda c: setattr(c, "all", [c.p, c.q]), tanh_of(lambda c, h: c.all[0] * (h @ c.all[1]))),
    "in a dict": with_more(lambda c: setattr(c, "all", {"p": c.p}), tanh_of(lambda c, h: c.all["p"] * c.recur(h))),
    "in a closure": with_more(_in_a_closure, tanh_of(lambda c, h: h)),
    "in a namespace": with_more(
        lambda c: setattr(c, "held", SimpleNamespace(q=c.q)), tanh_of(lambda c, h: F.linear(h, c.held.q))
    ),
    "in a dataclass": with_more(
        lambda c: setattr(c, "held", Held(c.p, c.q)), tanh_of(lambda c, h: c.held.gain * (h @ c.held.matrix.T))
    ),
    "in a partial": with_more(_partial, tanh_of(lambda c, h: c.map(h))),
    "modules in a list": with_more(
        _lists_of_modules, lambda c, x, h: torch.tanh(c.steps[1](x) + c.steps[0](h) + c.p * c.steps[0].weight[1])
    ),
    "a method put on an instance": with_more(_forward_of_its_own, tanh_of(lambda c, h: c.recur(h))),
}
EXACT: dict[str, Callable[[], nn.Module]] = {
    **HELD,
    "a property": lambda: Computed(tanh_of(lambda c, h: h @ c.weight)),
    "a view made at the beginning": with_more(_view, tanh_of(lambda c, h: h @ c.transposed)),
    "stacked": of(tanh_of(lambda c, h: torch.stack([c.p, c.p**2]).sum(0) * (h @ torch.cat([c.q[:2], c.q[2:]])))),
    "iterated": of(tanh_of(lambda c, h: h * sum(row for row in c.q) + c.q[[0, 1, 1]].sum())),
    "an edited copy": of(_edited_copy),
    "partly detached": of(_partly_detached),
    "a matrix exponential": of(tanh_of(lambda c, h: h @ torch.linalg.matrix_exp(c.q - c.q.T))),
    "complex inside": of(_complex_inside),
    "an inner gradient": of(_descends),
    "an inner gradient, late": of(_descends_late),
    "an inner gradient by backward": of(_descends_by_backward),
    "an inner gradient held fixed": of(_constant_slope),
    "an inner torch.func.grad": of(_by_func_grad),
    "an inner vmap of jacrev": of(_by_vmap),
    "an inner vmap over parts": of(
        tanh_of(lambda c, h: torch.func.vmap(c.small, in_dims=1, out_dims=1)(h.unflatten(1, (2, 2))).flatten(1)),
        small=lambda: nn.Linear(2, 2),
    ),
    "an inner product with a Hessian": of(_by_hvp),
    "an inner tangent": of(tanh_of(_tangent)),
    "an inner functional_call": of(_by_functional_call),
    "pruned, then a cell": wrapped(_random_mask),
    "a cell, then pruned": wrapped(_random_mask, first=False),
    "a pruned LSTM layer": wrapped(
        lambda m: prune.identity(m, "weight_hh_l0"), lambda: nn.LSTM(D_IN, 2, batch_first=True)
    ),
    "pruned layers": wrapped(
        lambda m: prune.identity(m[1], "weight_ih"), lambda: nn.ModuleList([nn.RNNCell(D_IN, 2), nn.GRUCell(2, 2)])
    ),
    "the older weight norm": wrapped(_older_weight_norm),
    "weight norm, then a cell": wrapped(lambda m: parametrizations.weight_norm(m, "weight_hh")),
    "a cell, then orthogonal": wrapped(lambda m: parametrizations.orthogonal(m, "weight_hh"), first=False),
    "spectral norm in eval": wrapped(
        lambda m: parametrizations.spectral_norm(m, "weight_hh"), lambda: nn.LSTMCell(D_IN, 2)
    ),
    "a parametrized bias": wrapped(lambda m: parametrize.register_parametrization(m, "bias_hh", Doubled())),
    "an output hook": wrapped(_scaled_output),
    "an input hook": wrapped(_shifted_input, first=False),
    "observed by a backward hook": with_more(_observed, tanh_of(lambda c, h: c.recur(h))),
    "a function in the old style": of(tanh_of(lambda c, h: OldProduct.apply(c.p, c.recur(h)))),
    "a function in the new style": of(tanh_of(lambda c, h: NewProduct.apply(c.p, c.recur(h)))),
    "a reversed gradient": of(tanh_of(lambda c, h: Reversed.apply(c.p * c.recur(h)))),
    "straight through": of(_straight_through),
    "a scripted function": of(tanh_of(lambda c, h: scripted_product(c.p, c.recur(h)))),
    "without gradient at places": of(_mostly_without_gradient),
    "a wrapper of any arguments": Anything,
    "a wrapper like torch.compile's": lambda: Anything("_orig_mod"),
}
REFUSED = {
    "a bare GRUCell": Case(lambda: nn.GRUCell(D_IN, H).double(), ConfigError, "wrap it by rtrl.cells.from_torch"),
    "a lazy parameter": Case(_lazy, ConfigError, "parameter 'lazy.weight' has no shape yet: run the cell once"),
    "a scripted module": Case(
        lambda: UserCell(tanh_of(lambda c, h: c.scripted(h)), scripted=scripted(nn.Linear(H, H))),
        ConfigError,
        "RecursiveScriptModule 'scripted' is a scripted module",
    ),
    "a sparse embedding": Case(
        of(tanh_of(lambda c, h: h), words=lambda: nn.Embedding(3, H, sparse=True)), ConfigError, "sparse=True"
    ),
    "an embedding that counts": Case(
        of(tanh_of(lambda c, h: h), words=lambda: nn.Embedding(3, H, scale_grad_by_freq=True)),
        ConfigError,
        "scale_grad_by_freq=True, so that the gradient of one sample depends on the others",
    ),
    "a function that counts": Case(of(_counted), CellError, "calls embedding with scale_grad_by_freq=True"),
    "autocast inside": Case(of(_lower_precision), CellError, "uses torch.autocast"),
    "a weight computed once": Case(
        of(_cached), CellError, "computes 'cache' from its parameters and keeps it for later"
    ),
    "a checkpoint of the older kind": Case(
        of(tanh_of(lambda c, h: checkpoint(c.recur, h, use_reentrant=True))), CellError, "checkpoints activations"
    ),
    "a clamped gradient": Case(of(lambda c, x, h: Clamped.apply(c.p * h) + c.enter(x)), AuditError, "is not linear"),
    "a gradient clamped by a hook": Case(of(_clamps_by_hook), AuditError, "is not linear"),
    "fast weights of all samples": Case(of(_fast_weights), CellError, "mixes samples"),
    "a backward pass into its parameters": Case(of(_backward_into_parameters), CellError, r"changes the \.grad"),
    "spectral norm in training": Case(
        lambda: wrapped(lambda m: parametrizations.spectral_norm(m, "weight_hh"))().train(),
        CellError,
        "changes a parameter or buffer of its own in place",
    ),
}
