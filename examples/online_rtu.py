"""Predict a signal online with a recurrent trace unit: an update after every step, no batch, no truncated gradient.

    python examples/online_rtu.py --steps 20000
    python examples/online_rtu.py --steps 20000 --memoryless

The signal is a sum of three waves, which no single value of it predicts. The units are those of Elelimy et al. (2024).
"""

import argparse
import math

import torch
from torch import nn

import rtrl


def main() -> None:
    parser = argparse.ArgumentParser(description="Online prediction by a recurrent trace unit.")
    parser.add_argument("--hidden", type=int, default=16, help="pairs of the unit")
    parser.add_argument("--memoryless", action="store_true", help="forget the state after every step")
    parser.add_argument("--steps", type=int, default=20000, help="values to predict")
    options = parser.parse_args()

    torch.manual_seed(0)
    cell = rtrl.Stack([rtrl.cells.RTU(1, options.hidden), nn.Linear(2 * options.hidden, 1)])
    learner = rtrl.BlockRTRL(cell, batch_size=1)
    optimizer = torch.optim.Adam(cell.parameters(), lr=1e-3)

    value, error, report_every = torch.zeros(1, 1), 0.0, max(options.steps // 5, 1)
    for step in range(1, options.steps + 1):
        following = torch.tensor([[sum(math.sin(step * speed) for speed in (0.1, 0.37, 0.9)) / 3]])
        loss = (learner.step(value) - following).square().sum()
        learner.backward(loss)
        learner.sync()
        optimizer.step()
        optimizer.zero_grad()
        if options.memoryless:
            learner.reset()
        value, error = following, error + loss.item()
        if step % report_every == 0:
            print(f"step {step:>7,}: mean squared error {error / report_every:.5f}")
            error = 0.0


if __name__ == "__main__":
    main()
