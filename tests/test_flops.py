import subprocess
import sys

import pytest
import torch

from ltm_hf import PRESETS, LTMConfig, LTMForCausalLM, preset_config
from ltm_hf.flops import count_flops, count_parameters, paper_training_flops, training_flops

BASE = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=24,
    sliding_window=8,
    num_latents=6,
    bos_token_id=None,
    eos_token_id=None,
)
VARIANTS = {
    "gate": {},
    "no gate": dict(cross_attention_gate_init=None),
    "latent embeddings": dict(latent_embedding_std=1.0),
    "last layer": dict(cross_attention_layers=[1], cross_attention_rotary=False, cross_attention_query_std=0.2),
    "values as they are": dict(cross_attention_value_projection=False),
    "after the MLP": dict(cross_attention_after_mlp=True, num_hidden_layers=3, cross_attention_layers=[1, 2]),
    "some layers": dict(num_hidden_layers=4, cross_attention_layers=[1, 3], latent_embedding_std=1.0),
    "grouped queries": dict(num_key_value_heads=2),
    "head_dim": dict(head_dim=6, num_key_value_heads=1),
    "untied": dict(tie_word_embeddings=False),
    "one layer": dict(num_hidden_layers=1),
    "full attention": dict(sliding_window=None, num_hidden_layers=3),
    "no latents": dict(num_latents=0),
}
odd_configs = pytest.mark.parametrize("variant", VARIANTS)


def config_of(variant):
    return LTMConfig(**BASE | VARIANTS[variant])


# ------------------------------------------------------------------ the paper's figures


@pytest.mark.parametrize(
    ("preset", "parameters", "giga_flops"),
    [("ltm-small", 38_369_280, 4.07), ("ltm-medium", 51_005_952, 5.52), ("ltm-large", 76_279_296, 32.2)],
)
def test_the_papers_table(preset, parameters, giga_flops):
    config = preset_config(preset)
    assert count_parameters(config) == parameters
    assert float(f"{paper_training_flops(config) / 1e9:.3g}") == giga_flops


def test_the_papers_autoregressive_baseline():
    """AR-76M, 0.46 G: 16 layers without cross-attention have its 76M parameters."""
    config = preset_config("ltm-small", num_latents=0, num_hidden_layers=16)
    assert round(count_parameters(config) / 1e6) == 76
    assert paper_training_flops(config) == 6 * count_parameters(config)
    assert round(paper_training_flops(config) / 1e9, 2) == 0.46


def test_the_paper_counts_steps_and_tokens():
    once = paper_training_flops(preset_config("ltm-small", num_inference_steps=0))
    assert paper_training_flops(preset_config("ltm-small", num_inference_steps=63)) == 64 * once
    assert paper_training_flops(preset_config("ltm-small", num_inference_steps=0), 2048) - once == 6 * 3 * 512 * 1024


# ------------------------------------------------------------------ closed forms against real models


@pytest.mark.parametrize("config", [*map(preset_config, PRESETS), *map(config_of, VARIANTS)])
def test_parameters(config):
    with torch.device("meta"):
        model = LTMForCausalLM(config)
    assert count_parameters(config) == model.num_parameters()


@odd_configs
def test_flops(variant, batch=3, length=17):
    """Equal to torch's count, less the rotary tables: older transformers write their outer product as a matmul."""
    config = config_of(variant)
    model = LTMForCausalLM._from_config(config, attn_implementation="eager")
    input_ids = torch.randint(config.vocab_size, (batch, length))
    flops = training_flops(config, length)
    tokens = batch * length
    rotary = count_flops(lambda: model.model.rotary_emb(model.model.norm.weight, torch.arange(length)[None]))
    if config.num_latents:
        rotary += count_flops(lambda: model.model.latent_position_embeddings(model.sample_prior(1)))

    def forward():
        latents = model.sample_prior(batch) if config.num_latents else None
        return model(input_ids, latents=latents, labels=input_ids, use_cache=False).loss

    assert count_flops(forward) == round(tokens * flops.forward) + rotary
    assert count_flops(lambda: forward().backward()) == round(tokens * flops.slow_step) + rotary
    if config.num_latents:
        for steps in (1, 2, 5):
            config.num_inference_steps = steps
            fast_loop = count_flops(lambda: model.infer_posterior(input_ids))
            assert fast_loop == round(steps * tokens * training_flops(config, length).fast_step) + rotary


def test_window_counts_what_the_mask_lets_through():
    config = config_of("gate")
    pairs = sum(max(0, i - 8 + 1) <= j <= i for i in range(24) for j in range(24))
    saved = training_flops(config).forward - training_flops(config, attention="window").forward
    assert saved * 24 == pytest.approx(2 * 4 * 32 * (24 * 24 - pairs))
    assert training_flops(config, 5).forward > training_flops(config, 5, "window").forward  # still causal


def test_a_training_step_is_its_parts():
    flops = training_flops(preset_config("ltm-medium"))
    assert flops.training_step == 16 * flops.fast_step + flops.slow_step
    baseline = training_flops(config_of("no latents"))
    assert baseline.fast_step == 0 and baseline.training_step == baseline.slow_step == 3 * baseline.forward


@pytest.mark.parametrize("preset", PRESETS)
def test_a_frozen_fast_step_is_about_two_forwards(preset):
    """At most 2.1, though the masked S x S scores are computed."""
    config = preset_config(preset)
    dense, window = (training_flops(config, attention=kind) for kind in ("dense", "window"))
    assert window.fast_step <= 2.1 * window.forward and dense.fast_step <= 2.1 * dense.forward
    assert dense.training_step < 0.85 * paper_training_flops(config)


# ------------------------------------------------------------------ errors and the table


@pytest.mark.parametrize("length", [0, -3, 1.5, True, "8"])
def test_a_bad_length_is_named(length):
    for function in (paper_training_flops, training_flops):
        with pytest.raises(ValueError, match="sequence_length must be an integer of 1 or more"):
            function(preset_config("ltm-tiny"), length)


def test_another_attention_is_named():
    with pytest.raises(ValueError, match="attention must be one of dense, window; got 'flash'"):
        training_flops(preset_config("ltm-tiny"), attention="flash")


def test_the_table():
    result = subprocess.run([sys.executable, "-m", "ltm_hf.flops"], capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[1 : len(PRESETS) + 1]] == list(PRESETS)
    assert len({len(line) for line in lines[: len(PRESETS) + 1]}) == 1  # aligned
    (small,) = [line for line in lines if line.split()[:1] == ["ltm-small"]]
    assert "38,369,280" in small and "4,074" in small
