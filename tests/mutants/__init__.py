"""Seeded faults that the suite has to find: `python -m tests.mutants`."""
