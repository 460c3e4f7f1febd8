"""What backpropagation through time costs, full and truncated: ``rtrl.learners.BPTT`` and ``TBPTT``.

Over T steps with a loss at each, F the multiply-adds of a forward pass, F' of one with its choices laid down, U(k) of
the backward pass through k steps with a loss at each of them, V(k) with one at the last alone:

    BPTT                    F + T·F + T·F' + U(T)
    TBPTT(k), sliding       F + T·F + Σ_t ( k_t·F' + V(k_t) ),   k_t = min(t + 1, k)
    TBPTT(k), in chunks     F + T·F + T·F' + Σ_chunks U(length)

The first F is the learner's look at the first step. All but U and V are linear in T, and these are from the third step
on, so that the counts are exact for a cell whose steps are all of one kind.
"""

from rtrl.costs.profile import Profile
from rtrl.costs.result import Choice


def bptt(profile: Profile, steps: int) -> Choice:
    """``BPTT``: what it holds and what it needs at its peak grow with the number of steps.

    Held: x, h, y and the loss's gradient at y of every step. At its peak, in ``sync``, the graph of all steps, too.
    """
    macs = profile.forward(1) + profile.forward(steps) + steps * profile.again_macs + profile.losses_everywhere(steps)
    held = {"influence": 0, "steps": _steps_bytes(profile, steps), "gradient": 0, "state": profile.state_bytes}
    peak = _peak(profile, held, steps, steps)
    return Choice("BPTT", True, macs, steps, held, peak, estimated=not profile.steady)


def tbptt(profile: Profile, steps: int, horizon: int, sliding: bool) -> Choice:
    """``TBPTT``: exact if the run is no longer than its horizon; else its gradient is another one."""
    k = min(horizon, steps)
    macs = profile.forward(1) + profile.forward(steps)
    if sliding:
        early = range(1, k)  # while the window fills
        macs += sum(i * profile.again_macs + profile.loss_at_the_end(i) for i in early)
        macs += (steps - k + 1) * (k * profile.again_macs + profile.loss_at_the_end(k))
    else:
        chunks, rest = divmod(steps, k)
        macs += steps * profile.again_macs + chunks * profile.losses_everywhere(k) + profile.losses_everywhere(rest)
    moments = _moments(profile, steps, k, sliding)
    held = max((held for held, _, _ in moments), key=lambda held: sum(held.values()))
    peak = max(_peak(profile, *moment) for moment in moments)
    return Choice(
        "TBPTT",
        horizon >= steps,
        macs,
        steps,
        held,
        peak,
        horizon=horizon,
        sliding=sliding,
        estimated=not profile.steady,
    )


def _kept(profile: Profile) -> int:
    """Bytes that a step keeps, without the gradient of its loss."""
    return profile.x_bytes + profile.state_bytes + profile.output_bytes + profile.replays * profile.choice_bytes


def _steps_bytes(profile: Profile, steps: int) -> int:
    """Steps of which the last still takes losses."""
    return steps * _kept(profile) + (steps - 1) * profile.output_bytes


def _moments(profile: Profile, steps: int, k: int, sliding: bool) -> list[tuple[dict[str, int], int, int]]:
    """When most is held, before there is a gradient and after: what is held, the steps kept, and those gone through."""

    def held(kept: int, earned: bool) -> dict[str, int]:
        size = kept * _kept(profile) if sliding else _steps_bytes(profile, kept)
        gradient = profile.parameter_bytes if earned else 0
        return {"influence": 0, "steps": size, "gradient": gradient, "state": profile.state_bytes}

    kept = min(steps, k + 1)  # a window, or a chunk, and the step that still takes losses
    if sliding:
        return [(held(kept, steps > 1), kept, k)]
    later = min(steps - k, k + 1)
    return [(held(kept, False), kept, k), *([(held(later, True), later, min(later, k))] if later > 1 else [])]


def _peak(profile: Profile, held: dict[str, int], kept: int, run: int) -> int:
    """Bytes at the height of a backward pass through the last ``run`` of ``kept`` steps.

    Beside what is held: the copy of the parameters that the steps were taken with; what each step has beyond what
    ``retained_bytes`` counts, the gradient left at its y and a mark a sample, less the index tensors that it counts
    twice; and either the gradient and the graph, that of the newest step going as its part of the gradient comes (half
    of it counts), or the largest part of the gradient twice more while it is added to; or, the graph being gone, the
    gradient twice.
    """
    largest = max(shape.numel() for shape in profile.shapes.values()) * profile.itemsize
    beyond = profile.output_bytes + profile.batch_size - profile.replays * (profile.choice_bytes - profile.shared_bytes)
    older, every = profile.graph_bytes(run - 1), profile.graph_bytes(run)
    graph = older + max((every - older) // 2, 2 * largest) if run > 1 else every
    walking = profile.parameter_bytes + graph
    return sum(held.values()) + kept * beyond + profile.copy_bytes + max(walking, 2 * profile.parameter_bytes)
