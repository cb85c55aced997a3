"""The scorecard: how far the operators can be trusted, a line a claim, remade by one command.

    python -m tools.scorecard [--device cpu|cuda] [--size reduced|full] [--seconds N] [--only LINE]

Each line is a module under `rows/`, cut into pieces. They run in processes of their own, so that a
crash is counted and not suffered; what is done is kept, and the next call goes on from there.
The result is `docs/reliability.md` and `docs/reliability.json`.
"""
