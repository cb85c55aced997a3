"""Budgets by layer and KV head, from the softmax mass that they leave out on a text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condensate_ext.evaluate import omission
from condensate_ext.evaluate.policies import Policy, keys_per_query
from condensate_ext.evaluate.runs import Advance, share_of, silent
from condensate_ext.evaluate.subject import Subject

Calibration = dict[str, Any]


def mass_left_out(
    subject: Subject, policies: Sequence[Policy], advance: Advance = silent
) -> Tensor:
    """``[policies, layers, KV heads]``: mean omitted mass of the group's worst head, audited."""
    kv_heads = subject.model.config.get_text_config().num_key_value_heads
    part = share_of(advance, len(subject.windows))
    drawn = omission.audited_rows(subject.context, len(subject.windows), omission.AUDITED_ROWS)
    texts = []
    for window, rows in zip(subject.windows, drawn, strict=True):
        ids = subject.ids([window], subject.context)
        texts.append(omission.audit(subject.model, ids, policies, rows, part))
    of_policies = [
        torch.cat([text[number].omitted for text in texts], -1).mean(-1)
        for number in range(len(policies))
    ]
    by_head: Tensor = torch.stack(of_policies).unflatten(2, (kv_heads, -1))
    return by_head.amax(-1)


def choose(masses: Tensor, policies: Sequence[Policy], target: float) -> Calibration:
    """For each KV head the smallest budget that leaves out at most ``target``, else the largest.

    ``policies`` are of one selector, by growing budget. Returns what :func:`load_layers` reads:
    ``topk_per_head`` of every layer, and ``missed``, how many heads no budget satisfies.
    """
    fits = masses <= target
    first = torch.where(fits.any(0), fits.int().argmax(0), len(policies) - 1)
    topk = torch.tensor([policy["topk"] for policy in policies])[first]
    return {
        "target": target,
        "budgets": [keys_per_query(policy) for policy in policies],
        "missed": int((~fits.any(0)).sum()),
        "layers": {str(layer): heads for layer, heads in enumerate(topk.tolist())},
    }


def load_layers(path: Path | str, device: torch.device | str = "cpu") -> dict[int, dict[str, Any]]:
    """The ``layers`` of ``enable`` from a file of ``condensate calibrate``.

    >>> enable(model, layers=load_layers("budgets.json", model.device))     # doctest: +SKIP

    Args:
        path: the file.
        device: of the model.

    Raises:
        ValueError: the file is none of ``condensate calibrate``.
    """
    try:
        layers = json.loads(Path(path).read_text(encoding="utf-8"))["layers"]
        return {
            int(layer): {
                "topk": max(heads),
                "topk_per_head": torch.tensor(heads, dtype=torch.int32, device=device),
            }
            for layer, heads in layers.items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no budgets by layer ({error}); make it with `condensate calibrate`."
        ) from error
