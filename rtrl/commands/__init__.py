"""Commands of ``rtrl`` that have a module of their own."""
