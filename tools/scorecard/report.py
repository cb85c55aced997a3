"""docs/reliability.md and docs/reliability.json from the states of all lines."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.scorecard.rows import LINES
from tools.scorecard.state import load

HEAD = """# Reliability

Made by `python -m tools.scorecard`; [reliability.json](reliability.json) has the same with the
words of failures. A line counts what was tried and what of it failed; its seed is new in every run.
"""


def _records(states: Path, docs: Path) -> list[dict[str, Any]]:
    """Rows by line and device: of the states, else as the last report has them."""
    path = docs / "reliability.json"
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    known = {(row["line"], row["device"]): row for row in old}
    for line in LINES:
        for device in line.devices:
            state = load(states, line.name, device)
            if state is None or state.next == 0:
                continue
            row = asdict(state)
            row.update(
                what=line.what, target=line.target, why=line.why, pieces=line.pieces[state.size]
            )
            before = known.get((line.name, device))
            if before is None or before["size"] != "full" or state.size == "full":
                known[line.name, device] = row
    for line in LINES:  # how it is tried is the line's to say, also of older rows
        for device in line.devices:
            if (line.name, device) in known:
                known[line.name, device]["why"] = line.why
    order = {line.name: place for place, line in enumerate(LINES)}
    rows = [row for row in known.values() if row["line"] in order]
    return sorted(rows, key=lambda row: (order[row["line"]], row["device"]))


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| line | on | what | tried | failed | target | date | commit |",
        "| --- | --- | --- | ---: | ---: | --- | --- | --- |",
    ]
    for row in rows:
        part = "" if row["next"] >= row["pieces"] else f" ({row['next']} of {row['pieces']} parts)"
        extra = ", ".join(f"{name} {number:,.4g}" for name, number in row["extra"].items())
        lines.append(
            f"| {row['line']} | {row['card']} | {row['what']}{'; ' + extra if extra else ''} "
            f"| {row['count']:,}{part} | {row['failed']:,} | {row['target']} | {row['date']} "
            f"| {row['commit']} |"
        )
    return "\n".join(lines)


def write_report(states: Path, docs: Path) -> None:
    rows = _records(states, docs)
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "reliability.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    how = "\n".join(f"- **{line.name}**: {line.why}" for line in LINES)
    text = f"{HEAD}\n{_table(rows)}\n\n## How each is tried\n\n{how}\n"
    (docs / "reliability.md").write_text(text)
