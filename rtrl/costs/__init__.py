"""What each way to learn will cost, before it is run: multiply-adds, bytes, and time at least."""

from rtrl.costs.auto_block import choose_block
from rtrl.costs.devices import measured_rates, nominal_rates
from rtrl.costs.plan import plan
from rtrl.costs.result import Choice, Plan

__all__ = ["Choice", "Plan", "choose_block", "measured_rates", "nominal_rates", "plan"]
