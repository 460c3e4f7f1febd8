"""Remember a symbol for longer than truncated BPTT can see.

The cell reads a key and a symbol, then noise made of the same symbols, and is asked for the symbol at the end. Between
symbol and question stand more steps than the horizon of truncated BPTT, which therefore gets no gradient from the
answer to the symbol and stays at chance. Real-time recurrent learning has no horizon.

    python examples/long_haystack.py --gap 18 --horizon 12
"""

import argparse

import torch
from torch import nn

import rtrl
from rtrl import tasks, training


def make_cell(task: tasks.Task, hidden: int) -> nn.Module:
    """A GRU whose update gate begins nearly closed, so that it keeps its state at first."""
    torch.manual_seed(0)
    gru, readout = nn.GRUCell(task.d_in, hidden), nn.Linear(hidden, task.d_out)
    with torch.no_grad():
        gru.bias_ih[hidden : 2 * hidden] = 3.0
    return rtrl.from_torch(gru, readout)


def main() -> None:
    parser = argparse.ArgumentParser(description="BlockRTRL beside truncated BPTT on a long haystack.")
    parser.add_argument("--gap", type=int, default=18, help="noise symbols between the symbol and the question")
    parser.add_argument("--horizon", type=int, default=12, help="steps that truncated BPTT sees; also the block")
    parser.add_argument("--steps", type=int, default=3000, help="steps of the stream to train on")
    options = parser.parse_args()

    task = tasks.make("haystack", values=2, gap=options.gap)
    learners = {
        "BlockRTRL": training.make_learner("block", block=options.horizon),
        "truncated BPTT": training.make_learner("tbptt", k=options.horizon, sliding=True),
    }
    for name, make_learner in learners.items():
        cell = make_cell(task, hidden=4)
        curve = training.train(
            cell,
            task,
            learner=make_learner,
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.03),
            batch_size=64,
            steps=options.steps,
            every=options.horizon,
            clip=1.0,
        )
        accuracy = training.evaluate(cell, task, batch_size=64, steps=400)
        held = curve.last.bytes_held
        print(f"{name:>14}: {accuracy:4.0%} of held-out answers right (chance {task.chance:.0%}), {held:,} bytes held")


if __name__ == "__main__":
    main()
