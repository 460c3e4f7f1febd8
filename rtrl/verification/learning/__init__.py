"""Claims about what is learned."""
