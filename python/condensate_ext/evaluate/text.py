"""Windows of tokens from a text file with documents separated by NUL bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

_CHARACTERS = 16  # a token has fewer than that on average: enough text without tokenising it all


@dataclass(frozen=True)
class Window:
    """A stretch of one document that begins at the beginning of a line."""

    ids: list[int]
    text: str  # at least what the ids stand for


def leading_tokens(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text; models rely on them."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    special = tokenizer("a", add_special_tokens=True).input_ids
    begin = next(n for n in range(len(special)) if special[n : n + len(plain)] == plain)
    return list(special[:begin])


def _windows(document: str, tokenizer: Any, tokens: int) -> Iterator[Window]:
    """Windows of ``tokens`` tokens that do not overlap, as many as the document has."""
    leading = leading_tokens(tokenizer)
    begin = 0
    while begin < len(document):
        text = document[begin : begin + _CHARACTERS * tokens]
        encoded = tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            truncation=True,
            max_length=tokens - len(leading),
        )
        if len(encoded.input_ids) < tokens - len(leading):
            return
        yield Window([*leading, *encoded.input_ids], text)
        end = begin + encoded.offset_mapping[-1][1]
        begin = document.find("\n", end) + 1 or len(document)


def read_windows(path: Path, tokenizer: Any, tokens: int, count: int) -> list[Window]:
    """At most ``count`` windows, in turn from every document: first windows first.

    Raises:
        ValueError: no document is long enough.
    """
    documents = path.read_text(encoding="utf-8").split("\0")
    rounds = zip_longest(*(_windows(document, tokenizer, tokens) for document in documents))
    found = (window for windows in rounds for window in windows if window is not None)
    windows = list(islice(found, count))
    if not windows:
        raise ValueError(
            f"--text {path}: none of its {len(documents)} documents has {tokens} tokens; give a "
            "longer text or a shorter --context."
        )
    return windows
