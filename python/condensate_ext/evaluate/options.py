"""Arguments that every program evaluating a model takes."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from condensate_ext.evaluate.policies import Policy, policy


def add_subject(parser: argparse.ArgumentParser) -> None:
    """The model, its text, where it runs."""
    parser.add_argument(
        "--model", type=Path, required=True, help="folder of a Hugging Face causal LM"
    )
    parser.add_argument(
        "--text", type=Path, required=True, help="text file, documents separated by NUL"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: bfloat16 on a GPU, float32 on the CPU",
    )


def add_policy(parser: argparse.ArgumentParser) -> None:
    """What every policy has beside its selector and its budget."""
    parser.add_argument(
        "--far-field",
        action=argparse.BooleanOptionalAction,
        help="pooled terms for what is not attended; default: the operator's",
    )
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="softmax mass at which a list ends; default: none"
    )


def make_policy(options: argparse.Namespace, selector: str, keys: int) -> Policy:
    """A policy of ``keys`` per query in all, with what the command line says of every policy."""
    return policy(selector, keys, far_field=options.far_field, top_p=options.top_p)
