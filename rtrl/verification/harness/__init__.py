"""What several claims share: problems, timing, memory, processes and training runs."""
