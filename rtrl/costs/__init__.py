"""What each learning method will cost, before it is run: multiply-adds, bytes, and time at least."""

from rtrl.costs.auto_block import choose_block
from rtrl.costs.devices import measured_rates, nominal_rates
from rtrl.costs.plan import plan
from rtrl.costs.result import Choice, Plan
from rtrl.learners.block_choice import register_block_chooser

__all__ = ["Choice", "Plan", "choose_block", "measured_rates", "nominal_rates", "plan"]

register_block_chooser(lambda cell, batch_size, state: choose_block(cell, batch_size, state=state))
