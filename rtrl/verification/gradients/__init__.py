"""Claims about the gradients themselves."""
