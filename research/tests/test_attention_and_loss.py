import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "attention_and_loss.py"
TINY = "--device cpu --batch-size 1 --sequence-length 400 --repeats 2 --warmup 1".split()


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("attention_and_loss", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *TINY, *map(str, arguments)])
    script.main()


def test_benchmark(script, monkeypatch, tmp_path, capsys):
    output = tmp_path / "figures.json"
    run(script, monkeypatch, "--output", output)
    result, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert set(result["environment"]) == {"date", "hardware", "torch", "transformers"}
    assert set(result["comparisons"]) == {"attention", "frozen loss", "learning loss"}
    missing = set()
    for figures in result["comparisons"].values():
        for name, one in figures.items():
            assert name in printed
            if "not available" in one:
                missing.add(name)
                continue
            low, high = one["milliseconds_range"]
            assert 0 < low <= one["milliseconds"] <= high and one["relative_difference"] < 1e-4
        assert next(iter(figures.values()))["relative_difference"] == 0.0  # the reference
    kernels = {"flex_attention", "varlen_attn", "flash_attention_3", "liger_kernel", "cut_cross_entropy"}
    assert missing - {"linear_cross_entropy", "linear_cross_entropy, chunked"} == kernels
    assert "varlen_attn: not available here: needs a CUDA device" in printed


def test_disagreement_is_an_error(script, monkeypatch):
    wrong = script.token_losses
    monkeypatch.setattr(script, "token_losses", lambda *given: 1.01 * wrong(*given))
    with pytest.raises(SystemExit, match="chunked does not agree with the reference of frozen loss: relative diff"):
        run(script, monkeypatch)


def test_memory_of_a_process(script, monkeypatch, capsys):
    run(script, monkeypatch, "--only", "attention", "sdpa")
    assert 2**27 < int(capsys.readouterr().out.split()[-1]) < 2**33


def test_padding_gives_no_probability(script):
    weight = torch.randn(61, 8, generator=torch.Generator().manual_seed(0))
    head, states = script.PaddedHead(weight), torch.ones(1, 3, 8)
    logits = head(states)
    assert logits.shape == (1, 3, 64) and logits[..., 61:].isneginf().all()
    torch.testing.assert_close(logits[..., :61], states @ weight.T)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--repeats", "0"], "argument --repeats: must be an integer of 1 or more, got '0'"),
        (["--output", "no/such/folder/x.json"], "--output: there is no folder no/such/folder."),
    ],
)
def test_bad_input_is_named(script, monkeypatch, capsys, arguments, sentence):
    with pytest.raises(SystemExit):
        run(script, monkeypatch, *arguments)
    assert sentence in capsys.readouterr().err
