"""Exact RTRL of tanh units as pure functions on arrays, of NumPy or JAX, and the same in PyTorch as the cell."""

from typing import Any

import torch
from torch import Tensor, nn


class TanhUnits(nn.Module):
    """tanh(W x + U h + b); y is linear in the new state."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(2, 3)
        self.recurrent = nn.Parameter(torch.empty(3, 3))
        self.readout = nn.Parameter(torch.empty(2, 3))

    def init_state(self, batch_size: int) -> Tensor:
        return self.recurrent.new_full((batch_size, 3), 0.2)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h_next = torch.tanh(self.inward(x) + h @ self.recurrent.T)
        return h_next @ self.readout.T, h_next


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """The parameters as nested dicts."""
    inward = {"weight": flat["inward.weight"], "bias": flat["inward.bias"]}
    return {"inward": inward, "recurrent": flat["recurrent"], "readout": flat["readout"]}


def functions(np: Any, *, before: bool = False) -> dict[str, Any]:
    """The functions of the learner; with ``before``, the loss meets the influence of the state before: wrong."""

    def zeros(params: Any) -> Any:
        return {
            "inward": {name: np.zeros_like(value) for name, value in params["inward"].items()},
            "recurrent": np.zeros_like(params["recurrent"]),
            "readout": np.zeros_like(params["readout"]),
        }

    def init(params: Any, batch_size: int) -> Any:
        influence = np.zeros((batch_size, 3, 18))
        h = np.full((batch_size, 3), 0.2)
        return {"h": h, "S": influence, "met": influence, "grads": zeros(params)}

    def step(params: Any, state: Any, x: Any) -> Any:
        h, inward = state["h"], params["inward"]
        after = np.tanh(x @ inward["weight"].T + inward["bias"] + h @ params["recurrent"].T)
        slope = 1 - after * after
        eye = np.eye(3)
        inputs = np.concatenate([x, np.ones_like(x[:, :1]), h], axis=1)  # of W, b and U
        immediate = np.einsum("bi,ir,bc->birc", slope, eye, inputs).reshape(len(x), 3, 18)
        carried = slope[:, :, None] * (params["recurrent"] @ state["S"]) + immediate
        met = state["S"] if before else carried
        return {**state, "h": after, "S": carried, "met": met}, after @ params["readout"].T

    def backward(params: Any, state: Any, dy: Any) -> Any:
        found = np.einsum("bi,bip->p", dy @ params["readout"], state["met"]).reshape(3, 6)
        grads = state["grads"]
        inward = grads["inward"]
        return {
            **state,
            "grads": {
                "inward": {"weight": inward["weight"] + found[:, :2], "bias": inward["bias"] + found[:, 2]},
                "recurrent": grads["recurrent"] + found[:, 3:],
                "readout": grads["readout"] + dy.T @ state["h"],
            },
        }

    def gradients(params: Any, state: Any) -> Any:
        return state["grads"], {**state, "grads": zeros(params)}

    def reset(params: Any, state: Any, samples: Any) -> Any:
        h = np.where(samples[:, None], 0.2, state["h"])
        return {**state, "h": h, "S": np.where(samples[:, None, None], 0.0, state["S"])}

    return {
        "init": init,
        "step": step,
        "backward": backward,
        "gradients": gradients,
        "reset": reset,
        "parameters": nested,
    }
