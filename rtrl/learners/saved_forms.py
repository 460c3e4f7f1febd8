"""What is checked of the parts of a saved learner against one another, and a saved learner in another dtype."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rtrl._engine import checks
from rtrl._engine.recorded import RecordedStep
from rtrl._utils import pytrees
from rtrl._utils.plain_content import digest
from rtrl.errors import ConfigError

_COUNTS = ("block", "window")
_REAL = {f"torch.{name}": getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


def with_digest(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved learner with the digest of its content."""
    return {**saved, "digest": digest(saved)}


def check_digest(saved: Mapping[str, Any]) -> None:
    """Refuse a saved learner whose content is not that of its digest; one without a digest passes.

    Raises:
        ConfigError: it is not.
    """
    content = {name: value for name, value in saved.items() if name != "digest"}
    if "digest" in saved and saved["digest"] != digest(content):
        raise ConfigError(
            "the saved learner is damaged, or was changed after it was saved: its digest is not that of its content. "
            "Load what was saved; to load what you changed on purpose, leave out its 'digest'"
        )


def check_layout(saved: Mapping[str, Any], present: Mapping[str, Any], adaptable: Collection[str]) -> None:
    """Refuse a layout with other parts than that of the learner, or with an argument that no learner has.

    Raises:
        ConfigError: it is such.
    """
    for name in saved.keys() - present.keys():
        raise ConfigError(f"the saved learner has {name}={saved[name]!r}, which this one does not know")
    for name in set(adaptable) & saved.keys():
        value = saved[name]
        if type(value) is not type(present[name]) or (name in _COUNTS and value < 1):
            raise ConfigError(f"the saved learner has {name}={value!r}, which no learner has")


def check_chain(steps: Sequence[RecordedStep], state: Tensor, restarting: Tensor | None) -> None:
    """Refuse open steps whose states do not follow from one another.

    Args:
        steps: the open steps.
        state: the present state.
        restarting: Boolean (B,), the samples that restarted after the newest step; None for none.

    Raises:
        ConfigError: they do not.
    """
    starts = [] if not steps else [(step.h, step.restarted) for step in steps[1:]] + [(state, restarting)]
    for step, (following, restarted) in zip(steps, starts, strict=True):
        if not checks.finite(step.h):
            raise ConfigError(f"NaN or infinity in the saved state before step {step.number}")
        if (restarted is None) != (step.reached is None):
            raise ConfigError(f"the samples that restarted after the saved step {step.number} are not known")
        reached = step.reached
        if restarted is not None and reached is not None:
            kept = ~restarted
            if not torch.equal(reached[kept], following[kept]):
                raise ConfigError(f"the state that the saved step {step.number} reached is not that of the next one")
    if steps and steps[0].restarted is not None:
        raise ConfigError("samples of the saved learner restarted inside a block that begins with them")


def in_dtype_of(saved: Any, present: Mapping[str, Any]) -> Any:
    """Return a saved learner of one real dtype in that of another learner, if that is all that keeps it from loading.

    Args:
        saved: the saved learner.
        present: the layout of the learner that is to load it.

    Returns:
        The saved learner with its floating-point tensors converted; as it is if both have the same dtype, or several.

    Raises:
        ConfigError: it has an open block, or holds steps that were taken in its dtype, or the other cannot hold its
            values.
    """
    layout = saved["layout"]
    if not isinstance(layout, Mapping) or not isinstance(layout["parameters"], Mapping):
        raise ConfigError("the saved learner is damaged: its layout is not that of a learner")
    if not isinstance(saved["buffers"], Mapping):
        raise ConfigError("the saved learner is damaged: what its rule carries is not given by name")
    before, after = _dtype_of(layout), _dtype_of(present)
    if before is None or after is None or before == after:
        return saved
    if saved["open_steps"] or saved["buffers"].get("kept_steps"):
        what = "an open block; call sync() before saving it" if saved["open_steps"] else "steps that were taken in it"
        raise ConfigError(f"the saved learner is {before}, this one {after}, and it has {what}")

    def converted(value: Tensor) -> Tensor:
        if value.dtype != _REAL[before]:
            return value
        there = value.to(_REAL[after])
        if checks.finite(value) and not checks.finite(there):
            raise ConfigError(f"the saved learner has values that {after} cannot hold; load it as {before}")
        return there

    parameters = {name: text.replace(before, after) for name, text in layout["parameters"].items()}
    own = {**layout, "state": layout["state"].replace(before, after), "parameters": parameters}
    return {**pytrees.map_tensors(converted, {n: v for n, v in saved.items() if n != "layout"}), "layout": own}


def _dtype_of(layout: Mapping[str, Any]) -> str | None:
    """The one real dtype of a layout's state and parameters, as text; None if there are others."""
    texts = [layout["state"], *layout["parameters"].values()]
    found = {text.rpartition(" ")[2] for text in texts if isinstance(text, str)}
    return found.pop() if len(found) == 1 and found <= _REAL.keys() else None
