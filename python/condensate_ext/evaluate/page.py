"""The report of an evaluation as one HTML file, its pictures inside."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from condensate_ext.evaluate import report

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 0 0 2rem }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #8884 }
th:first-child, td:first-child { text-align: left }
tr.dense { color: #777 }
figure { margin: 0 0 2rem } img { max-width: 100% }
"""


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str], kind: str = "") -> str:
        return f"<tr{kind}>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = (line("td", r, ' class="dense"' if r[0].startswith("dense") else "") for r in rows)
    return (
        f"<h2>{html.escape(title)}</h2>\n<table>\n{line('th', headings)}\n"
        + "\n".join(body)
        + "\n</table>"
    )


def _picture(caption: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def make(document: dict[str, Any], pictures: dict[str, Path]) -> str:
    """The page of an evaluation's document; ``pictures`` are PNG files by caption."""
    settings, environment = document["settings"], document["environment"]
    records = document["records"]
    title = f"{settings['model']} through condensate attention"
    facts = {
        **{name: str(value) for name, value in (settings | environment).items()},
        **{f"seconds of {name}": str(value) for name, value in document["seconds"].items()},
    }
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{settings['context']:,} tokens of context, {settings['documents']} texts, "
        f"{html.escape(settings['dtype'])}; a query attends at most the keys in the second "
        "column. Grey rows are dense attention: where they are compared with dense attention, "
        "by another kernel, so that they show what rounding alone does.</p>",
        *(f"<p>{html.escape(hint)}</p>" for hint in report.hints(records)),
        *(_picture(caption, path) for caption, path in pictures.items()),
        *(_table(*report.cells(name, records)) for name in dict.fromkeys(
            r["protocol"] for r in records
        )),
        _table("What was run", ("setting", "value"), list(facts.items())),
    ]  # fmt: skip
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}'
        f"</title><style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n"
    )
