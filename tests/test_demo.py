"""The demo on its layer, which is a package of its own."""

import builtins
import sys

import pytest
import torch
from condensate_ext import captured, cli
from condensate_ext.commands import demo

pytest.importorskip(captured.PACKAGE, reason="pip install ./examples/demo_layer")


def hide_module(monkeypatch, name):
    """Makes `import name` fail as if it were not installed."""
    original = builtins.__import__

    def refuse(module, *args, **kwargs):
        if module.split(".")[0] == name:
            raise ImportError(f"no {name} here", name=name)
        return original(module, *args, **kwargs)

    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", refuse)


def test_captured_layer_is_real_and_asks_for_its_statement():
    layer = captured.load()
    assert layer.query.shape == (1, 8, 1024, 128)
    assert layer.key.shape == layer.value.shape == (1, 2, 6144, 128)
    scores = layer.query[0, captured.HEAD, -1] @ layer.key[0, 0].T * 128**-0.5
    begin, end = layer.statement
    assert scores.softmax(-1)[begin:end].sum() > 0.9


def test_keys_per_query_counts_the_support():
    layer = captured.load()
    assert demo.keys_per_query(layer, "exact", 1024) == 1024
    count = demo.keys_per_query(layer, "block", 1024)
    assert 1024 - 64 <= count <= 1024  # listed blocks may overlap the window


@pytest.mark.slow
def test_demo_prints_a_table_and_draws(tmp_path, capsys):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    png = tmp_path / "support.png"
    assert cli.main(["demo", "--device", "cpu", "--png", str(png)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    for selector, _ in demo.LAYER_CASES:
        assert selector in out


def test_missing_matplotlib_is_said(monkeypatch, tmp_path):
    hide_module(monkeypatch, "matplotlib")
    said = demo.draw_support(captured.load(), tmp_path / "support.png")
    assert "pip install matplotlib" in said


def test_missing_typer_is_said(monkeypatch, capsys):
    for module in [m for m in sys.modules if m.startswith("condensate_ext.commands")]:
        monkeypatch.delitem(sys.modules, module)
    hide_module(monkeypatch, "typer")
    assert cli.main(["demo"]) == 1
    assert "pip install typer" in capsys.readouterr().out


def test_a_missing_layer_is_said(monkeypatch, capsys):
    monkeypatch.setattr(captured, "PACKAGE", "no_such_package")
    assert cli.main(["demo"]) == 1
    assert "pip install ./examples/demo_layer" in capsys.readouterr().out


def test_dense_attention_aligns_queries_to_the_last_keys():
    layer = captured.load()
    query, key, value = layer.query[:, :, -3:], layer.key[:, :, :64], layer.value[:, :, :64]
    out = demo.dense_attention(query, key, value)
    scores = query[0, 0, 0] @ key[0, 0, :62].T * 128**-0.5
    torch.testing.assert_close(out[0, 0, 0], scores.softmax(-1) @ value[0, 0, :62])
