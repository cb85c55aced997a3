"""Draws time and speed-up against length: `python -m bench.plot [prefill.json] [out.png]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

from bench.report import Record, results_folder

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SERIES = {
    "total_ms": "condensate attention()",
    "attend_ms": "condensate, list given",
    "flex_same_lists": "FlexAttention, same lists",
    "sdpa_cudnn": "dense, cuDNN",
    "sdpa_flash": "dense, FlashAttention-2",
}


def value(record: Record, series: str) -> float | None:
    found: float | None = record[series] if series in record else record["peers"].get(series)
    return found


def draw(records: list[Record], path: Path) -> None:
    """One figure: milliseconds and speed-up over the faster dense kernel, the largest budget."""
    shape = ("heads", "kv_heads", "head_dim", "dtype", "budget")
    first = tuple(records[0][key] for key in shape)
    rows = sorted((r for r in records if tuple(r[k] for k in shape) == first), key=lambda r: r["n"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for series, label in SERIES.items():
        points = [(r["n"], t) for r in rows if (t := value(r, series)) is not None]
        left.plot(*zip(*points, strict=True), marker="o", label=label)
    left.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title="time of one layer")
    left.set_xscale("log", base=2)
    left.legend(fontsize=8)
    lengths = [r["n"] for r in rows]
    right.plot(lengths, [r["speedup"] for r in rows], marker="o", label="selection included")
    right.plot(lengths, [r["attend_speedup"] for r in rows], marker="o", label="list given")
    right.axhline(1.0, color="grey", linewidth=0.8)
    right.set(yscale="log", xlabel="tokens", ylabel="times", title="speed-up over the best dense")
    right.set_xscale("log", base=2)
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(True, alpha=0.3)
    heads, kv_heads, head_dim, dtype, budget = first
    figure.suptitle(
        f"{heads} heads, {kv_heads} KV heads, d {head_dim}, {dtype}, {budget} keys/query"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(arguments: list[str]) -> int:
    source = Path(arguments[0]) if arguments else results_folder() / "prefill.json"
    target = Path(arguments[1]) if len(arguments) > 1 else source.with_suffix(".png")
    draw(json.loads(source.read_text(encoding="utf-8"))["records"], target)
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
