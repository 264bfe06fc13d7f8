"""What generate() infers, from what, and that every way to call it writes the text that plain forwards would.

What a memory does while it writes is in `test_memory_generation.py`.
"""

import json

import pytest
import torch
import transformers
from accelerate import cpu_offload
from transformers import GenerationConfig

from ltm_hf import LTMForCausalLM, preset_config
from ltm_hf.cache_ltm import kept_latents
from ltm_hf.memory_ltm import prior_state

# Three windows and more, and no early end.
GREEDY = dict(do_sample=False, max_new_tokens=14, min_new_tokens=14)


@pytest.fixture
def prompts(make_ids):
    return make_ids(length=7)


def continuation(ids, prompt_length):
    return ids[:, prompt_length:].tolist()


def logits_of(model, ids, latents=None):
    """Of the whole text, without generate(): given the latents, or read with a memory."""
    if model.config.has_memory:
        return model(ids, latent_state=prior_state(model.config, len(ids))).logits
    return model(ids, latents=latents).logits


def manual_greedy(model, prompt, latents=None, new_tokens=14):
    """Greedy decoding one token at a time from the whole text, without generate()."""
    ids = prompt
    for _ in range(new_tokens):
        logits = logits_of(model, ids, latents)[:, -1].detach().clone()
        logits[:, model.config.eos_token_id] = -torch.inf
        ids = torch.cat((ids, logits.argmax(dim=-1, keepdim=True)), dim=1)
    return ids


# ------------------------------------------------------------------ what is inferred, and from what


@torch.no_grad()
def test_greedy_reads_the_posterior_mean_of_the_prompt(paper_model, prompts):
    model, posterior = paper_model, paper_model.infer_posterior(prompts)
    expected = manual_greedy(model, prompts, posterior.mean)
    assert torch.equal(model.generate(prompts, **GREEDY), expected)
    assert torch.equal(model.generate(input_ids=prompts, **GREEDY), expected)
    assert torch.equal(model.generate(prompts, latents=posterior.mean, **GREEDY), expected)
    assert not torch.equal(model.generate(prompts, latents=torch.zeros_like(posterior.mean), **GREEDY), expected)


@pytest.mark.parametrize(
    "settings",
    [
        dict(num_inference_steps=9),
        dict(num_inference_steps=0),
        dict(inference_method="adamw", inference_learning_rate=0.3),
        dict(inference_lr_schedule="constant"),
        dict(inference_noise="fixed", num_inference_steps=4),
        dict(inference_kl_weight=0.1),
        dict(inference_seed=3),
    ],
    ids=str,
)
@pytest.mark.parametrize("given_in", ["keywords", "generation config"])
def test_settings_of_one_call(paper_model, prompts, settings, given_in):
    model = paper_model
    posterior = model.infer_posterior(
        prompts, **{name.replace("inference_seed", "seed"): x for name, x in settings.items()}
    )
    expected = model.generate(prompts, latents=posterior.mean, **GREEDY)
    if given_in == "keywords":
        actual = model.generate(prompts, **GREEDY, **settings)
    else:
        actual = model.generate(prompts, GenerationConfig(**GREEDY, **settings, pad_token_id=0, eos_token_id=2))
    assert torch.equal(actual, expected)
    assert not torch.allclose(posterior.mean, model.infer_posterior(prompts).mean)


def test_more_steps_have_an_effect(model, make_ids):
    prompts = make_ids(rows=8, length=7)
    few, many = (model.generate(prompts, num_inference_steps=steps, **GREEDY) for steps in (0, 16))
    assert not torch.equal(few, many)


def test_inference_runs_once_a_call(paper_model, prompts, monkeypatch):
    calls, project = [], paper_model.project_latents
    monkeypatch.setattr(paper_model, "project_latents", lambda latents: calls.append(latents.shape) or project(latents))
    paper_model.generate(prompts, num_beams=3, num_return_sequences=2, **GREEDY)
    assert calls == [(3, 2, 2, 32)]


