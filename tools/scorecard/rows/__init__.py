"""The lines, in the order of the report."""

from tools.scorecard.rows import (
    bad_calls,
    canaries,
    concurrency,
    dense,
    features,
    graphs,
    hostile,
    membership,
    oracle,
    random_cases,
    repeatable,
    sizes,
    soak,
)

LINES = (
    random_cases.LINE,
    oracle.LINE,
    membership.LINE,
    bad_calls.LINE,
    hostile.LINE,
    canaries.LINE,
    repeatable.LAUNCHES,
    repeatable.BATCHES,
    repeatable.THREADS,
    graphs.LINE,
    concurrency.THREADS,
    concurrency.PROCESSES,
    soak.CALLS,
    soak.ERRORS,
    sizes.LINE,
    dense.LINE,
    features.LINE,
)
