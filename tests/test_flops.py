import pytest
import torch

from ltm_hf import PRESETS, LTMConfig, LTMForCausalLM, preset_config
from ltm_hf.costs import flops
from ltm_hf.costs.flops import count_flops, count_parameters, paper_training_flops, training_flops
from ltm_hf.inference_ltm import amortized_posterior
from ltm_hf.likelihood_ltm import Text
from ltm_hf.memory_ltm import prior_state

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
PAPER = dict(latent_reader="paper")
VARIANTS = {
    "gate": PAPER,
    "no gate": dict(**PAPER, latent_gate_init=None),
    "last layer": dict(**PAPER, latent_layers=[1]),
    "some layers": dict(**PAPER, num_hidden_layers=4, latent_layers=[1, 3]),
    "grouped queries": dict(**PAPER, num_key_value_heads=2),
    "head_dim": dict(**PAPER, head_dim=6, num_key_value_heads=1),
    "untied": dict(**PAPER, tie_word_embeddings=False),
    "one layer": dict(**PAPER, num_hidden_layers=1),
    "full attention": dict(**PAPER, sliding_window=None, num_hidden_layers=3),
    "an encoder": dict(**PAPER, inference_method="amortized"),
    "an encoder, grouped": dict(
        **PAPER, inference_method="amortized", self_attention="qwen2", num_key_value_heads=1, head_dim=6
    ),
    "no latents": dict(num_latents=0),
    "a memory": {},
    "a memory of chunks that divide the text": dict(latent_chunk=1),
    "a memory, grouped and untied": dict(num_key_value_heads=2, tie_word_embeddings=False, latent_chunk=5),
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


def test_the_paper_has_no_account_of_an_encoder_and_pays_no_loop_for_a_memory():
    with pytest.raises(ValueError, match="no account of an encoder"):
        paper_training_flops(config_of("an encoder"))
    assert paper_training_flops(config_of("a memory")) == 6 * count_parameters(config_of("a memory"))


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
    ids = torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    costs = training_flops(config, length)

    def tables(module, positions):
        return count_flops(lambda: module.rotary_emb(model.model.norm.weight, torch.arange(positions)[None]))

    rotary = tables(model.model, length)
    if config.reading_layers:
        rotary += count_flops(lambda: model.model.latent_position_embeddings(model.sample_prior(1)))

    def forward():
        latents = model.sample_prior(batch) if config.num_latents else None
        return model(ids, latents=latents, labels=ids, use_cache=False).loss

    def slow_step():
        if config.has_memory:
            memory = dict(latent_state=prior_state(config, batch), latent_noise=torch.randn(batch, length, 32))
            return model(ids, labels=ids, loss_reduction="mean", use_cache=False, **memory).loss.backward()
        if config.has_encoder:
            latents = amortized_posterior(model, Text.of(model, ids)).sample(seed=0)
            return model(ids, latents=latents, labels=ids, use_cache=False).loss.backward()
        return forward().backward()

    assert count_flops(forward) == round(batch * length * costs.forward) + rotary
    if config.has_encoder:
        rotary += batch * tables(model.encoder, length + config.num_latents)  # positions differ by row
    assert count_flops(slow_step) == round(batch * length * costs.slow_step) + rotary
    if not config.reading_layers or config.has_encoder:
        assert costs.fast_step == 0 and costs.training_step == costs.slow_step
        return
    for steps in (1, 2, 5):
        config.num_inference_steps = steps
        fast_loop = count_flops(lambda: model.infer_posterior(ids))
        assert fast_loop == round(steps * batch * length * training_flops(config, length).fast_step) + rotary


def test_window_counts_what_the_mask_lets_through():
    config = config_of("gate")
    pairs = sum(max(0, i - 8 + 1) <= j <= i for i in range(24) for j in range(24))
    saved = training_flops(config).forward - training_flops(config, attention="window").forward
    assert saved * 24 == pytest.approx(2 * 4 * 32 * (24 * 24 - pairs))
    assert training_flops(config, 5).forward > training_flops(config, 5, "window").forward  # still causal


def test_a_training_step_is_its_parts():
    costs = training_flops(preset_config("ltm-medium"))
    assert costs.training_step == 16 * costs.fast_step + costs.slow_step
    twin = training_flops(config_of("no latents"))
    assert twin.training_step == twin.slow_step == 3 * twin.forward


@pytest.mark.parametrize("preset", [name for name in PRESETS if preset_config(name).reading_layers])
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


def test_the_table(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["flops"])
    flops.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : len(PRESETS) + 1]] == list(PRESETS)
    assert len({len(line) for line in lines[: len(PRESETS) + 1]}) == 1  # aligned
    (small,) = [line for line in lines if line.split()[:1] == ["ltm-small"]]
    assert "38,369,280" in small and "4,074" in small
