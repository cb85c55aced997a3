"""Pictures of an evaluation: quality against budget, omitted mass, the support of a head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from condensate_ext import support_plot
from condensate_ext.captured import CapturedLayer
from condensate_ext.evaluate.omission import Audit, capture_layer
from condensate_ext.evaluate.policies import Policy, condenses, keys_per_query, selector_name
from condensate_ext.evaluate.protocols import Record
from condensate_ext.evaluate.report import variant_name
from condensate_ext.evaluate.subject import Subject

_DRAWN_QUERIES = 1024
_BLOCK = 64
# protocol, field, label
_PANELS = (
    ("decode", "kl", "decode: KL, nats"),
    ("decode", "top1", "decode: top-1 agreement"),
    ("decode", "dppl_percent", "decode: perplexity change, %"),
    ("prefill", "kl", "behind a sparse prefill: KL, nats"),
    ("needles", "needle_all", "needles: whole answer right"),
    ("survival", "survived", "continuations that survive"),
    ("omitted", "omitted_mean", "mean omitted mass"),
)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def quality(records: Sequence[Record], path: Path) -> bool:
    """Each measured quantity over the budget, a line a selector; dense attention dashed.

    Returns whether there was anything to draw.
    """
    panels = [p for p in _PANELS if any(r["protocol"] == p[0] for r in records)]
    if not panels:
        return False
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(4.2 * columns, 3.2 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (protocol, field, label) in zip(grid, panels, strict=False):
        here = [r for r in records if r["protocol"] == protocol]
        for name in dict.fromkeys(variant_name(r) for r in here):
            line = sorted((r["keys"] or 0, r[field]) for r in here if variant_name(r) == name)
            if line[0][0] == 0:
                axes.axhline(line[0][1], color="grey", linestyle="--", linewidth=1, label=name)
            else:
                axes.plot(*zip(*line, strict=True), marker="o", label=name)
        ticks = sorted({r["keys"] for r in here if r["keys"] is not None})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("keys per query")
        axes.set_title(label, loc="left", fontsize=10)
        axes.legend(fontsize=8, frameon=False)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=120)
    return True


def omitted_mass(audits: Sequence[Audit], policies: Sequence[Policy], path: Path) -> None:
    """The mean mass that every head of every layer leaves out, a panel a policy."""
    means = [audit.omitted.mean(-1) for audit in audits]
    layers, heads = means[0].shape
    figure = _figure(1.5 + max(2.4, 0.22 * heads) * len(means), 1.5 + max(2.0, 0.22 * layers))
    panels = figure.subplots(1, len(means), squeeze=False)[0]
    top = max(float(mean.max()) for mean in means) or 1.0
    for axes, mean, policy in zip(panels, means, policies, strict=True):
        shown = axes.imshow(mean.numpy(), vmin=0, vmax=top, cmap="magma_r", aspect="auto")
        axes.set_title(f"{selector_name(policy)}, {keys_per_query(policy)} keys", fontsize=10)
        axes.set_xlabel("query head")
    panels[0].set_ylabel("layer")
    figure.colorbar(shown, ax=panels, label="mean omitted mass")
    figure.savefig(path, dpi=120)


def support(
    subject: Subject, name: str, audits: Sequence[Audit], policies: Sequence[Policy], path: Path
) -> str | None:
    """Draws the head that leaves out most under the first policy with lists of blocks.

    Returns None, or why there is no picture.
    """
    chosen = next((n for n, p in enumerate(policies) if selector_name(p) != "exact"), None)
    if chosen is None:
        return "no picture of a head's support: --selectors names none with lists of blocks"
    policy, mean = policies[chosen], audits[chosen].omitted.mean(-1)
    layer, head = divmod(int(mean.argmax()), mean.shape[1])
    length = subject.context // _BLOCK * _BLOCK
    ids = subject.ids(subject.windows[:1], length)
    with torch.no_grad():
        query, key, value = (t.float().cpu() for t in capture_layer(subject.model, ids, layer))
    queries = min(_DRAWN_QUERIES, length)
    captured = CapturedLayer(query[:, :, -queries:], key, value, name, layer, None)
    support_plot.draw(
        captured, path, head=head, window=policy["window"], anchors=policy["anchors"],
        topk=policy["topk"], selector=policy["selector"], top_p=policy.get("top_p"),
        far_field=condenses(policy),
    )  # fmt: skip
    return None
