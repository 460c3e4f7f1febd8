"""Recorded steps become Jacobians, adjoints and immediate influences, a block at a time."""
