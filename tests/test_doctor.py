"""`python -m condensate_ext doctor`: what it reports, and that it notices what does not work."""

from __future__ import annotations

import json
import re

import condensate_ext
import condensate_ext.ops
import pytest
from condensate_ext import cli
from condensate_ext.commands import checks


def test_a_working_installation(capsys):
    assert cli.main(["doctor"]) == 0
    report = capsys.readouterr().out
    assert "Nothing is missing." in report
    for path in ("cpu cpu ", "cpu cpu_reference"):
        for name in checks.CHECKS:
            assert re.search(rf"{path} +{name}: ok", report)


def test_json_has_every_finding(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["problems"] == [] and document["versions"]["torch"]
    assert {c["path"] for c in document["self-check"] if c["device"] == "cpu"} == {
        "cpu", "cpu_reference",
    }  # fmt: skip
    assert {c["status"] for c in document["self-check"]} <= {"ok", "not usable"}


def test_unknown_arguments_are_refused(capsys):
    assert cli.main(["doctor", "--bogus"]) == 2
    assert "--bogus" in capsys.readouterr().err
    assert cli.main(["physician"]) == 2
    assert "physician" in capsys.readouterr().err


BROKEN = {  # what a function does wrong: the check that notices
    ("ops", "attention"): ({"scale": 0.2}, "dense"),
    ("ops", "attention_forward"): ({"topk": 0}, "selection"),
    ("", "attention_with_kvcache"): ({"far_field": False}, "decode over a cache"),
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken[1])
def test_the_self_check_notices(monkeypatch, capsys, broken):
    module = condensate_ext.ops if broken[0] else condensate_ext
    sound = getattr(module, broken[1])
    changes, check = BROKEN[broken]
    monkeypatch.setattr(
        module, broken[1], lambda *args, **options: sound(*args, **{**options, **changes})
    )
    assert cli.main(["doctor"]) == 1
    assert f"self-check of {check} on cpu cpu failed" in capsys.readouterr().out


def test_a_far_field_that_is_left_out_is_noticed(monkeypatch):
    sound = condensate_ext.ops.attention
    monkeypatch.setattr(
        condensate_ext.ops, "attention", lambda *a, **o: sound(*a, **{**o, "far_field": False})
    )
    with pytest.raises(RuntimeError, match=r"differs from dense attention|proves nothing"):
        checks.far_field("cpu")


def test_a_path_that_cannot_run_is_no_failure(monkeypatch):
    monkeypatch.setitem(checks.PATHS, "cpu", ("sm80",))
    found = list(checks.run())
    assert {c.status for c in found} == {"not usable"}
    assert "cannot run this call" in found[0].detail
