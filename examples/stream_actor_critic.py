"""Stream AC(λ): reinforcement learning with a memory, an update after every step, and no truncated gradient.

    python examples/stream_actor_critic.py --steps 50000
    python examples/stream_actor_critic.py --steps 50000 --memoryless
    python examples/stream_actor_critic.py --steps 150000 --task cartpole    (gymnasium's, its velocities hidden)

Elsayed, Vasan and Mahmood (2024), "Streaming Deep Reinforcement Learning Finally Works": eligibility traces, and steps
that cannot overshoot (ObGD). The gradients are those of the newest value and action, through all steps before.
"""

import argparse

import torch
from torch import nn

import rtrl

GAMMA, LAMBDA, ENTROPY, KAPPA = 0.99, 0.8, 0.01, {"value": 1.5, "policy": 2.0}


class TMaze:
    """A sign at the entrance says at which end of the junction, ten steps on, the prize is. Without memory: 50 %."""

    observations, actions, scale = 4, 3, 1.0  # actions: ahead, left, right

    def reset(self):
        self.place, self.time, self.side = 0, 0, int(torch.randint(1, 3, ()))
        return [float(self.side == 1), float(self.side == 2), 0.0, 0.0]

    def step(self, action):
        self.time, reward = self.time + 1, -0.02
        if self.place == 10 and action:
            return [0.0] * 4, 1.0 if action == self.side else -1.0, True
        self.place = min(self.place + (action == 0), 10)
        return [0.0, 0.0, 1.0, float(self.place == 10)], reward, self.time == 50


class CartPole:
    observations, actions, scale = 2, 2, 0.05

    def __init__(self):
        self.game = __import__("gymnasium").make("CartPole-v1")

    def reset(self):
        return self.look(self.game.reset(seed=int(torch.randint(2**31, ())))[0])

    def look(self, seen):
        return [float(seen[0]) / 2.4, float(seen[2]) / 0.2]

    def step(self, action):
        seen, reward, fallen, stopped, _ = self.game.step(action)
        return self.look(seen), reward, fallen or stopped


class Agent(rtrl.cells.MinGRU):
    def __init__(self, task, hidden=16):
        super().__init__(task.observations, hidden)
        self.gates.bias.data[:hidden] -= torch.linspace(1, 10, hidden).log()  # from fast units to slow ones
        self.head = nn.Linear(hidden + task.observations, 1 + task.actions)

    def forward(self, x, h):
        seen, h = super().forward(x, h)
        return self.head(torch.cat([seen, x], dim=1)), h


@torch.no_grad()
def update(parameters, trace, gradient, error, kappa):
    """ObGD: a step along the trace, so short that the error does not change its sign."""
    for name, value in gradient.items():
        trace[name] = GAMMA * LAMBDA * trace.get(name, 0.0) + value
    size = sum(value.abs().sum() for value in trace.values()).item()
    for name, value in parameters:
        value.add_(trace[name], alpha=error / max(1.0, kappa * max(abs(error), 1.0) * size))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=["tmaze", "cartpole"], default="tmaze")
    parser.add_argument("--memoryless", action="store_true", help="forget the state after every step")
    parser.add_argument("--steps", type=int, default=50000)
    options = parser.parse_args()
    torch.manual_seed(0)
    task = TMaze() if options.task == "tmaze" else CartPole()
    agent = Agent(task)
    learner = rtrl.BlockRTRL(agent, batch_size=1)
    seen, total, returns, traces = task.reset(), 0.0, [], {loss: {} for loss in KAPPA}
    for step in range(1, options.steps + 1):
        (y,) = learner.step(torch.tensor([seen]))
        policy = torch.distributions.Categorical(logits=y[1:])
        action = policy.sample()
        losses = {"value": y[0], "policy": policy.log_prob(action), "entropy": policy.entropy()}
        gradients = learner.gradients(losses)
        seen, reward, done = task.step(action.item())
        ahead = 0.0 if done else learner.peek(torch.tensor([seen]))[0, 0].item()
        error = task.scale * reward + GAMMA * ahead - y[0].item()
        for name, value in gradients["entropy"].items():
            gradients["policy"][name] += ENTROPY * (1 if error > 0 else -1) * value
        learner.sync()  # closes the step, before the parameters that it was taken with change
        for loss, kappa in KAPPA.items():
            update(agent.named_parameters(), traces[loss], gradients[loss], error, kappa)
        total += reward
        if done or options.memoryless:
            learner.reset()
        if done:
            returns.append(total)
            seen, total, traces = task.reset(), 0.0, {loss: {} for loss in KAPPA}
            if len(returns) % 20 == 0:
                print(f"step {step:>7,}: mean return {sum(returns[-20:]) / 20:.2f} of the last 20 episodes")


if __name__ == "__main__":
    main()
