"""What a long-running process may keep: a call leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import condensate_ext
import pytest
import torch

from tests.test_torch_integration import OPS, small_case, sound_call

WARM_UP, CALLS = 4000, 16000  # 49 bytes a call would be 784 kB
ROUNDS = 3  # a leak grows in each of them; a heap that other tests left behind settles
MEBIBYTE = 2**20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_no_operator_takes_a_string():
    """torch's stable ABI allocates a string for a `str` argument, and nobody deletes it."""
    for name in OPS:
        schema = getattr(torch.ops.condensate, name).default._schema
        assert not [a.name for a in schema.arguments if "str" in str(a.type)], schema


@pytest.mark.parametrize("name", OPS)
def test_calls_leave_nothing_behind(device, name):
    positional, keywords = sound_call(name, small_case(device))
    op = getattr(torch.ops.condensate, name)
    for _ in range(WARM_UP):
        op(*positional, **keywords)
    grown = []
    for _ in range(ROUNDS):
        before = resident_bytes()
        for _ in range(CALLS):
            op(*positional, **keywords)
        grown.append(resident_bytes() - before)
        if grown[-1] < MEBIBYTE // 2:
            break
    assert grown[-1] < MEBIBYTE // 2, f"{grown} bytes in rounds of {CALLS} calls"
    assert condensate_ext.read_error_word(device) == condensate_ext.ErrorWord.NONE
