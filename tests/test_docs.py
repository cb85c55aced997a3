"""The documents: links lead somewhere, files exist, paragraphs are short, a figure comes first."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools import readme_table

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FIGURE_FIRST = ("architecture", "decoding", "definition", "extending", "hopper")
LONG = ("ablations", "CHANGELOG", "reliability")  # entries, not paragraphs
WORDS = 100

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(text: str) -> set[str]:
    """GitHub's names of the headings."""
    titles = re.findall(r"^#+ (.*)$", without_code(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def paragraphs(text: str) -> list[str]:
    prose = re.sub(r"^(\||#|<!--|    ).*$", "", without_code(text), flags=re.MULTILINE)
    return re.split(r"\n\s*\n|\n(?=- |\d+\. )", prose)


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page.name}: {target}"


@pages
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(
        r"`((?:csrc|python|tests|tools|cmake|bench|examples|docs)/[\w./]+)`",
        without_code(page.read_text(encoding="utf-8")),
    )
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("page", [p for p in PAGES if p.stem not in LONG], ids=lambda p: p.stem)
def test_paragraphs_are_short(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    long = [part[:60] for part in paragraphs(text) if len(part.split()) > WORDS]
    assert not long, f"more than {WORDS} words"


@pytest.mark.parametrize("name", FIGURE_FIRST)
def test_a_figure_comes_first(name: str) -> None:
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert re.match(r"# .*\n\n```\n", text)


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index


@pytest.mark.parametrize("page", readme_table.PAGES)
def test_tables_are_those_of_the_results(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert readme_table.fill(page, text) == text
    older = re.sub(r"\d(?=x \||.*\(95)", "7", text)
    assert older != text and readme_table.fill(page, older) == text
