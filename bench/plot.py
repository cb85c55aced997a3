"""Draws results: `python -m bench.plot [prefill.json] [out.png]`.

Of prefill time and speed-up against length, of decode.json a step's time beside its peers'.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

from bench.report import Record, results_folder

matplotlib.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES = {
    "total_ms": "condensate attention()",
    "support_ms": "condensate, no far field",
    "attend_ms": "condensate, list given",
    "flex_same_lists": "FlexAttention, same lists",
    "sdpa_cudnn": "dense, cuDNN",
    "sdpa_flash": "dense, FlashAttention-2",
}


def value(record: Record, series: str) -> float | None:
    found: float | None = record[series] if series in record else record["peers"].get(series)
    return found


SHAPE = ("heads", "kv_heads", "head_dim", "dtype", "budget")
LEAST_POINTS = 4  # of a line worth drawing


def shapes(records: list[Record]) -> list[tuple[object, ...]]:
    """Those measured at many lengths, in the order of the records."""
    count = Counter(tuple(r[key] for key in SHAPE) for r in records)
    return [shape for shape, n in count.items() if n >= LEAST_POINTS] or [next(iter(count))]


def draw_times(axes: Axes, rows: list[Record]) -> None:
    for color, (series, label) in enumerate(SERIES.items()):
        points = [(r["n"], t) for r in rows if (t := value(r, series)) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=label, color=f"C{color}")
    axes.set(yscale="log", xlabel="tokens", ylabel="ms", title="time of one layer")


def draw_speedups(axes: Axes, rows: list[Record]) -> None:
    lengths = [r["n"] for r in rows]
    axes.plot(lengths, [r["speedup"] for r in rows], marker="o", label="attention()")
    axes.plot(lengths, [r["attend_speedup"] for r in rows], marker="o", label="list given")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set(yscale="log", xlabel="tokens", ylabel="times", title="speed-up over the best dense")


def draw(records: list[Record], path: Path) -> None:
    """A row of two diagrams a shape: milliseconds, and speed-up over the faster dense kernel."""
    drawn = shapes(records)
    figure, grid = plt.subplots(
        len(drawn), 2, figsize=(11, 4.2 * len(drawn)), squeeze=False, layout="constrained"
    )
    for (left, right), shape in zip(grid, drawn, strict=True):
        rows = [r for r in records if tuple(r[key] for key in SHAPE) == shape]
        rows.sort(key=lambda r: r["n"])
        draw_times(left, rows)
        draw_speedups(right, rows)
        heads, kv_heads, head_dim, dtype, budget = shape
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.grid(True, alpha=0.3)
            axes.legend(fontsize=8)
            axes.set_title(
                f"{axes.get_title()}\n{heads} heads, {kv_heads} KV heads, d {head_dim}, {dtype}, "
                f"{budget:,} keys a query",
                fontsize=9,
            )
    figure.savefig(path, dpi=130)


DECODE_SERIES = {
    "total_ms": "condensate, a step",
    "peer_ms": "torch's best dense",
    "flashinfer_paged": "FlashInfer, dense",
    "flashinfer_selected_pages": "FlashInfer, given pages",
}
BAR = 0.2  # of the distance between cases


def draw_decode(records: list[Record], path: Path) -> None:
    """Bars of microseconds a case, and the speed-up over the best dense kernel above ours."""
    figure, axes = plt.subplots(figsize=(2 + 0.9 * len(records), 4.6), layout="constrained")
    for place, (series, label) in enumerate(DECODE_SERIES.items()):
        points = [
            (at + BAR * (place - 1.5), 1000 * t)
            for at, r in enumerate(records)
            if (t := value(r, series)) is not None
        ]
        if points:
            x, height = zip(*points, strict=True)
            axes.bar(x, height, BAR, label=label, color=f"C{place}")
    for at, r in enumerate(records):
        above = (at - 1.5 * BAR, 1000 * r["total_ms"])
        axes.annotate(f"{r['speedup']:.1f}x", above, ha="center", va="bottom", fontsize=8)
    axes.set(yscale="log", ylabel="us a step", title="decoding, one layer")
    names = [r["case"].replace("_", " ") for r in records]
    axes.set_xticks(range(len(records)), names, rotation=30, ha="right", fontsize=8)
    axes.grid(True, axis="y", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main(arguments: list[str]) -> int:
    source = Path(arguments[0]) if arguments else results_folder() / "prefill.json"
    target = Path(arguments[1]) if len(arguments) > 1 else source.with_suffix(".png")
    records = json.loads(source.read_text(encoding="utf-8"))["records"]
    is_decode = bool(records) and "batch" in records[0]
    (draw_decode if is_decode else draw)(records, target)
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