def test_settings_are_saved_reloaded_and_in_effect(model, reader, prompts, tmp_path):
    settings = dict(num_inference_steps=7, inference_seed=5)
    if reader == "paper":
        settings["inference_noise"] = "fixed"
    expected = model.generate(prompts, **settings, **GREEDY)
    once = model.generate(prompts, **settings | dict(num_inference_steps=1), **GREEDY)
    assert not torch.equal(once, expected)
    model.generation_config.update(**settings)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert {name: saved[name] for name in settings} == settings
    loaded = LTMForCausalLM.from_pretrained(tmp_path)
    for ours in (model, loaded):
        assert torch.equal(ours.generate(prompts, **GREEDY), expected)
        assert torch.equal(ours.generate(prompts, num_inference_steps=1, **GREEDY), once)  # a call's own go first
    loaded.save_pretrained(tmp_path / "again")
    assert LTMForCausalLM.from_pretrained(tmp_path / "again").generation_config.inference_seed == 5


def test_model_without_saved_settings(model, prompts, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    loaded = LTMForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(prompts, **GREEDY), model.generate(prompts, **GREEDY))


# ------------------------------------------------------------------ decoding


@pytest.mark.parametrize("kwargs", [{}, dict(cache_implementation="static"), dict(prefill_chunk_size=3)], ids=str)
@pytest.mark.parametrize("beams", [1, 3])
def test_caches_change_nothing(model, prompts, pad_rows, kwargs, beams):
    batch, mask = pad_rows([prompts[0], prompts[1, :3]], "left")
    settings = GREEDY | dict(attention_mask=mask, num_beams=beams)
    uncached = model.generate(batch, use_cache=False, **settings)
    assert uncached.shape == (2, 9 + 14)
    assert torch.equal(model.generate(batch, **settings, **kwargs), uncached)


@pytest.mark.parametrize("overrides", [dict(latent_reader="paper", sliding_window=None), dict(num_latents=0)])
def test_other_models(make_model, prompts, overrides):
    model = make_model(**overrides)
    latents = model.infer_posterior(prompts).mean if model.config.num_latents else None
    expected = manual_greedy(model, prompts, latents)
    assert torch.equal(model.generate(prompts, **GREEDY), expected)
    assert torch.equal(model.generate(prompts, use_cache=False, **GREEDY), expected)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        dict(num_beams=3),
        dict(cache_implementation="static"),
        dict(prefill_chunk_size=2),
        dict(num_inference_steps=3),
    ],
    ids=str,
)
def test_left_padded_rows_read_as_alone(model, prompts, pad_rows, kwargs):
    rows = [prompts[0], prompts[1, :3], prompts[2, :1]]
    batch, mask = pad_rows(rows, "left")
    together = continuation(model.generate(batch, attention_mask=mask, **GREEDY, **kwargs), batch.shape[1])
    assert together == continuation(model.generate(batch, **GREEDY, **kwargs), batch.shape[1])  # told by its token
    for row, text in zip(rows, together, strict=True):
        alone = model.generate(row[None], **GREEDY, **kwargs)
        assert continuation(alone, len(row)) == [text]


def test_mask_counts_where_padding_is_an_ordinary_token(model, prompts, pad_rows):
    batch, mask = pad_rows([prompts[0], prompts[1, :3]], "left", fill=9)
    together = continuation(model.generate(batch, attention_mask=mask, **GREEDY), batch.shape[1])
    alone = continuation(model.generate(prompts[1:2, :3], **GREEDY), 3)
    assert together[1:] == alone
    assert continuation(model.generate(batch, **GREEDY), batch.shape[1])[1:] != alone


def test_padding_with_the_end_of_text_is_read(model, prompts, pad_rows):
    """As in transformers: without a mask, an end of text is a token like any other."""
    batch, _ = pad_rows([prompts[0], prompts[1, :3]], "left", fill=2)
    expected = model.generate(batch, attention_mask=torch.ones_like(batch), **GREEDY)
    assert torch.equal(model.generate(batch, pad_token_id=2, **GREEDY), expected)


