"""Instruments that judge the ops by docs/definition.md alone; they share no code with them."""
