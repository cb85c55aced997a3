"""What a line of the scorecard is, and what its pieces return."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

KEPT_FAILURES = 20  # of which the words are kept


@dataclass(frozen=True)
class Piece:
    """One piece of a line's work. The same numbers give the same calls on every device."""

    device: str
    size: str
    index: int
    seed: int  # of the whole run

    @property
    def full(self) -> bool:
        return self.size == "full"

    def rng(self) -> random.Random:
        return random.Random(f"{self.seed} {self.index}")

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.rng().randrange(2**40))

    def share(self, number: int, pieces: int) -> range:
        """This piece's part of `number` things that are dealt to all pieces."""
        begin = number * self.index // pieces
        return range(begin, number * (self.index + 1) // pieces)


@dataclass
class Tally:
    """What was counted; `extra` holds further numbers of the line, each summed over pieces."""

    count: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)
    extra: dict[str, float] = field(default_factory=dict)

    def fail(self, words: str) -> None:
        self.failed += 1
        if len(self.failures) < KEPT_FAILURES:
            self.failures.append(words[:500])

    def check(self, good: bool, words: str) -> None:
        """Counts one thing that had to be good."""
        self.count += 1
        if not good:
            self.fail(words)

    def add(self, name: str, number: float) -> None:
        self.extra[name] = self.extra.get(name, 0) + number


@dataclass(frozen=True)
class Line:
    """A claim and how it is tried."""

    name: str
    what: str  # that is counted
    target: str
    pieces: dict[str, int]  # by size
    run: Callable[[Piece], Tally]
    devices: tuple[str, ...] = ("cpu", "cuda")
    why: str = ""  # the method, in a sentence
