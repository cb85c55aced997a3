"""Benchmarks: `python -m bench.prefill` on a GPU; stage microbenchmarks in C++ in bench/cpp."""
