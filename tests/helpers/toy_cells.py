"""The small cells of ``rtrl.testing``, by the name that the tests know them by."""

from rtrl.testing.example_cells import ForcedMoE, Leaky, OddCell, PlainRNN, Ring, ScheduledCell, seeded

__all__ = ["ForcedMoE", "Leaky", "OddCell", "PlainRNN", "Ring", "ScheduledCell", "seeded"]
