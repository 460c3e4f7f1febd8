"""Which entries of a state depend on which → groups of independent rows."""

from collections import defaultdict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Mask = npt.NDArray[np.bool_]
_MOST_GROUPS = 8
"""A structure with more groups than that is not used: each is swept by itself."""


def _reached(graph: Mask, start: int, inside: Mask) -> Mask:
    """The nodes that can be reached from one through nodes ``inside``, itself included."""
    seen = np.zeros(len(graph), dtype=bool)
    frontier = seen.copy()
    frontier[start] = True
    while frontier.any():
        seen |= frontier
        frontier = graph[frontier].any(axis=0) & inside & ~seen
    return seen


def _components(forward: Mask, backward: Mask, *, strong: bool) -> list[list[int]]:
    """The nodes that reach each other, directly or through others; if not ``strong``, regardless of directions."""
    left = np.ones(len(forward), dtype=bool)
    components = []
    for node in range(len(forward)):
        if left[node]:
            found = _reached(forward, node, left)
            if strong:
                found &= _reached(backward, node, left)
            left &= ~found
            components.append(np.flatnonzero(found).tolist())
    return components


def _stacked(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def independent_rows(adjacency: Tensor) -> list[Tensor]:
    """Divide a state into rows that depend on themselves alone, those of one width together.

    Args:
        adjacency: Boolean (H, H): entry [i, j] says whether i depends on j.

    Returns:
        LongTensors (n, w) of entries.
    """
    graph = adjacency.cpu().numpy()
    graph = graph | graph.T
    by_width: dict[int, list[list[int]]] = defaultdict(list)
    for component in _components(graph, graph, strong=False):
        by_width[len(component)].append(component)
    return [_stacked(rows) for _, rows in sorted(by_width.items())]


def layers(adjacency: Tensor) -> list[Tensor] | None:
    """Divide a state into groups of independent rows, ordered so that a group depends on itself and those before it.

    Args:
        adjacency: as in ``independent_rows``.

    Returns:
        LongTensors (n, w) of entries; None if that takes too many groups.
    """
    graph = adjacency.cpu().numpy()
    components = _components(graph, graph.T.copy(), strong=True)
    owner = np.empty(len(graph), dtype=np.int64)
    for i, component in enumerate(components):
        owner[component] = i
    below = np.zeros((len(components), len(components)), dtype=bool)
    dependent, source = np.nonzero(graph)
    below[owner[dependent], owner[source]] = True
    np.fill_diagonal(below, False)
    depth = np.zeros(len(components), dtype=np.int64)
    for _ in range(_MOST_GROUPS):
        deeper = np.where(below, depth[None] + 1, 0).max(axis=1)
        if np.array_equal(deeper, depth):
            break
        depth = deeper
    else:
        return None
    groups: dict[tuple[int, int], list[list[int]]] = defaultdict(list)
    for component, level in zip(components, depth.tolist(), strict=True):
        groups[level, len(component)].append(component)
    return [_stacked(rows) for _, rows in sorted(groups.items())] if len(groups) <= _MOST_GROUPS else None


def feeding(groups: list[Tensor], adjacency: Tensor) -> list[list[bool]]:
    """Whether group a depends on an earlier group b, directly or through others: ``[a][b]``."""
    count = len(groups)
    feeds = [[False] * count for _ in groups]
    for a in range(count):
        for b in reversed(range(a)):
            direct = bool(adjacency[groups[a].flatten()][:, groups[b].flatten()].any())
            feeds[a][b] = direct or any(feeds[a][c] and feeds[c][b] for c in range(b + 1, a))
    return feeds


def coupled(groups: list[Tensor], feeds: list[list[bool]], numbers: int) -> Tensor:
    """Return the adjacency, Boolean (H, H), that groups of independent rows allow."""
    allowed = torch.zeros(numbers, numbers, dtype=torch.bool, device="cpu")
    for a, group in enumerate(groups):
        allowed[group[:, :, None], group[:, None, :]] = True
        for b in (b for b in range(a) if feeds[a][b]):
            allowed[group.flatten()[:, None], groups[b].flatten()] = True
    return allowed
