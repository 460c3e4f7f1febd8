"""The commands of ``rtrl``, a module each; ``rtrl.cli`` puts them together."""
