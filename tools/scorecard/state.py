"""What was done so far of a line, kept in a file, so that a run can go on where the last ended."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tools.scorecard.line import KEPT_FAILURES, Line, Tally

ROOT = Path(__file__).resolve().parents[2]
TRIED = ("csrc", "python", "cmake", "CMakeLists.txt", "tools/scorecard", "tests/testkit")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments, "--", *TRIED]
    return subprocess.run(command, text=True, capture_output=True, check=False).stdout.strip()


def commit() -> str:
    """The last commit of what is tried, marked where the files differ from it. A commit of a report
    alone is none."""
    last = _git("rev-list", "-1", "--abbrev-commit", "HEAD") or "unknown"
    return f"{last}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else last


@dataclass
class State:
    """The sums over the pieces of a line that are done."""

    line: str
    device: str
    size: str
    seed: int
    commit: str
    card: str = ""
    torch: str = ""
    date: str = ""
    next: int = 0
    count: int = 0
    failed: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    extra: dict[str, float] = field(default_factory=dict)

    def add(self, tally: Tally, seconds: float) -> None:
        self.count += tally.count
        self.failed += tally.failed
        self.failures = (self.failures + tally.failures)[:KEPT_FAILURES]
        for name, number in tally.extra.items():
            self.extra[name] = self.extra.get(name, 0) + number
        self.seconds += seconds
        self.next += 1
        self.date = time.strftime("%Y-%m-%d")

    def is_done(self, line: Line) -> bool:
        return self.next >= line.pieces[self.size]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / file_name(self.line, self.device)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def file_name(line: str, device: str) -> str:
    return f"{line.replace(' ', '_')}-{device}.json"


def load(folder: Path, line: str, device: str) -> State | None:
    path = folder / file_name(line, device)
    return State(**json.loads(path.read_text())) if path.exists() else None
