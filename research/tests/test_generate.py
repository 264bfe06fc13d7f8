import json

import pytest
import torch
from torch._dynamo.utils import counters

from ltm_hf import LTMForCausalLM
from research.benchmarks import generate

FEW = "--device cpu --repeats 2 --warmup 1 --prompt_length 17 --new_tokens 3 --continuations 2 --mixed_batch_size 3 "
FEW += "--longest_prompt 40 --compile_backend eager"
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_latents=2, vocab_size=200)
PRESETS = {"memory": ("ltm-tiny", {}), "paper": ("ltm-tiny-paper", {"num_inference_steps": 2})}


@pytest.fixture
def benchmark(run):
    def benchmark(reader, *more):
        preset, overrides = PRESETS[reader]
        given = ["--preset", preset, "--config_overrides", json.dumps(SIZES | overrides)]
        return run("benchmarks.generate", *FEW.split(), *given, *more)

    yield benchmark
    torch._dynamo.reset()


@pytest.mark.parametrize(("reader", "caches"), [("paper", generate.CACHES), ("memory", ("dynamic",))])
def test_benchmark(benchmark, tmp_path, reader, caches):
    output = tmp_path / "generate.json"
    said = benchmark(reader, "--batch_sizes", 2, "--caches", *caches, "--output", output)
    result = json.loads(output.read_text())
    parameters = result["settings"]["parameters"]
    assert parameters["twin"] == parameters["mistral"] == parameters["llama"] < parameters["ltm"]
    assert set(result["environment"]) == {"date", "hardware", "torch", "transformers"}
    (one,) = result["decoding"]
    assert one["batch_size"] == 2 and (one["inference"]["median"] > 0) == (reader == "paper")
    decoders = {(found["decoder"], found["cache"]): found for found in one["decoders"]}
    assert len(decoders) == 4 * len(caches)
    for (name, _), found in decoders.items():
        for figure in ("prefill", "first_token", "token"):
            low, high = found[figure]["range"]
            assert low <= found[figure]["median"] == pytest.approx((low + high) / 2)  # of two repeats
        assert found["tokens_per_second"] == pytest.approx(1000 * 2 / found["token"]["median"])
        thinking = one["inference"]["median"] if name == "ltm" else 0
        assert found["first_token"]["median"] == pytest.approx(found["prefill"]["median"] + thinking)
        assert name != "mistral" or found["ratio_to_mistral"]["range"] == [1, 1]
    compared = {f"{name}: {cache} and dynamic cache" for name in parameters for cache in caches if cache != "dynamic"}
    compared |= {"ltm: with and without a cache", "graphs before and after warm-up"}
    expected = {f"2 x {what}" for what in compared} | {"ltm: a batch and its prompts alone"}
    if reader == "paper":
        expected |= {"ltm: in buckets and padded", "ltm: inferred once and anew"}
        mixed = result["mixed_lengths"]
        assert mixed["lengths"] == [16, 28, 40] and mixed["num_buckets"] == 1
        assert mixed["tokens"] == {"real": 84, "in_buckets": 120, "padded": 120}
        assert mixed["posterior_difference"] < 1e-5 and "1 buckets (120 tokens with padding)" in said
    assert set(result["agree"]) == expected and all(result["agree"].values())
    assert f"All {len(expected)} comparisons agree." in said


def one_token_off(texts):
    return texts.index_fill(1, torch.tensor([texts.shape[1] - 1]), 3)


SPOILT = {
    "1 x ltm: with and without a cache": lambda ids, given: given.get("use_cache") is False,
    "1 x ltm: static and dynamic cache": lambda ids, given: {"cache_implementation", "posterior"} <= set(given),
    "ltm: inferred once and anew": lambda ids, given: "posterior" in given and given["do_sample"],
    "ltm: a batch and its prompts alone": lambda ids, given: len(ids) == 3,
}


@pytest.mark.parametrize("what", SPOILT)
def test_different_texts_are_an_error(benchmark, monkeypatch, what):
    write = LTMForCausalLM.generate

    def spoilt(model, ids, **given):
        texts = write(model, ids, **given)
        return one_token_off(texts) if SPOILT[what](ids, given) else texts

    monkeypatch.setattr(LTMForCausalLM, "generate", spoilt)
    with pytest.raises(SystemExit, match=f"^These should give the same result and do not: {what}.$"):
        benchmark("paper", "--batch_sizes", 1, "--caches", "dynamic", "static")


def test_different_posteriors_are_an_error(benchmark, monkeypatch):
    monkeypatch.setattr(generate, "infer_in_buckets", lambda model, ids, mask: model.infer_posterior(ids, mask, seed=1))
    with pytest.raises(SystemExit, match="do not: ltm: in buckets and padded.$"):
        benchmark("paper", "--batch_sizes", 1, "--caches", "dynamic")


def test_compiling_after_warm_up_is_an_error(benchmark, monkeypatch):
    write = LTMForCausalLM.generate

    def compiling(model, *args, **kwargs):
        counters["stats"]["unique_graphs"] += 1
        return write(model, *args, **kwargs)

    monkeypatch.setattr(LTMForCausalLM, "generate", compiling)
    with pytest.raises(SystemExit, match="do not: 1 x graphs before and after warm-up.$"):
        benchmark("paper", "--batch_sizes", 1, "--caches", "dynamic")


def test_bad_input_is_named(refused):
    assert "argument --caches: invalid choice: 'paged'" in refused("benchmarks.generate", "--caches", "paged")
