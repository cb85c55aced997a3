"""Instruments that judge the ops by docs/architecture.md alone: no code is shared with the kernels."""
