"""What each way to learn will cost, before it is run: multiply-adds, bytes, and time at least."""

from rtrl.planning.auto import choose_block
from rtrl.planning.choice import Choice
from rtrl.planning.devices import measured_rates, nominal_rates
from rtrl.planning.result import Plan
from rtrl.planning.search import plan

__all__ = ["Choice", "Plan", "choose_block", "measured_rates", "nominal_rates", "plan"]
