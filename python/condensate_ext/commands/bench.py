"""``condensate bench``: how fast it is on this machine, against torch's best dense kernel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from condensate_ext import _loader
from condensate_ext._machine import cpu_name
from condensate_ext._tables import make_table
from condensate_ext.commands import bench_cases, console
from condensate_ext.commands.bench_cases import Record, Shape
from condensate_ext.commands.options import DEVICE, DTYPE, check_dtype
from condensate_ext.evaluate.policies import policy
from condensate_ext.evaluate.subject import default_dtype

if TYPE_CHECKING:
    from rich.table import Table

_JSON, _PNG = "bench.json", "bench.png"
_CPU_LENGTHS, _GPU_LENGTHS = (4096, 8192, 16384), (8192, 16384, 32768, 65536, 131072)
_TITLES = {
    "prefill": "prefill of one sequence, selection included",
    "decode": "one decoding step over a cache, summaries included",
}


def command(
    lengths: Annotated[
        list[int], typer.Option(help="Tokens. Default: 4096 to 16384, on a GPU 8192 to 131072.")
    ] = [],  # noqa: B006
    budgets: Annotated[list[int], typer.Option(help="Keys per query.")] = [1024, 2048],  # noqa: B006
    heads: Annotated[int, typer.Option(help="Query heads. Default: 8, on a GPU 32.")] = 0,
    kv_heads: Annotated[int, typer.Option(help="KV heads. Default: a quarter of them.")] = 0,
    head_dim: Annotated[int, typer.Option(help="Of every head.")] = 128,
    device: DEVICE = None,
    dtype: DTYPE = None,
    output: Annotated[
        Path, typer.Option(help=f"Folder for {_JSON} and {_PNG}.")
    ] = Path("condensate_bench"),
) -> None:
    """Times this machine.

    Prefill and decoding steps on random numbers, against torch's best dense kernel. Shows where
    condensate begins to be faster. Ctrl-C keeps what was measured.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.startswith("cuda")
    heads = heads or (32 if gpu else 8)
    try:
        dtype = dtype or default_dtype(device)
        check_dtype(dtype)
        shape = Shape(
            heads, kv_heads or max(1, heads // 4), head_dim, getattr(torch, dtype), device
        )
        chosen = sorted(lengths or (_GPU_LENGTHS if gpu else _CPU_LENGTHS))
        _check(shape, chosen, budgets)
    except (ValueError, RuntimeError, ImportError) as error:
        raise typer.Exit(console.refuse("bench", error)) from None
    raise typer.Exit(run(shape, chosen, sorted(budgets), output))


def _check(shape: Shape, lengths: Sequence[int], budgets: Sequence[int]) -> None:
    """Everything wrong is said before anything is timed."""
    _loader.require()
    if min(lengths) < 1:
        raise ValueError(f"--lengths {min(lengths)}: it must be at least 1.")
    for budget in budgets:
        policy("block", budget)
    for part in (bench_cases.prefill, bench_cases.decode):
        part(shape, 64, list(budgets))  # the operators say what they do not take


def run(shape: Shape, lengths: Sequence[int], budgets: list[int], output: Path) -> int:
    """Times every case and returns the exit status."""
    shown, records = console.console(), list[Record]()
    document: dict[str, Any] = {"environment": _environment(shape), "records": records}
    try:
        with console.progress("bench", tuple(_TITLES)) as begin:
            for what, measure in (("prefill", bench_cases.prefill), ("decode", bench_cases.decode)):
                advance = begin(what)
                for tokens in lengths:
                    records += measure(shape, tokens, budgets)
                    console.write_json(output / _JSON, document)
                    advance(1 / len(lengths))
    except KeyboardInterrupt:
        _show(shown, records, budgets)
        return console.interrupted("bench", f"{len(records)} records are in {output / _JSON}")
    _show(shown, records, budgets)
    console.say(shown, f"records: {output / _JSON}", draw(records, output / _PNG))
    return 0


def _environment(shape: Shape) -> dict[str, Any]:
    gpu = shape.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(shape.device) if gpu else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "dtype": str(shape.dtype).removeprefix("torch."),
    }


def _show(shown: Any, records: list[Record], budgets: list[int]) -> None:
    for what in dict.fromkeys(r["what"] for r in records):
        shown.print(_table(what, records))
        console.say(shown, *(bench_cases.break_even(records, what, b) for b in budgets))


def _table(what: str, records: list[Record]) -> Table:
    rows = [
        [
            f"{r['tokens']:,}",
            f"{r['budget']:,}",
            f"{r['ms']:.3g}",
            f"{r['dense_ms']:.3g} ({r['dense_kernel']})",
            f"{r['speedup']:.2f}x",
        ]
        for r in records
        if r["what"] == what
    ]
    headings = ("tokens", "keys", "condensate, ms", "dense, ms", "speed-up")
    return make_table(_TITLES[what], headings, rows)


def draw(records: list[Record], path: Path) -> str:
    """Draws time over length, or says why there is no picture."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "no picture: it needs matplotlib; `pip install matplotlib` adds it"
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, what in zip(figure.subplots(1, 2), _TITLES, strict=True):
        here = [r for r in records if r["what"] == what]
        ticks = sorted({r["tokens"] for r in here})
        for budget in sorted({r["budget"] for r in here}):
            line = [(r["tokens"], r["ms"]) for r in here if r["budget"] == budget]
            axes.plot(*zip(*line, strict=True), marker="o", label=f"condensate, {budget:,} keys")
        dense = sorted({(r["tokens"], r["dense_ms"]) for r in here})
        axes.plot(*zip(*dense, strict=True), "k--", marker="s", label="torch's best dense kernel")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xlabel("tokens")
        axes.set_ylabel("ms")
        axes.set_title(what, loc="left", fontsize=10)
        axes.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return f"time by length: {path}"
