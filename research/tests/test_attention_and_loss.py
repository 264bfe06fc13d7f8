import json

import pytest
import torch

from research.benchmarks import attention_and_loss

TINY = "--device cpu --batch_size 1 --sequence_length 400 --repeats 2 --warmup 1".split()


def test_benchmark(run, tmp_path):
    output = tmp_path / "figures.json"
    said = run("benchmarks.attention_and_loss", *TINY, "--output", output)
    result, missing = json.loads(output.read_text()), set()
    assert set(result["environment"]) == {"date", "hardware", "torch", "transformers"}
    assert set(result["comparisons"]) == {"attention", "frozen loss", "learning loss"}
    for figures in result["comparisons"].values():
        for name, one in figures.items():
            assert name in said
            if "not available" in one:
                missing.add(name)
                continue
            low, high = one["milliseconds_range"]
            assert 0 < low <= one["milliseconds"] <= high and one["relative_difference"] < 1e-4
        assert next(iter(figures.values()))["relative_difference"] == 0.0  # the reference
    kernels = {"flex_attention", "varlen_attn", "flash_attention_3", "liger_kernel", "cut_cross_entropy"}
    assert missing - {"linear_cross_entropy", "linear_cross_entropy, chunked"} == kernels
    assert "varlen_attn: not available here: needs a CUDA device" in said


def test_disagreement_is_an_error(run, monkeypatch):
    wrong = attention_and_loss.token_losses
    monkeypatch.setattr(attention_and_loss, "token_losses", lambda *given: 1.01 * wrong(*given))
    with pytest.raises(SystemExit, match="chunked does not agree with the reference of frozen loss: relative diff"):
        run("benchmarks.attention_and_loss", *TINY)


def test_memory_of_a_process(run):
    assert 2**27 < int(run("benchmarks.attention_and_loss", *TINY, "--only", "attention", "sdpa").split()[-1]) < 2**33


def test_padding_gives_no_probability():
    weight = torch.randn(61, 8, generator=torch.Generator().manual_seed(0))
    head, states = attention_and_loss.PaddedHead(weight), torch.ones(1, 3, 8)
    logits = head(states)
    assert logits.shape == (1, 3, 64) and logits[..., 61:].isneginf().all()
    torch.testing.assert_close(logits[..., :61], states @ weight.T)
