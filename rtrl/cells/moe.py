"""A recurrent mixture of experts that reads and writes few slots; ``docs/theory/recurrent-moe.md`` defines it."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtrl._utils import validation
from rtrl.cells.grouped_linear import grouped_linear
from rtrl.cells.protocol import Sparsity, check_indices, under_vmap
from rtrl.cells.routing import MoEOutput, top
from rtrl.cells.row_groups import rows_of
from rtrl.cells.slot_recurrence import SlotRecurrence
from rtrl.errors import ConfigError, ShapeError, SparsityError

_EXPERT_SLICED = ("expert_up", "expert_up_bias", "expert_down", "expert_down_bias")


def _rms(v: Tensor) -> Tensor:
    return v * torch.rsqrt(v.square().mean(dim=-1, keepdim=True) + 1e-6)


class RecurrentMoE(nn.Module):
    """Build a recurrent mixture of experts: each sample reads and writes few slots of its state and uses few experts.

    Equation:
        Read → mixed attention → feed-forward → routed experts → gated write → output head; see
        ``docs/theory/recurrent-moe.md``.

    Args:
        d_in: width of the input.
        d_out: width of the output.
        d_model: width of a slot, divisible by ``n_heads``.
        n_slots: rows of the state (B, n_slots, d_model).
        n_experts: how many experts there are.
        topk: how many experts each sample uses per step.
        n_heads: attention heads.
        read_slots: how many slots each sample reads per step.
        write_slots: how many of the slots read each sample writes.
        expert_hidden: hidden width of an expert; ``2 · d_model`` by default.
        ffn_hidden: hidden width of the feed-forward layer; ``2 · d_model`` by default.
        router_output: return ``MoEOutput(output, router_logits, experts)`` as y, so that a loss may balance the
            experts. Every row of the router is then active at every step.
        independent_slots: each slot's next contents depend on its own contents and x alone, and each slot has its own
            gate and its own ``n_experts / n_slots`` experts, of which ``topk`` are used per written slot. ``n_heads``
            is that of the readout; there is no feed-forward layer.
        generator: source of the initial weights; the same generator state gives the same weights on the same device.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ConfigError: a size is not a positive integer, or exceeds the number that it selects from.

    Cost:
        Per sample and step, about ``r·d·(4·d + 2·ffn) + n·2·d² + topk·r·2·d·expert_hidden + 3·d²`` multiply-adds, r =
        read_slots.

    Source:
        The sparse reads follow "softmax over the selected only" (Shazeer et al. 2017, "Outrageously Large Neural
        Networks", eq. 3–5).

    Example:
        >>> import torch
        >>> cell = RecurrentMoE(3, 2, d_model=8, n_slots=4, n_experts=4, topk=2)
        >>> y, h, sparsity = cell(torch.ones(5, 3), cell.init_state(5))
        >>> y.shape, h.shape, sparsity.writes.shape
        (torch.Size([5, 2]), torch.Size([5, 4, 8]), torch.Size([5, 2]))
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        d_model: int,
        n_slots: int,
        n_experts: int,
        topk: int,
        n_heads: int = 2,
        read_slots: int = 2,
        write_slots: int = 2,
        expert_hidden: int | None = None,
        ffn_hidden: int | None = None,
        *,
        router_output: bool = False,
        independent_slots: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        expert_hidden = 2 * d_model if expert_hidden is None else expert_hidden
        ffn_hidden = 2 * d_model if ffn_hidden is None else ffn_hidden
        names = "d_in d_out d_model n_slots n_experts topk n_heads read_slots write_slots expert_hidden ffn_hidden"
        sizes = (d_in, d_out, d_model, n_slots, n_experts, topk, n_heads, read_slots, write_slots)
        for name, size in zip(names.split(), (*sizes, expert_hidden, ffn_hidden), strict=True):
            validation.integer(name, size)
        if topk > n_experts:
            raise ConfigError(f"topk ({topk}) cannot exceed n_experts ({n_experts})")
        if not write_slots <= read_slots <= n_slots:
            raise ConfigError(
                f"need write_slots ≤ read_slots ≤ n_slots, got {write_slots}, {read_slots}, {n_slots}: only slots "
                "read are written"
            )
        if d_model % n_heads:
            raise ConfigError(f"d_model ({d_model}) must be divisible by n_heads ({n_heads})")

        self.d_in, self.d_out, self.d_model, self.n_slots = d_in, d_out, d_model, n_slots
        self.n_experts, self.topk, self.n_heads = n_experts, topk, n_heads
        self.read_slots, self.write_slots = read_slots, write_slots
        self.router_output, self.independent_slots = router_output, independent_slots
        if independent_slots and (n_experts % n_slots or topk > n_experts // n_slots):
            raise ConfigError(
                f"independent slots have their own experts: n_experts ({n_experts}) must be a multiple of n_slots "
                f"({n_slots}), and topk ({topk}) at most n_experts / n_slots"
            )

        def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        def stacked(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.embed = linear(d_in, d_model, bias=True)
        self.slot_embedding = stacked(n_slots, d_model)
        if independent_slots:
            self.slots = SlotRecurrence(d_in, d_model, n_slots, n_experts, expert_hidden, device, dtype)
        else:
            self.read_query = linear(d_model, d_model)
            self.query, self.key, self.value, self.mix = (linear(d_model, d_model) for _ in range(4))
            self.up, self.down = linear(d_model, ffn_hidden, bias=True), linear(ffn_hidden, d_model, bias=True)
            self.router = linear(d_model, n_experts)
            self.expert_up = stacked(n_experts, expert_hidden, d_model)
            self.expert_up_bias = stacked(n_experts, expert_hidden)
            self.expert_down = stacked(n_experts, d_model, expert_hidden)
            self.expert_down_bias = stacked(n_experts, d_model)
            self.write_score = linear(d_model, 1)
            self.candidate, self.gate = linear(d_model, d_model, bias=True), linear(d_model, d_model, bias=True)
        self.out_query, self.out_key, self.out_value, self.out_mix = (linear(d_model, d_model) for _ in range(4))
        self.head = linear(d_model, d_out, bias=True)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights: normal with variance 1 / fan-in; biases are zero.

        The variance of the candidate is a quarter of that; slot embeddings have a standard deviation of 1/2.

        Args:
            generator: source of the random numbers; PyTorch's global one by default.
        """
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
                else:
                    std = 0.5 if name == "slot_embedding" else 1 / math.sqrt(parameter.shape[-1])
                    if name == "candidate.weight":
                        std /= 2  # keeps products of Jacobians from growing over hundreds of steps
                    parameter.normal_(0.0, std, generator=generator)

    def init_state(self, batch_size: int) -> Tensor:
        """Return the first state, zeros (batch_size, n_slots, d_model).

        Raises:
            ConfigError: ``batch_size`` is not a positive integer.
        """
        validation.integer("batch_size", batch_size)
        return self.slot_embedding.new_zeros(batch_size, self.n_slots, self.d_model)

    def row_groups(self) -> list[Tensor] | None:
        """Return the slots as independent rows, if they are; see ``rtrl.cells.row_groups``."""
        return rows_of(self.n_slots, self.d_model) if self.independent_slots else None

    def choices(self, reads: Tensor, writes: Tensor, experts: Tensor) -> Sparsity:
        """Build the ``Sparsity`` of a step that makes these choices; passed as ``replay``, it forces them.

        Args:
            reads: LongTensor (B, r), r ≥ 1: the slots read.
            writes: LongTensor (B, w): the slots written, each of them also in ``reads``.
            experts: LongTensor (B, k), k ≥ 1: the experts used; with independent slots those of each written slot, slot
                by slot, equally many.
        """
        if self.independent_slots:
            used = self.slots.active(writes, experts, self.router_output)
            active = {f"slots.{name}": index for name, index in used.items()}
            return Sparsity(reads=reads, writes=writes, active={**active, "slot_embedding": reads})
        active = dict.fromkeys(_EXPERT_SLICED, experts)
        if not self.router_output:
            active["router.weight"] = experts
        return Sparsity(reads=reads, writes=writes, active={**active, "slot_embedding": reads})

    def forward(
        self, x: Tensor, h: Tensor, replay: Sparsity | None = None
    ) -> tuple[Tensor | MoEOutput, Tensor, Sparsity]:
        """Take one step.

        Args:
            x: (B, d_in), or (B, n, d_in) for n inputs at once.
            h: (B, n_slots, d_model).
            replay: the choices to make, see ``choices``; the cell's own by default.

        Returns:
            ``(y, h_next, Sparsity)`` with y (B, d_out), or ``MoEOutput``.

        Raises:
            ShapeError: x or h has another shape, dtype or device.
            SparsityError: a replayed choice is malformed, or writes a slot that is not read.
        """
        tokens = self._tokens(x, h)
        if self.independent_slots:
            return self._independent(tokens.mean(dim=1), h, replay)
        u = self.embed(tokens)

        query = self.read_query(u.mean(dim=1))
        if replay is not None:
            reads, writes, experts = self._replayed(replay, h)
        else:
            with torch.no_grad():  # a choice has no gradient
                reads = top(torch.einsum("bd,bnd->bn", query, h + self.slot_embedding), self.read_slots)
        old = _rows(h, reads)
        labels = F.embedding(reads, self.slot_embedding)
        labelled = old + labels
        scores = torch.einsum("bd,brd->br", query, labelled) / math.sqrt(self.d_model)
        z = reads.shape[1] * scores.softmax(dim=-1).unsqueeze(-1) * labelled

        a = _rms(z)
        context = torch.cat([a, _rms(u)], dim=1)
        z = z + self.mix(self._attend(self.query(a), self.key(context), self.value(context)))
        z = z + self.down(F.silu(self.up(_rms(z))))

        logits = self.router(_rms(z.mean(dim=1)))
        if replay is None:
            experts = top(logits, self.topk)
        share = logits.gather(1, experts).softmax(dim=-1)
        hidden = F.silu(grouped_linear(_rms(z).unsqueeze(1), self.expert_up, self.expert_up_bias, experts))
        mixture = grouped_linear(hidden, self.expert_down, self.expert_down_bias, experts)
        z = z + (share[:, :, None, None] * mixture).sum(dim=1)

        normed = _rms(z)
        write_scores = self.write_score(normed)
        if replay is not None:
            place = (reads.unsqueeze(1) == writes.unsqueeze(2)).int().argmax(dim=2)
        else:
            place = top(write_scores.squeeze(-1), self.write_slots)
            writes = reads.gather(1, place)
        source = _rows(normed, place)
        gate = torch.sigmoid(self.gate(source) + _rows(write_scores, place))
        before = _rows(old, place)
        written = before + gate * (torch.tanh(self.candidate(source)) - before)
        h_next = h.scatter(1, writes.unsqueeze(-1).expand_as(written), written)

        memory = old.scatter(1, place.unsqueeze(-1).expand_as(written), written) + labels
        output = self._read_out(z.mean(dim=1, keepdim=True), memory)
        y = MoEOutput(output, logits, experts) if self.router_output else output
        return y, h_next, self.choices(reads, writes, experts)

    def _independent(
        self, x: Tensor, h: Tensor, replay: Sparsity | None
    ) -> tuple[Tensor | MoEOutput, Tensor, Sparsity]:
        """Take one step with independent slots, x (B, d_in)."""
        u = self.embed(x)
        if replay is not None:
            reads, writes, experts = self._replayed(replay, h)
        else:
            with torch.no_grad():
                reads = top(torch.einsum("bd,bnd->bn", u, h + self.slot_embedding), self.read_slots)
            writes = self.slots.choose_writes(x, reads, self.write_slots)
            experts = self.slots.choose_experts(x, writes, self.topk)
        written = self.slots(x, _rows(h, writes), writes, experts)
        h_next = h.scatter(1, writes.unsqueeze(-1).expand_as(written), written)
        memory = _rows(h_next, reads) + F.embedding(reads, self.slot_embedding)
        output = self._read_out(u.unsqueeze(1), memory)
        y = MoEOutput(output, self.slots.logits(x), experts) if self.router_output else output
        return y, h_next, self.choices(reads, writes, experts)

    def _read_out(self, pooled: Tensor, memory: Tensor) -> Tensor:
        """The output for a query (B, 1, d) and the labelled slots read (B, r, d)."""
        memory = _rms(memory)
        read_out = self._attend(self.out_query(_rms(pooled)), self.out_key(memory), self.out_value(memory))
        output: Tensor = self.head(_rms(pooled + self.out_mix(read_out)).squeeze(1))
        return output

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in (query, key, value))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        heads: Tensor = weights @ v
        return heads.transpose(1, 2).flatten(-2)

    def _tokens(self, x: Tensor, h: Tensor) -> Tensor:
        for what, tensor in (("x", x), ("h", h)):
            if not isinstance(tensor, Tensor):
                raise ShapeError(f"{what} must be a tensor, got {type(tensor).__name__}")
        if x.ndim not in (2, 3) or x.shape[-1] != self.d_in or 0 in x.shape:
            raise ShapeError(
                f"x must have shape (B, {self.d_in}) or (B, n, {self.d_in}) with n ≥ 1, got {tuple(x.shape)}"
            )
        if tuple(h.shape) != (x.shape[0], self.n_slots, self.d_model):
            raise ShapeError(f"h must have shape {(x.shape[0], self.n_slots, self.d_model)}, got {tuple(h.shape)}")
        for what, tensor in (("x", x), ("h", h)):
            if tensor.dtype != self.slot_embedding.dtype or tensor.device != self.slot_embedding.device:
                raise ShapeError(
                    f"{what} is {tensor.dtype} on {tensor.device}, the parameters are {self.slot_embedding.dtype} "
                    f"on {self.slot_embedding.device}; convert {what}"
                )
        return x.unsqueeze(1) if x.ndim == 2 else x

    def _replayed(self, replay: Sparsity, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The choices of ``replay``: reads, writes, experts."""
        if not isinstance(replay, Sparsity):
            raise SparsityError(f"replay must be rtrl.Sparsity, got {type(replay).__name__}")
        reads, writes, experts = replay.reads, replay.writes, replay.active.get(self._routed)
        if reads is None or writes is None or experts is None:
            raise SparsityError(
                f"replay must have reads, writes and active[{self._routed!r}]; build it with cell.choices(...)"
            )
        if isinstance(reads, Tensor) and under_vmap(reads):
            return reads, writes, experts  # their values cannot be checked here; the caller has done so
        for what, index in (("reads", reads), ("writes", writes), ("experts", experts)):
            size = self.n_experts if what == "experts" else self.n_slots
            check_indices(f"replay: {what}", index, h.shape[0], size, h.device)
        if reads.shape[-1] == 0 or experts.shape[-1] == 0:
            raise SparsityError("replay must read at least one slot and use at least one expert")
        if not bool((writes.unsqueeze(2) == reads.unsqueeze(1)).any(dim=2).all()):
            raise SparsityError("replay writes a slot that it does not read; only slots read are written")
        if self.independent_slots and not self.slots.owned(writes, experts):
            raise SparsityError(
                "replay must use equally many experts of each written slot, slot by slot; expert e belongs to slot "
                f"e // {self.slots.bank}"
            )
        return reads, writes, experts

    @property
    def _routed(self) -> str:
        """A parameter whose active slices are the experts used."""
        return "slots.expert_up" if self.independent_slots else "expert_up"

    def extra_repr(self) -> str:
        return (
            f"d_in={self.d_in}, d_out={self.d_out}, d_model={self.d_model}, n_slots={self.n_slots}, "
            f"n_experts={self.n_experts}, topk={self.topk}, n_heads={self.n_heads}, read_slots={self.read_slots}, "
            f"write_slots={self.write_slots}" + (", independent_slots=True" if self.independent_slots else "")
        )


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """``out[b, j] = values[b, index[b, j]]``."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