@torch.no_grad()
def test_beams(model, prompts):
    settings = GREEDY | dict(num_beams=4)
    beams = model.generate(prompts, **settings)
    latents = None if model.config.has_memory else model.infer_posterior(prompts).mean

    def score(ids):
        log_probabilities = logits_of(model, ids, latents)[:, 6:-1].log_softmax(-1)
        return log_probabilities.gather(-1, ids[:, 7:, None]).sum()

    assert score(beams) > score(model.generate(prompts, **GREEDY))
    several = model.generate(prompts, num_return_sequences=4, **settings)
    assert torch.equal(several[::4], beams)
    assert len({tuple(row) for row in several[:4].tolist()}) == 4


def test_sampling_follows_the_global_generator(model, prompts):
    kwargs = GREEDY | dict(do_sample=True, num_return_sequences=3)
    torch.manual_seed(0)
    first, second = model.generate(prompts, **kwargs), model.generate(prompts, **kwargs)
    for use_cache in (True, False):
        torch.manual_seed(0)
        assert torch.equal(model.generate(prompts, use_cache=use_cache, **kwargs), first)
    assert not torch.equal(first, second)
    assert first.shape == (9, 21)
    assert torch.equal(first[:, :7], prompts.repeat_interleave(3, dim=0))


def test_sampled_or_mean_latents(paper_model, prompts, monkeypatch):
    model, seen, project = paper_model, [], paper_model.project_latents
    monkeypatch.setattr(model, "project_latents", lambda latents: seen.append(latents) or project(latents))
    posterior = model.infer_posterior(prompts)

    def read(**kwargs):
        torch.manual_seed(0)
        model.generate(prompts, max_new_tokens=2, **kwargs)
        return seen[-1]

    torch.manual_seed(0)
    sample = posterior.sample()
    assert torch.equal(read(do_sample=False), posterior.mean)
    assert torch.equal(read(), posterior.mean)
    assert torch.equal(read(do_sample=True), sample)
    assert torch.equal(read(do_sample=True, sample_latents=False), posterior.mean)
    assert torch.equal(read(do_sample=False, sample_latents=True), sample)
    chain = dict(inference_method="langevin")
    assert torch.equal(read(do_sample=True, **chain), model.infer_posterior(prompts, **chain).mean)
    assert torch.equal(read(generation_config=GenerationConfig(do_sample=True)), sample)


def test_greedy_calls_agree_and_leave_the_generator_alone(model, prompts):
    before = torch.get_rng_state()
    first = model.generate(prompts, **GREEDY)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(model.generate(prompts, **GREEDY), first)


def test_training_state_is_left_alone(model, prompts):
    model.train()
    model(prompts, labels=prompts).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.generate(prompts, num_inference_steps=2, **GREEDY)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in gradients), name
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name]), name


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inside_no_grad_and_inference_mode(model, prompts, context):
    expected = model.generate(prompts, num_inference_steps=2, **GREEDY)
    with context():
        for rows in (3, 1):
            actual = model.generate(prompts[:rows] + 0, num_inference_steps=2, **GREEDY)
            assert torch.equal(actual, expected[:rows])


# The oldest transformers cannot take rejected tokens out of a full sliding cache: the window is longer than the text.
def test_prompt_lookup(make_model, prompts):
    model, prompt = make_model(latent_reader="paper", sliding_window=64), prompts[:1].repeat(1, 3)
    expected = model.generate(prompt, **GREEDY)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **GREEDY), expected)


@pytest.mark.parametrize(
    "overrides",
    [
        dict(latent_reader="paper", num_hidden_layers=1, num_latents=1),
        dict(latent_reader="paper", num_hidden_layers=3, num_latents=3),
        dict(num_latents=0),
        dict(latent_reader="memory"),
    ],
    ids=["fewer layers", "more layers", "twin", "memory"],
)
def test_assisted_decoding(make_model, prompts, overrides):
    """A draft model only proposes: the text is the model's own. A draft has latents of its own shape, or none."""
    model = make_model(latent_reader="paper", sliding_window=64)
    draft = make_model(sliding_window=64, **overrides)
    expected = model.generate(prompts[:1], **GREEDY)
    assert torch.equal(model.generate(prompts[:1], assistant_model=draft, **GREEDY), expected)


