"""Instruments that judge the ops by docs/architecture.md alone; they share no code with them."""
