"""Simulations that a definition rests on: emulated on the CPU, not the package's own ops."""
