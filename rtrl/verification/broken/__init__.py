"""Faults to plant in production code on purpose, by subject; ``rtrl.verification.breaks`` lists and plants them."""
