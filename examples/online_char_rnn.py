"""Train a GRU on a text, one byte at a time, with exact gradients and an update every few steps.

    python examples/online_char_rnn.py --steps 2000
    python examples/online_char_rnn.py --path some.txt --hidden 128 --steps 100000

The memory of the learner does not depend on how long the text is.
"""

import argparse
import math
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import rtrl

BYTES = 256


def main() -> None:
    parser = argparse.ArgumentParser(description="A character model, trained online by BlockRTRL.")
    parser.add_argument("--path", type=Path, default=Path(torch.nn.functional.__file__), help="the text")
    parser.add_argument("--hidden", type=int, default=32, help="units of the GRU")
    parser.add_argument("--block", type=int, default=32, help="steps between two updates")
    parser.add_argument("--steps", type=int, default=2000, help="bytes to read")
    options = parser.parse_args()

    torch.manual_seed(0)
    text = torch.tensor(list(options.path.read_bytes()[: options.steps + 1]))
    cell = rtrl.from_torch(nn.GRUCell(BYTES, options.hidden), nn.Linear(options.hidden, BYTES))
    learner = rtrl.BlockRTRL(cell, batch_size=1, block=options.block)
    optimizer = torch.optim.Adam(cell.parameters(), lr=3e-3)

    bits, report_every = 0.0, max(options.steps // 5, 1)
    for step, (byte, following) in enumerate(pairwise(text), 1):
        logits = learner.step(F.one_hot(byte, BYTES).float()[None])
        loss = F.cross_entropy(logits, following[None])
        learner.backward(loss)
        bits += loss.item() / math.log(2)
        if learner.at_block_end:
            learner.sync()
            optimizer.step()
            optimizer.zero_grad()
        if step % report_every == 0:
            held = sum(learner.retained_bytes().values())
            print(f"step {step:>7,}: {bits / report_every:.2f} bits per byte, {held:,} bytes held")
            bits = 0.0


if __name__ == "__main__":
    main()
