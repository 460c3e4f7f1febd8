"""Claims about where exact gradients win against other learning rules, and where they do not."""
