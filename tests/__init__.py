"""Tests of condensate_ext. Run `pytest` on any machine, `pytest -m gpu` on one with CUDA."""
