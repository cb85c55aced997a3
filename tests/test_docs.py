"""The documents: links lead somewhere, files exist, examples run, paragraphs are short."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.testkit import tiny_lm
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


def examples(page: Path) -> str:
    """All Python of a page, one block after another."""
    text = page.read_text(encoding="utf-8")
    return "\n".join(re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("page", [p for p in PAGES if examples(p)], ids=lambda p: p.stem)
def test_examples_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On small models and inputs where the page's own are a user's."""
    code = examples(page)
    names: dict[str, object] = {}
    if "model" in code:
        transformers = pytest.importorskip("transformers", minversion="5.0")
        model, tokenizer = tiny_lm.make_model(head_dim=64), tiny_lm.make_tokenizer()
        for name, made in (("AutoModelForCausalLM", model), ("AutoTokenizer", tokenizer)):
            monkeypatch.setattr(
                getattr(transformers, name), "from_pretrained", lambda *_, made=made, **__: made
            )
        names = {"model": model, "input_ids": torch.randint(97, (1, 300))}
    code = code.replace("32, 16384, 128", "4, 640, 128").replace("8, 16384, 128", "2, 640, 128")
    exec(compile(code, str(page), "exec"), names)


def test_pictures_are_those_of_their_script(tmp_path: Path) -> None:
    matplotlib_image = pytest.importorskip("matplotlib.image")
    script = tmp_path / "draw.py"
    script.write_bytes((ROOT / "docs" / "images" / "draw.py").read_bytes())
    subprocess.run([sys.executable, script], check=True)
    for made in tmp_path.glob("*.png"):
        new, kept = map(matplotlib_image.imread, (made, ROOT / "docs" / "images" / made.name))
        assert new.shape == kept.shape and abs(new - kept).mean() < 0.02  # fonts differ a little


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
