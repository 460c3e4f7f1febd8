"""Claims about speed."""
