"""Write a cell of your own: a memory of slots, of which a step reads and writes one.

The cell says which slot that is (``rtrl.Sparsity``), so that the influence of all other slots stays untouched. Before
training, ``check_cell`` looks for a promise that the cell breaks.

    python examples/own_cell.py
"""

import torch
from torch import Tensor, nn

import rtrl
from rtrl.testing import check_cell


class SlotMemory(nn.Module):
    """h'[k] = tanh(W x + U h[k]) for the slot k that x names; all other slots are copied."""

    def __init__(self, d_in: int, d_out: int, n_slots: int, slot_size: int) -> None:
        super().__init__()
        self.n_slots, self.slot_size = n_slots, slot_size
        self.enter = nn.Linear(d_in, slot_size)
        self.recur = nn.Linear(slot_size, slot_size, bias=False)
        self.readout = nn.Linear(slot_size, d_out)

    def init_state(self, batch_size: int) -> Tensor:
        return self.enter.weight.new_zeros(batch_size, self.n_slots, self.slot_size)

    def forward(self, x: dict[str, Tensor], h: Tensor) -> tuple[Tensor, Tensor, rtrl.Sparsity]:
        slot = x["slot"][:, None]  # (B, 1): the index of the slot, for each sample its own
        index = slot[..., None].expand(-1, -1, self.slot_size)
        before = h.gather(1, index).squeeze(1)
        after = torch.tanh(self.enter(x["input"]) + self.recur(before))
        h_next = h.scatter(1, index, after[:, None])
        return self.readout(after), h_next, rtrl.Sparsity(reads=slot, writes=slot)


def draw(batch_size: int, n_slots: int) -> dict[str, Tensor]:
    """The x of one step: numbers, and the slot that they belong to."""
    return {"input": torch.randn(batch_size, 2), "slot": torch.randint(n_slots, (batch_size,))}


def main() -> None:
    torch.manual_seed(0)
    batch_size, n_slots = 8, 6
    cell = SlotMemory(d_in=2, d_out=1, n_slots=n_slots, slot_size=8)
    print(check_cell(cell, [draw(batch_size, n_slots) for _ in range(3)]))

    learner = rtrl.BlockRTRL(cell, batch_size=batch_size, block=8)
    optimizer = torch.optim.Adam(cell.parameters(), lr=1e-2)
    sums = torch.zeros(batch_size, n_slots)  # what the cell is to learn: a decaying sum for each slot
    samples = torch.arange(batch_size)
    losses = []
    for step in range(1, 801):
        x = draw(batch_size, n_slots)
        sums[samples, x["slot"]] = 0.5 * sums[samples, x["slot"]] + 0.3 * x["input"].sum(dim=1)
        y = learner.step(x)
        loss = (y.squeeze(1) - sums[samples, x["slot"]]).square().mean()
        learner.backward(loss)
        losses.append(loss.item())
        if learner.at_block_end:
            learner.sync()
            optimizer.step()
            optimizer.zero_grad()
        if step % 200 == 0:
            print(f"step {step}: squared error {sum(losses[-200:]) / 200:.4f}")


if __name__ == "__main__":
    main()
