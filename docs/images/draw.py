"""Draws the schematic pictures of the documentation: `python docs/images/draw.py`.

support.png is not among them: `python -m condensate_ext demo` makes it from a trained model.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

HERE = Path(__file__).resolve().parent
ANCHOR, WINDOW, LISTED, FAR, FUTURE = "#e08a2e", "#9cc4e8", "#2a6fbb", "#d9d9d9", "#ffffff"
NAMES = {ANCHOR: "anchors", WINDOW: "window", LISTED: "listed", FAR: "condensed"}
BLOCKS, TILES, WINDOW_BLOCKS = 24, 12, 2
LISTS = {4: {3}, 5: {3, 6}, 6: {3, 6}, 7: {6, 9}, 8: {3, 9}, 9: {6, 9}, 10: {3, 14}, 11: {9, 14}}


def kind(tile: int, block: int) -> str:
    """Why a tile of queries attends a block, two blocks to a tile."""
    end = 2 * tile + 2
    if block >= end:
        return FUTURE
    if block == 0:
        return ANCHOR
    if block >= end - 1 - WINDOW_BLOCKS:
        return WINDOW
    return LISTED if block in LISTS.get(tile, ()) else FAR


def cells(axes: Axes, colours: list[list[str]]) -> None:
    for row, line in enumerate(colours):
        for column, colour in enumerate(line):
            axes.add_patch(
                Rectangle((column, row), 1, 1, facecolor=colour, edgecolor="white", linewidth=0.8)
            )
    axes.set(xlim=(0, len(colours[0])), ylim=(len(colours), 0), xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set_visible(False)


def legend(axes: Axes, colours: list[str]) -> None:
    patches = [Patch(facecolor=colour, label=NAMES[colour]) for colour in colours]
    axes.legend(handles=patches, loc="upper right", frameon=False)


def prefill() -> None:
    _, axes = plt.subplots(figsize=(7, 3.6))
    cells(axes, [[kind(tile, block) for block in range(BLOCKS)] for tile in range(TILES)])
    axes.set(xlabel="blocks of 64 keys", ylabel="tiles of queries")
    legend(axes, list(NAMES))
    save("prefill")


def pools() -> None:
    """One row of keys, and what of it enters the softmax."""
    _, (above, below) = plt.subplots(2, 1, figsize=(7, 2.2), height_ratios=(1, 1))
    row = [kind(TILES - 1, block) for block in range(BLOCKS)]
    cells(above, [row])
    above.set_title("keys of one query", loc="left", fontsize=10)
    cells(below, [[FUTURE] * BLOCKS])
    below.set_title("terms of its softmax", loc="left", fontsize=10)
    width = 4  # blocks of a pool
    for block, colour in enumerate(row):
        if colour != FAR:
            below.add_patch(Rectangle((block, 0), 1, 1, facecolor=colour, edgecolor="white"))
    for pool in range(BLOCKS // width):
        far = [b for b in range(pool * width, (pool + 1) * width) if row[b] == FAR]
        if far:
            centre = far[len(far) // 2] + 0.5  # where its bar hides no attended block
            below.add_patch(Rectangle((centre - 0.2, 0), 0.4, 1, facecolor="#8c8c8c"))
            below.text(centre, 1.35, f"{64 * len(far)} keys", ha="center", fontsize=7)
    save("pools")


def save(name: str) -> None:
    plt.tight_layout()
    plt.savefig(HERE / f"{name}.png", dpi=130)
    plt.close()


if __name__ == "__main__":
    prefill()
    pools()
