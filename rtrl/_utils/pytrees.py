"""Operations on pytrees of tensors (tuples, named tuples, dicts, lists), leaf by leaf."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def flatten(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The leaves of a tree, and a function that builds a tree of the same structure from other leaves."""
    flat, spec = pytree.tree_flatten(tree)
    return flat, lambda others: pytree.tree_unflatten(others, spec)


def tensors(tree: Any) -> list[Tensor]:
    """The tensors among the leaves of a tree."""
    if type(tree) is Tensor:
        return [tree]
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def named_leaves(root: str, tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths in it, such as ``root[0]['c']``."""
    return {root + pytree.keystr(path): leaf for path, leaf in pytree.tree_flatten_with_path(tree)[0]}


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Apply ``function`` to every tensor of a tree; other leaves pass through."""
    if type(tree) is Tensor:
        return function(tree)
    return pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def signature(tree: Any) -> tuple[Any, ...]:
    """The structure, shapes and dtypes that two trees must share to be joined along their batch dimension."""
    flat, spec = pytree.tree_flatten(tree)
    return (str(spec), *((tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in flat))


def concatenate(trees: Sequence[Any]) -> Any:
    """Join trees of one signature along dimension 0 of every tensor."""
    flats, specs = zip(*(pytree.tree_flatten(tree) for tree in trees), strict=True)
    joined = [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in zip(*flats, strict=True)]
    return pytree.tree_unflatten(joined, specs[0])


def stack(trees: Sequence[Any]) -> Any:
    """Stack trees of one signature along a new dimension 0 of every tensor."""
    if isinstance(trees[0], Tensor):  # the usual case, faster
        return torch.stack(list(trees))
    flats, specs = zip(*(pytree.tree_flatten(tree) for tree in trees), strict=True)
    stacked = [
        torch.stack(column) if isinstance(column[0], Tensor) else column[0] for column in zip(*flats, strict=True)
    ]
    return pytree.tree_unflatten(stacked, specs[0])


def interleave(trees: Sequence[Any]) -> Any:
    """Join m trees of one signature along dimension 0, from size B to B·m: the m entries of a sample are neighbours."""
    if isinstance(trees[0], Tensor):  # the usual case, faster
        return torch.stack(list(trees), dim=1).flatten(0, 1)
    flats, specs = zip(*(pytree.tree_flatten(tree) for tree in trees), strict=True)
    joined = [
        torch.stack(column, dim=1).flatten(0, 1) if isinstance(column[0], Tensor) else column[0]
        for column in zip(*flats, strict=True)
    ]
    return pytree.tree_unflatten(joined, specs[0])


def n_bytes(tree: Any) -> int:
    """Bytes of all tensors of a tree."""
    return sum(t.numel() * t.element_size() for t in tensors(tree))
