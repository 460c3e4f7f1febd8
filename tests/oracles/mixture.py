"""The mixture cell once more, in batched tensor algebra: the loops of `oracles.moe` and this share no line."""

from __future__ import annotations

import torch
from cells import F64
from torch import Tensor, nn
from torch.nn.functional import silu

SQUARE = ["read_query", "query", "key", "value", "mix", "out_query", "out_key", "out_value", "out_mix"]


def draw_mixture(
    d_in: int, d: int, slots: int, experts: int, f: int, g: int, d_out: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Random parameters by name, large enough that every term of every equation matters."""
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (d, d) for name in SQUARE}
    for name, (rows, columns) in {
        "embed": (d, d_in), "up": (f, d), "down": (d, f), "candidate": (d, d), "gate": (d, d), "head": (d_out, d),
    }.items():  # fmt: skip
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    shapes |= {
        "slot_embedding": (slots, d), "router.weight": (experts, d), "write_score.weight": (1, d),
        "expert_up": (experts, g, d), "expert_up_bias": (experts, g),
        "expert_down": (experts, d, g), "expert_down_bias": (experts, d),
    }  # fmt: skip
    return {n: 0.6 * torch.randn(*shape, generator=generator, dtype=F64) for n, shape in shapes.items()}


def rms(v: Tensor) -> Tensor:
    return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def attend(query: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """query (B, q, d) over keys and values (B, k, d)."""
    q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (query, keys, values))
    weights = torch.softmax(q @ k.mT / float(k.shape[-1]) ** 0.5, -1)
    return (weights @ v).transpose(1, 2).flatten(2)


def rows(v: Tensor, index: Tensor) -> Tensor:
    return v.gather(1, index[..., None].expand(-1, -1, v.shape[-1]))


class Mixture(nn.Module):
    def __init__(self, parameters: dict[str, Tensor], heads: int, topk: int, read: int, write: int) -> None:
        super().__init__()
        self.p = nn.ParameterDict({name.replace(".", "__"): nn.Parameter(p) for name, p in parameters.items()})
        self.heads, self.topk, self.read, self.write = heads, topk, read, write
        self.chosen: tuple[Tensor, Tensor, Tensor] | None = None

    def init_state(self, batch_size: int) -> Tensor:
        slots, d = self.p["slot_embedding"].shape
        return torch.linspace(-1, 1, slots * d, dtype=F64).reshape(slots, d).repeat(batch_size, 1, 1)

    def linear(self, name: str, v: Tensor) -> Tensor:
        out: Tensor = v @ self.p[f"{name}__weight"].T
        return out + self.p[f"{name}__bias"] if f"{name}__bias" in self.p else out

    def forward(self, x: Tensor, h: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        tokens = x[:, None] if x.dim() == 2 else x
        u = self.linear("embed", tokens)
        named = h + self.p["slot_embedding"]
        s = (named @ self.linear("read_query", u.mean(1))[..., None])[..., 0] / h.shape[-1] ** 0.5
        reads = s.topk(self.read, 1).indices
        z = self.read * torch.softmax(s.gather(1, reads), 1)[..., None] * rows(named, reads)
        context = torch.cat([rms(z), rms(u)], 1)
        looked = attend(
            self.linear("query", rms(z)), self.linear("key", context), self.linear("value", context), self.heads
        )
        z = z + self.linear("mix", looked)
        z = z + self.linear("down", silu(self.linear("up", rms(z))))
        logits = self.linear("router", rms(z.mean(1)))
        best = logits.topk(self.topk, 1)
        up, up_bias = self.p["expert_up"][best.indices], self.p["expert_up_bias"][best.indices]
        down, down_bias = self.p["expert_down"][best.indices], self.p["expert_down_bias"][best.indices]
        hidden = silu(torch.einsum("bkgd,bjd->bjkg", up, rms(z)) + up_bias[:, None])
        each = torch.einsum("bkdg,bjkg->bjkd", down, hidden) + down_bias[:, None]
        z = z + (torch.softmax(best.values, 1)[:, None, :, None] * each).sum(2)
        omega = self.linear("write_score", rms(z))
        place = omega[..., 0].topk(self.write, 1).indices
        writes = reads.gather(1, place)
        gate = torch.sigmoid(self.linear("gate", rms(rows(z, place))) + rows(omega, place))
        old = rows(h, writes)
        new = old + gate * (torch.tanh(self.linear("candidate", rms(rows(z, place)))) - old)
        h_next = h.scatter(1, writes[..., None].expand_as(new), new)
        m = rms(rows(h_next + self.p["slot_embedding"], reads))
        middle = z.mean(1, keepdim=True)
        seen = attend(
            self.linear("out_query", rms(middle)), self.linear("out_key", m), self.linear("out_value", m), self.heads
        )
        y = self.linear("head", rms(middle + self.linear("out_mix", seen)))[:, 0]
        self.chosen = (reads, writes, best.indices)
        return (y, logits), h_next
