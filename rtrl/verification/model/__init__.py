"""Claims about the mixture itself."""
