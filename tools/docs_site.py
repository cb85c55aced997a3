"""MkDocs' hook: pages and files beside docs/ become part of the site.

In the repository a page links to what it names where it lies: `../SECURITY.md`,
`../examples/cpp/attention.cc`. Here such links lead to a page of the site or to a copy of the file.
A link to a file that does not exist stays as it is, and `mkdocs build --strict` fails on it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "docs/README.md": "index.md",  # the same index, for readers of the repository
}
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"(```.*?```)", re.DOTALL)


def _home(page: str) -> str:
    """Folder in the repository of a page of the site."""
    return "" if page in PAGES.values() else "docs"


def _copies(text: str, home: str) -> dict[str, Path]:
    """Files outside docs/ that a page links to, by their place in the site."""
    found = {}
    for _, target, _, _ in LINK.findall(FENCE.sub("", text)):
        name = posixpath.normpath(posixpath.join(home, target))
        if name not in PAGES and not name.startswith("docs/") and (ROOT / name).is_file():
            found[f"files/{name}"] = ROOT / name
    return found


def on_files(files: Files, config: Any) -> Files:
    for source, page in PAGES.items():
        if source != "docs/README.md":
            content = (ROOT / source).read_text(encoding="utf-8")
            files.append(File.generated(config, page, content=content))
    texts = [(file.src_uri, file.content_string) for file in files.documentation_pages()]
    for page, text in texts:
        for place, path in _copies(text, _home(page)).items():
            if place not in files.src_uris:
                files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    home, here = _home(page.file.src_uri), posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        begin, target, anchor, end = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match.group()
        name = posixpath.normpath(posixpath.join(home, target))
        if name in PAGES:
            place = PAGES[name]
        elif name.startswith("docs/"):
            place = name.removeprefix("docs/")
        elif (ROOT / name).is_file():
            place = f"files/{name}"
        else:
            return match.group()
        return f"{begin}{posixpath.relpath(place, here or '.')}{anchor or ''}{end}"

    parts = FENCE.split(markdown)
    return "".join(p if p.startswith("```") else LINK.sub(moved, p) for p in parts)
