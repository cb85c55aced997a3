"""Draws where a head's softmax mass lies and what of it is attended: query tiles, 64-key blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condensate_ext._selectors import BlockSelector
from condensate_ext.captured import HEAD, CapturedLayer
from condensate_ext.ops import block_summaries, select_blocks

_BLOCK = 64
_FLOOR = 1e-3  # mass below it is drawn as nothing
_OMITTED, _SELECTED, _WINDOW, _ANCHOR = range(4)
_COLOURS = ("#eeeeee", "#2a6fbb", "#9cc4e8", "#e08a2e")
_NAMES = ("omitted", "selected", "window", "anchors")


def _tile_positions(layer: CapturedLayer) -> int:
    """Queries of a head that share a list: the largest power of two of at most 128 rows."""
    group = layer.query.shape[1] // layer.key.shape[1]
    return min(64, 1 << ((128 // group).bit_length() - 1))


def _kv_head(layer: CapturedLayer, head: int) -> int:
    return head * layer.key.shape[1] // layer.query.shape[1]


def _block_mass(layer: CapturedLayer, head: int, tile: int) -> Tensor:
    """``[tiles, blocks]``: the largest softmax mass that a query of the tile gives the block."""
    query, key = layer.query[0, head], layer.key[0, _kv_head(layer, head)]
    positions = torch.arange(len(key) - len(query), len(key))[:, None]
    scores = query @ key.T * query.shape[-1] ** -0.5
    scores.masked_fill_(torch.arange(len(key))[None] > positions, -torch.inf)
    mass = scores.softmax(-1).view(len(query), -1, _BLOCK).sum(-1)
    per_tile: Tensor = mass.view(-1, tile, mass.shape[-1]).amax(1)
    return per_tile


def _support(
    layer: CapturedLayer,
    head: int,
    tile: int,
    window: int,
    anchors: int,
    far_field: bool,
    **selection: Any,
) -> Tensor:
    """``[tiles, blocks]``: why the tile's last query attends a block, NaN where it is not past."""
    indices, _ = select_blocks(
        layer.query,
        block_summaries(layer.key, selector=selection["selector"]),
        kv_len=layer.key.shape[2],
        window=window,
        anchors=anchors,
        far_field=far_field,
        **selection,
    )
    queries, keys = layer.query.shape[2], layer.key.shape[2]
    last = torch.arange(keys - queries + tile - 1, keys, tile)[:, None]
    begin = torch.arange(0, keys, _BLOCK)[None]
    # With the far field the blocks of all the tile's windows are attended, as a whole.
    reaching = last - tile + 1 if far_field else last
    kind = torch.full((queries // tile, keys // _BLOCK), float(_OMITTED))
    kind[begin + _BLOCK > reaching - window + 1] = _WINDOW
    kind[(begin < anchors).expand_as(kind)] = _ANCHOR
    for row, blocks in zip(kind, indices[0, _kv_head(layer, head)], strict=True):
        row[blocks[blocks >= 0].long()] = _SELECTED
    return kind.masked_fill(begin > last, torch.nan)


def draw(
    layer: CapturedLayer,
    path: Path,
    *,
    head: int = HEAD,
    window: int,
    anchors: int,
    topk: int,
    selector: BlockSelector = "block",
    top_p: float | None = None,
    far_field: bool = True,
) -> None:
    """Writes the picture of one head; needs matplotlib.

    Queries of ``layer`` must be a multiple of 64, and so must its keys. The budget is given as to
    :func:`condensate_ext.attention`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    tile = _tile_positions(layer)
    queries, keys = layer.query.shape[2], layer.key.shape[2]
    extent = (0, keys, keys, keys - queries)
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)

    mass = _block_mass(layer, head, tile).clamp_min(_FLOOR)
    shown = above.imshow(
        mass.numpy(),
        norm=LogNorm(_FLOOR, 1),
        cmap="Blues",
        extent=extent,
        aspect="auto",
        interpolation="nearest",
    )
    figure.colorbar(shown, ax=above, label="softmax mass of a block")
    above.set_title(
        f"{layer.model}, layer {layer.layer}, head {head}: where dense attention looks", loc="left"
    )
    kinds = _support(
        layer, head, tile, window, anchors, far_field, topk=topk, selector=selector, top_p=top_p
    )
    below.imshow(
        kinds.numpy(),
        cmap=ListedColormap(_COLOURS),
        vmin=-0.5,
        vmax=3.5,
        extent=extent,
        aspect="auto",
        interpolation="nearest",
    )
    below.set_title(
        f"what is attended: {anchors} anchors, window {window}, {topk} selected keys", loc="left"
    )
    patches = [Patch(color=c, label=n) for c, n in zip(_COLOURS, _NAMES, strict=True)]
    below.legend(handles=patches, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    below.set_xlabel("key position")
    for axes in (above, below):
        axes.set_ylabel("query position")
    if layer.statement is not None:
        _point_at(sum(layer.statement) / 2, keys - queries // 2, above, below)
    figure.savefig(path, dpi=120)


def _point_at(key: float, query: float, above: Any, below: Any) -> None:
    """Marks the statement's place in both panels."""
    for axes in (above, below):
        axes.axvline(key, color="#c0392b", linewidth=0.8, linestyle=":")
    below.annotate(
        "the line that the last query asks for",
        (key, query),
        xytext=(14, 0),
        textcoords="offset points",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2},
        color="#c0392b",
        fontsize=9,
    )
