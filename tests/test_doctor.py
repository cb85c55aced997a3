"""`python -m condensate_ext doctor`: what it reports, and that it notices what does not work."""

from __future__ import annotations

import condensate_ext.ops
import pytest
from condensate_ext import cli


def test_a_working_installation(capsys):
    assert cli.main(["doctor"]) == 0
    report = capsys.readouterr().out
    assert "Nothing is missing." in report
    assert "agrees with torch's own" in report and "every selector finds" in report


def test_unknown_arguments_are_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor", "--bogus"])
    assert caught.value.code == 2 and "--bogus" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["attention", "attention_forward"])
def test_the_self_check_notices(monkeypatch, capsys, broken):
    """Neither all keys attended to wrongly nor a selection that finds nothing goes unnoticed."""
    sound = getattr(condensate_ext.ops, broken)
    changes = {"attention": {"scale": 0.2}, "attention_forward": {"topk": 0}}[broken]
    monkeypatch.setattr(
        condensate_ext.ops, broken, lambda *args, **options: sound(*args, **{**options, **changes})
    )
    assert cli.main(["doctor"]) == 1
    assert "self-check on cpu failed" in capsys.readouterr().out