@pytest.mark.skipif(transformers.__version__ < "5.18", reason="5.17 cannot shorten a cache that has unwritten layers")
@pytest.mark.parametrize(
    "overrides",
    [dict(latent_reader="memory")] + [dict(latent_reader="paper", latent_layers=x) for x in (None, [0], [1])],
    ids=str,
)
def test_drafts_of_the_first_layers(make_model, prompts, overrides):
    model = make_model(sliding_window=64, **overrides)
    expected = model.generate(prompts[:1], **GREEDY)
    assert torch.equal(model.generate(prompts[:1], assistant_early_exit=1, **GREEDY), expected)
    assert model.config.num_hidden_layers == 2


@pytest.mark.parametrize("kwargs", [{}, dict(num_return_sequences=2, do_sample=True)], ids=["greedy", "samples"])
def test_a_cache_is_continued_with_its_latents(paper_model, prompts, kwargs):
    """The first tokens' keys and values were computed under them: a posterior of the longer text does not fit."""
    model = paper_model
    torch.manual_seed(0)
    first = model.generate(prompts, return_dict_in_generate=True, **GREEDY | kwargs)
    text = dict(inputs=first.sequences, attention_mask=torch.ones_like(first.sequences))
    latents = kept_latents(first.past_key_values)["latent_key_values"].clone()
    more = model.generate(**text, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(more, model.generate(**text, latent_key_values=latents, use_cache=False, **GREEDY))
    assert not torch.equal(more, model.generate(**text, **GREEDY))


def test_a_cache_continued_with_given_latents(paper_model, prompts):
    model, latents = paper_model, paper_model.sample_prior(3, seed=0)
    first = model.generate(prompts, return_dict_in_generate=True, **GREEDY)
    more = model.generate(first.sequences, latents=latents, past_key_values=first.past_key_values, **GREEDY)
    # By hand: the old text under the old latents, the new text under the new ones.
    cache = model(first.sequences[:, :-1], latents=first.posterior.mean, use_cache=True).past_key_values
    ids, inputs = first.sequences, dict(past_key_values=cache, latents=latents, use_cache=True)
    for _ in range(14):
        logits = model(ids[:, -1:], **inputs).logits[:, -1]
        logits[:, model.config.eos_token_id] = -torch.inf
        ids = torch.cat((ids, logits.argmax(dim=-1, keepdim=True)), dim=1)
    assert torch.equal(more, ids)


def test_bfloat16(make_model, reader, prompts):
    model = make_model(latent_reader=reader).bfloat16()
    text = model.generate(prompts, **GREEDY)
    assert torch.equal(model.generate(prompts, **GREEDY), text)
    if reader == "paper":
        latents = model.infer_posterior(prompts).mean
        assert torch.equal(model.generate(prompts, latents=latents, **GREEDY), text)


@pytest.mark.parametrize("preset", ["ltm-tiny", "ltm-tiny-paper"])
def test_tiny_presets(preset):
    model = LTMForCausalLM(preset_config(preset, pad_token_id=0))
    prompt = torch.arange(2, 10)[None]
    assert torch.equal(model.generate(prompt, **GREEDY), model.generate(prompt, use_cache=False, **GREEDY))


# ------------------------------------------------------------------ without a prompt


@torch.no_grad()
def test_unconditional(paper_model):
    model, latents = paper_model, paper_model.sample_prior(4, seed=1)
    texts = model.generate(latents=latents, **GREEDY)
    assert texts.shape == (4, 15) and (texts[:, 0] == model.config.bos_token_id).all()
    assert torch.equal(texts, manual_greedy(model, torch.ones(4, 1, dtype=torch.long), latents))
    assert len({tuple(text) for text in texts.tolist()}) == 4


def test_nothing_to_infer_from(model):
    """From the begin-of-text token alone: the prior's mean, or a sample of the prior when sampling."""
    zeros = torch.zeros(1, *model.config.latent_shape)
    assert torch.equal(model.generate(**GREEDY), model.generate(latents=zeros, **GREEDY))
    prompts = torch.full((4, 1), model.config.bos_token_id)
    torch.manual_seed(0)
    latents = model.infer_posterior(prompts).sample()
    assert latents.std().item() == pytest.approx(1, abs=0.1)
    assert model.generate(**GREEDY | dict(do_sample=True)).shape == (1, 15)


def test_no_prompt_and_no_bos_token(make_model, reader):
    model = make_model(latent_reader=reader, bos_token_id=None)
    with pytest.raises(ValueError, match="bos_token_id"):
        model.generate(latents=model.sample_prior(2, seed=0), max_new_tokens=2)
    assert model.generate(latents=model.sample_prior(2, seed=0), bos_token_id=1, **GREEDY).shape == (2, 15)


# ------------------------------------------------------------------ weights elsewhere


def test_offloaded_weights_change_nothing(make_model, reader, prompts):
    """Outside a module's forward an offloaded weight is an empty shell: nothing may read one there."""
    model = make_model(latent_reader=reader)
    expected = model.generate(prompts, num_inference_steps=2, **GREEDY)
    unprompted = model.generate(latents=model.sample_prior(2, seed=0), **GREEDY)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    assert torch.equal(model.generate(prompts, num_inference_steps=2, **GREEDY), expected)
    assert torch.equal(model.generate(latents=model.sample_prior(2, seed=0), **GREEDY), unprompted)


# ------------------------------------------------------------------ thoughts the caller holds


def test_infer_once_write_many_times(paper_model, prompts):
    model, posterior = paper_model, paper_model.infer_posterior(prompts, num_inference_steps=5)
    expected = model.generate(prompts, num_inference_steps=5, **GREEDY)
    assert torch.equal(model.generate(prompts, posterior=posterior, **GREEDY), expected)
    assert torch.equal(model.generate(prompts[1:], posterior=posterior[1:], **GREEDY), expected[1:])
    torch.manual_seed(0)
    first = model.generate(prompts, posterior=posterior, do_sample=True, max_new_tokens=5)
    torch.manual_seed(0)
    assert torch.equal(first, model.generate(prompts, num_inference_steps=5, do_sample=True, max_new_tokens=5))


def test_several_thoughts_for_a_prompt(paper_model, prompts):
    """Rows by prompt, then thought, then text; a thought's greedy text is that of its sample given as latents."""
    model = paper_model
    torch.manual_seed(0)
    ids = model.generate(prompts, num_latent_samples=3, num_return_sequences=2, num_beams=2, **GREEDY)
    assert ids.shape == (len(prompts) * 6, 7 + 14)
    assert torch.equal(ids[:, :7], prompts.repeat_interleave(6, dim=0))
    torch.manual_seed(0)
    ids = model.generate(prompts, num_latent_samples=3, **GREEDY)
    torch.manual_seed(0)
    posterior = model.infer_posterior(prompts)
    for thought in range(3):
        assert torch.equal(ids[thought::3], model.generate(prompts, latents=posterior.sample(), **GREEDY))


def test_the_result_carries_the_posterior(paper_model, prompts):
    result = paper_model.generate(prompts, return_dict_in_generate=True, **GREEDY)
    expected = paper_model.infer_posterior(prompts)
    assert torch.equal(result.posterior.mean, expected.mean)
    given = paper_model.generate(prompts, latents=expected.mean, return_dict_in_generate=True, **GREEDY)
    assert given.posterior is None and torch.equal(given.sequences, result.sequences)


def test_progress_of_inference(model, prompts):
    steps = []
    model.generate(prompts, num_inference_steps=3, inference_callback=lambda step, *_: steps.append(step), **GREEDY)
    assert steps == [0, 1, 2]


def test_early_stop(paper_model, prompts):
    steps = []
    paper_model.generate(prompts, num_inference_steps=50, inference_tolerance=1e6,
                         inference_callback=lambda step, *_: steps.append(step), **GREEDY)  # fmt: skip
    assert steps == list(range(8))
