"""Records of a run: environment, JSON file, schema, table."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"  # a folder a card
Record = dict[str, Any]
CASE_COLUMNS = (
    "case", "keys/query", "total ms", "select ms", "attend ms", "best dense ms",
    "speed-up", "Flex, same lists ms", "TFLOP/s", "% of floor", "memory % of KV",
)  # fmt: skip
DECODE_COLUMNS = (
    "case", "step us", "update us", "select us", "attend us", "best dense us", "speed-up",
    "FlashInfer us", "MB", "GB/s", "% of copy",
)  # fmt: skip


def command_output(*command: str) -> str:
    """First line that a command prints, or 'unknown'."""
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return text.strip().splitlines()[0] if text.strip() else "unknown"


def results_folder() -> Path:
    """Where results belong: "NVIDIA H100 80GB HBM3" -> nvidia-h100; cpu without a GPU."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return RESULTS / "-".join(name.lower().split()[:2])


def committed(name: str) -> list[Path]:
    """The files of this name, of every card."""
    return sorted(RESULTS.glob(f"*/{name}.json"))


def environment() -> Record:
    """What a figure depends on beside the code. CONDENSATE_COMMIT names it outside a checkout."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": command_output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        ),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "commit": os.environ.get("CONDENSATE_COMMIT") or command_output("git", "rev-parse", "HEAD"),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def validate(document: Record, suite: str = "prefill") -> None:
    """Raises when a document does not match its suite's schema; does nothing without jsonschema."""
    if importlib.util.find_spec("jsonschema") is None:
        return
    import jsonschema

    schema = Path(__file__).with_name(f"{suite}.schema.json")
    jsonschema.validate(document, json.loads(schema.read_text(encoding="utf-8")))


def save(document: Record, path: Path, suite: str = "prefill") -> None:
    validate(document, suite)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 100 else f"{value:.1f}"


def case_table(records: list[Record]) -> Table:
    """One row a case: the whole call against torch's best dense kernel of the same run."""
    table = Table(title="attention(): selection included, against dense attention")
    for column in CASE_COLUMNS:
        table.add_column(column, justify="left" if column == "case" else "right")
    for r in records:
        table.add_row(
            r["case"], f"{r['keys_per_query']:.0f}", ms(r["total_ms"]), ms(r["select_ms"]),
            ms(r["attend_ms"]), f"{ms(r['peer_ms'])} ({r['peer']})", f"{r['speedup']:.1f}x",
            ms(r["peers"].get("flex_same_lists")), f"{r['tflops']:.0f}",
            f"{r['percent_of_floor']:.0f}", f"{r['memory_percent']:.1f}",
        )  # fmt: skip
    return table


def stage_table(records: list[Record]) -> Table:
    """One row a stage, ours and peers'."""
    table = Table(title="stages")
    for column in ("case", "stage", "ms", "TFLOP/s", "GB/s", "% of floor"):
        table.add_column(column, justify="left" if column in ("case", "stage") else "right")
    for record in records:
        for stage in record["stages"]:
            table.add_row(
                record["case"], stage["stage"], ms(stage["ms"]), f"{stage['tflops']:.1f}",
                f"{stage['gb_s']:.0f}", f"{stage['percent_of_floor']:.0f}",
            )  # fmt: skip
    return table


def microseconds(value: float | None) -> str:
    return "-" if value is None else f"{1000 * value:.1f}"


def decode_table(records: list[Record]) -> Table:
    """One row a case: a step against torch's best dense kernel of the same run."""
    table = Table(title="a decoding step: update and selection included, against dense attention")
    for column in DECODE_COLUMNS:
        table.add_column(column, justify="left" if column == "case" else "right")
    for r in records:
        theirs = [t for name, t in r["peers"].items() if name.startswith("flashinfer")]
        table.add_row(
            r["case"], microseconds(r["total_ms"]), microseconds(r["update_ms"]),
            microseconds(r["select_ms"]), microseconds(r["attend_ms"]),
            f"{microseconds(r['peer_ms'])} ({r['peer']})", f"{r['speedup']:.1f}x",
            microseconds(theirs[0] if theirs else None), f"{r['bytes'] / 1e6:.1f}",
            f"{r['gb_s']:.0f}", f"{r['percent_of_copy_bandwidth']:.0f}",
        )  # fmt: skip
    return table


def show_decode(document: Record) -> None:
    console = Console(width=170)
    console.print(decode_table(document["records"]))
    console.print(summary_line(document))


def summary_line(document: Record) -> str:
    """The card, its ceilings, and what was not measured."""
    missing = document["skipped"] + [f for r in document["records"] for f in r["peers_failed"]]
    ceilings = document["ceilings"]
    return (
        f"{document['environment']['gpu']}: copy {ceilings['copy_tb_s']:.2f} TB/s, bf16 matmul "
        f"{ceilings['matmul_tflop_s']:.0f} TFLOP/s in this run; not measured: "
        f"{', '.join(missing) or 'nothing'}"
    )


def show(document: Record) -> None:
    console = Console(width=170)
    console.print(case_table(document["records"]))
    console.print(stage_table(document["records"]))
    console.print(summary_line(document))
