import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from ltm_hf import PRESETS, LTMForCausalLM

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "generate.py"
FEW = "--device cpu --repeats 2 --warmup 1 --num-inference-steps 2 --prompt-length 17 --new-tokens 3 --continuations 2"
FEW += " --mixed-batch-size 3 --longest-prompt 40 --compile-backend eager"
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_latents=2, vocab_size=200)


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(SCRIPT.parent), *sys.path])
        spec = importlib.util.spec_from_file_location("generate", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(script, monkeypatch, capsys):
    """What a command line prints, with a small model by the name of ltm-tiny-natural."""
    monkeypatch.setitem(PRESETS, "ltm-tiny-natural", PRESETS["ltm-tiny-natural"] | SMALL)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["generate.py", *FEW.split(), *map(str, arguments)])
        script.main()
        return capsys.readouterr().out

    yield run
    torch._dynamo.reset()


def test_benchmark(run, tmp_path):
    printed = run("--batch-sizes", 2, "--output", tmp_path / "generate.json")
    result = json.loads((tmp_path / "generate.json").read_text())
    parameters = result["settings"]["parameters"]
    width, feed_forward, vocabulary = 32, 48, 200
    plain = vocabulary * width + 4 * width**2 + 3 * width * feed_forward + 3 * width
    assert parameters["twin"] == parameters["mistral"] == parameters["llama"] == plain
    assert parameters["ltm"] == plain + 4 * width**2 + 2 * width  # cross-attention, its norm, its gate
    assert set(result["environment"]) == {"date", "hardware", "torch", "transformers"}

    assert [one["batch_size"] for one in result["decoding"]] == [2]
    for one in result["decoding"]:
        decoders = {(found["decoder"], found["cache"]): found for found in one["decoders"]}
        assert len(decoders) == 4 * 3
        for (name, _), found in decoders.items():
            for figure in ("prefill", "first_token", "token"):
                low, high = found[figure]["range"]
                assert low <= found[figure]["median"] == pytest.approx((low + high) / 2)  # of two repeats
            assert found["tokens_per_second"] == pytest.approx(1000 * one["batch_size"] / found["token"]["median"])
            thinking = one["inference"]["median"] if name == "ltm" else 0
            assert found["first_token"]["median"] == pytest.approx(found["prefill"]["median"] + thinking)
            assert name != "mistral" or found["ratio_to_mistral"]["range"] == [1, 1]

    mixed = result["mixed_lengths"]
    assert mixed["lengths"] == [16, 28, 40] and mixed["num_buckets"] == 1
    assert mixed["tokens"] == {"real": 84, "in_buckets": 120, "padded": 120}
    assert mixed["posterior_difference"] < 1e-5
    assert all(result["agree"].values())
    compared = {f"{name}: {cache} and dynamic cache" for name in parameters for cache in ("static", "compiled")}
    compared |= {"ltm: with and without a cache", "graphs before and after warm-up"}
    batched = {"ltm: a batch and its prompts alone", "ltm: in buckets and padded", "ltm: inferred once and anew"}
    assert set(result["agree"]) == {f"2 x {what}" for what in compared} | batched
    assert "All 13 comparisons agree." in printed and "1 buckets (120 tokens with padding)" in printed


def one_token_off(texts):
    return texts.index_fill(1, torch.tensor([texts.shape[1] - 1]), 3)


SPOILT = {
    "1 x ltm: with and without a cache": lambda ids, given: given.get("use_cache") is False,
    "1 x ltm: static and dynamic cache": lambda ids, given: {"cache_implementation", "posterior"} <= set(given),
    "ltm: inferred once and anew": lambda ids, given: "posterior" in given and given["do_sample"],
    "ltm: a batch and its prompts alone": lambda ids, given: len(ids) == 3,
}


@pytest.mark.parametrize("what", SPOILT)
def test_different_texts_are_an_error(run, monkeypatch, what):
    generate = LTMForCausalLM.generate

    def spoilt(model, ids, **given):
        texts = generate(model, ids, **given)
        return one_token_off(texts) if SPOILT[what](ids, given) else texts

    monkeypatch.setattr(LTMForCausalLM, "generate", spoilt)
    with pytest.raises(SystemExit, match=f"^These should give the same result and do not: {what}.$"):
        run("--batch-sizes", 1, "--caches", "dynamic", "static")


def test_different_posteriors_are_an_error(run, script, monkeypatch):
    def spoilt(model, ids, mask):
        return model.infer_posterior(ids, mask, seed=1)

    monkeypatch.setattr(script, "infer_in_buckets", spoilt)
    with pytest.raises(SystemExit, match="do not: ltm: in buckets and padded.$"):
        run("--batch-sizes", 1, "--caches", "dynamic")


def test_compiling_after_warm_up_is_an_error(run, monkeypatch):
    generate = LTMForCausalLM.generate

    def compiling(model, *args, **kwargs):
        counters["stats"]["unique_graphs"] += 1
        return generate(model, *args, **kwargs)

    monkeypatch.setattr(LTMForCausalLM, "generate", compiling)
    with pytest.raises(SystemExit, match="do not: 1 x graphs before and after warm-up.$"):
        run("--batch-sizes", 1, "--caches", "dynamic")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--batch-sizes", "0"], "argument --batch-sizes: must be an integer of 1 or more, got '0'"),
        (["--caches", "paged"], "argument --caches: invalid choice: 'paged'"),
        (["--output", "no/such/folder/generate.json"], "--output: there is no folder no/such/folder."),
    ],
)
def test_bad_input_is_named(run, capsys, arguments, sentence):
    with pytest.raises(SystemExit, match="2"):
        run(*arguments)
    assert sentence in capsys.readouterr().err
