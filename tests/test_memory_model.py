"""A model with a memory: what `forward` makes of a text that is read with it, and what `infer_posterior` finds."""

import pytest
import torch
from torch.nn import functional as F

from ltm_hf import LatentPosterior, LTMConfig
from ltm_hf.cache_ltm import kept_latents
from ltm_hf.losses_ltm import HeadPass
from ltm_hf.memory_ltm import Lesson, prior_state, state_of, think

SHAPE = (1, 4, 32)  # layers, latents, hidden


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def model(memory_model):
    return memory_model


@pytest.fixture
def text(ids):
    """Three rows, of which one begins and one ends with padding, and labels for some of their tokens."""
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, :4] = mask[2, 9:] = 0
    labels[0, :5] = labels[1, 7] = -100
    return dict(input_ids=ids, attention_mask=mask, labels=labels.masked_fill(mask == 0, -100))


def read(model, start=None, **inputs):
    """One pass with a memory that starts at the prior."""
    ids = inputs["input_ids"]
    return model(**inputs, latent_state=prior_state(model.config, len(ids)) if start is None else start)


def gradients(model):
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def same_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(actual[name] / scale, gradient / scale, rtol=1e-3, atol=1e-4, msg=name)


# ------------------------------------------------------------------ latents


@torch.no_grad()
def test_given_latents_are_read_by_all_tokens(model, ids):
    """By hand, and linearly; of zero they are none."""
    latents, reader = model.sample_prior(3, seed=0), model.model.reader
    hidden = model.model(ids, normed=False).last_hidden_state
    read = []
    for weights, z in zip(reader.weights(hidden).unbind(1), latents[:, 0].split(8, dim=-1), strict=True):  # heads
        read.append(2.0 * weights @ z)
    residual = hidden + reader.gate.weight * (torch.cat(read, dim=-1) @ reader.map.weight.T)
    close(model(ids, latents=latents).logits, model.lm_head(model.model.norm(residual)))
    assert torch.equal(model(ids, latents=torch.zeros_like(latents)).logits, model(ids).logits)
    with pytest.raises(ValueError, match="A memory's latents have no keys and values"):
        model.project_latents(latents)


def test_addresses_are_sharp_and_the_map_is_the_identity_at_first():
    from ltm_hf import LTMForCausalLM

    sizes = dict(vocab_size=61, intermediate_size=48, num_hidden_layers=1)
    for width in (64, 256):
        reader = LTMForCausalLM(LTMConfig(hidden_size=width, num_attention_heads=4, **sizes)).model.reader
        weights = reader.weights(torch.randn(1, 50, width))
        assert 0.2 < weights.amax(dim=-1).mean() < 0.9
        assert torch.equal(reader.map.weight, torch.eye(width)) and (reader.gate.weight == 0.2).all()
        sigma, factor = reader.scales()
        close(sigma, torch.full((4, 1, 1), 0.07))
        close(factor, torch.ones(4, 1, 1))


# ------------------------------------------------------------------ reading a text


@torch.no_grad()
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_logits_and_what_the_cache_keeps(model, text, make_noise, name):
    """They are those of `think`; without a cache nothing is kept."""
    ids, mask = text["input_ids"], text["attention_mask"]
    noise, writes = make_noise(3, 12, 32, seed=1), torch.arange(12).expand(3, -1) % 4 != 1
    hidden = model.model(ids, attention_mask=mask, normed=False).last_hidden_state
    lesson, start = Lesson.of(ids, mask, None, writes), prior_state(model.config, 3)
    parts = model.model.reader, model.model.norm, HeadPass(model.lm_head)
    expected = think(*parts, hidden, lesson, start, noise=noise, keep=True)
    given = dict(attention_mask=mask, latent_noise=noise, latent_writes=writes)
    output = read(model, input_ids=ids, **given)
    close(output.logits, model.lm_head(model.model.norm(expected.residual)), 1e-5)
    kept = kept_latents(output[name])["memory"]
    for field in vars(kept):
        close(getattr(kept, field), getattr(expected.state, field), 1e-5)
    assert (output.logits - model(ids, attention_mask=mask).logits)[mask.bool()].abs().max() > 0.5
    uncached = read(model, input_ids=ids, use_cache=False, **given)
    assert getattr(uncached, name) is None and torch.equal(uncached.logits, output.logits)


@pytest.mark.parametrize("learning", [False, True], ids=["without a graph", "with a graph"])
@pytest.mark.parametrize("window", [4, None])
def test_a_text_in_calls_is_the_text(make_model, make_ids, learning, window):
    """Each continues the cache of the one before, far beyond the window."""
    model, ids = make_model(sliding_window=window), make_ids(3, 31)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    with torch.set_grad_enabled(learning):
        whole, cache, logits = read(model, input_ids=ids, attention_mask=mask).logits, None, []
        for first, last in ((0, 4), (4, 5), (5, 15), (15, 16), (16, 31)):
            given = dict(input_ids=ids[:, first:last], attention_mask=mask[:, :last])
            output = model(**given, cache=cache) if first else read(model, **given)
            cache = output.cache
            logits.append(output.logits)
    close(torch.cat(logits, dim=1)[mask.bool()], whole[mask.bool()], 1e-3)


@torch.no_grad()
def test_what_a_text_leaves_is_of_constant_size(model, make_ids):
    sizes = set()
    for length in (5, 50):
        state = kept_latents(read(model, input_ids=make_ids(2, length)).cache)["memory"]
        sizes.add(tuple(tuple(x.shape) for x in vars(state).values()))
    assert len(sizes) == 1


# ------------------------------------------------------------------ losses


@pytest.mark.parametrize("num_items", [None, 40], ids=["counted", "given"])
@pytest.mark.parametrize("case", ["tied", "untied", "resized", "a head that is frozen", "a head with a hook"])
def test_reductions_of_the_loss_agree(make_model, text, make_noise, case, num_items):
    """In value and gradients: from all logits, in one pass with the errors, and token by token."""
    model = make_model(tie_word_embeddings=case == "tied")
    if case == "resized":
        model.resize_token_embeddings(70)
    if case == "a head that is frozen":
        model.lm_head.requires_grad_(False)
    if case == "a head with a hook":
        model.lm_head.register_forward_hook(lambda *_: None)
    given = text | dict(latent_noise=make_noise(3, 12, 32, seed=1), use_cache=False)
    count = {} if num_items is None else {"num_items_in_batch": torch.tensor(num_items)}
    whole = read(model, **given, **count)
    whole.loss.backward()
    expected = gradients(model)
    assert {name for name in expected if "reader" in name} == {
        name for name, parameter in model.named_parameters() if "reader" in name and parameter.requires_grad
    }
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    tokens = int((text["labels"][:, 1:] != -100).logical_and(text["attention_mask"][:, :-1] == 1).sum())

    mean = read(model, **given, **count, loss_reduction="mean")
    close(mean.loss, whole.loss)
    mean.loss.backward()
    same_gradients(gradients(model), expected)
    losses = read(model, **given, loss_reduction="none").loss
    assert mean.logits is None and losses.shape == (3, 11)
    close(losses.sum() / (num_items or tokens), whole.loss)
    (losses.sum() / (num_items or tokens)).backward()
    same_gradients(gradients(model), expected)
    with torch.no_grad():
        for reduction, found in ((None, whole.loss), ("mean", whole.loss), ("none", losses)):
            close(read(model, **given, **(count if reduction != "none" else {}), loss_reduction=reduction).loss, found)


@torch.no_grad()
def test_tokens_that_are_not_scored_write_all_the_same(model, ids):
    """Unless they may not: then they are no more than context within the window."""
    labels = ids.masked_fill(torch.arange(12) < 6, -100)
    loss = read(model, input_ids=ids, labels=labels).loss
    expected = read(model, input_ids=ids, labels=ids, loss_reduction="none").loss[:, 5:].mean()
    close(loss, expected)
    silent = read(model, input_ids=ids, labels=labels, latent_writes=torch.arange(12).expand(3, -1) >= 6).loss
    assert (silent - loss).abs() > 0.01


def test_later_tokens_change_nothing_before_them(model, ids):
    other = ids.clone()
    other[:, 7:] = ids[:, 7:].flip(1)
    one, two = (read(model, input_ids=x, labels=x, loss_reduction="none").loss for x in (ids, other))
    assert torch.equal(one[:, :6], two[:, :6]) and (one[:, 7:] - two[:, 7:]).abs().min() > 0


def test_gradients_add_up_over_micro_batches(model, text):
    count = torch.tensor(25)
    read(model, **text, num_items_in_batch=count, loss_reduction="mean", use_cache=False).loss.backward()
    expected = gradients(model)
    for row in range(3):
        part = {name: x[row : row + 1] for name, x in text.items()}
        read(model, **part, num_items_in_batch=count, loss_reduction="mean", use_cache=False).loss.backward()
    same_gradients(gradients(model), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(make_model, text, use_reentrant):
    found = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable(dict(use_reentrant=use_reentrant))
        read(model, **text, loss_reduction="mean", use_cache=False).loss.backward()
        found.append(gradients(model))
    same_gradients(*found[::-1])


def test_compiled(make_model, text, make_ids):
    """The layers are a graph for all lengths; the memory runs as it is, between them and the loss."""
    plain, compiled = (make_model(num_hidden_layers=1) for _ in range(2))  # a graph takes a second a layer
    step = torch.compile(compiled, backend="aot_eager")
    given = dict(loss_reduction="mean", use_cache=False)
    read(plain, **text, **given).loss.backward()
    ids = text["input_ids"]
    close(step(**text, **given, latent_state=prior_state(plain.config, 3)).loss, read(plain, **text, **given).loss)
    step(**text, **given, latent_state=prior_state(plain.config, 3)).loss.backward()
    same_gradients(gradients(compiled), gradients(plain))
    with torch.no_grad():
        close(step(ids, latent_state=prior_state(plain.config, 3)).logits, read(plain, input_ids=ids).logits)


# ------------------------------------------------------------------ precision


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16(make_model, text, how):
    """Errors, precision and mean are float32, and near those of a model in float32."""
    model, reference = make_model(), make_model()
    if how == "weights":
        model.to(torch.bfloat16)
    expected = read(reference, **text)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        output = read(model, **text)
        loss = read(model, **text, loss_reduction="mean", use_cache=False).loss
    state, exact = (kept_latents(x.cache)["memory"] for x in (output, expected))
    for name in ("mean", "precision", "moved", "sharpened", "weights"):
        assert getattr(state, name).dtype == torch.float32
    assert (state.committed().mean - exact.committed().mean).norm() < 0.2 * exact.committed().mean.norm()
    close(state.committed().precision, exact.committed().precision, 0.2)
    assert loss.dtype == torch.float32 and abs(loss - expected.loss) < 0.05 * expected.loss
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in model.parameters())


# ------------------------------------------------------------------ refusals of forward


def test_errors_that_learn_need_a_memory_that_starts_in_the_call(make_model, ids):
    """Neither the paper's reader, nor a memory that a cache has begun, would learn by them."""
    model = make_model()
    cache = model(ids, latent_state=prior_state(model.config, len(ids)), use_cache=True).past_key_values
    for one, given in ((make_model(latent_reader="paper"), {}), (model, {}), (model, dict(past_key_values=cache))):
        with pytest.raises(ValueError, match="latent_errors_learn needs a memory that starts at a latent_state"):
            one(ids, labels=ids, latent_errors_learn=True, **given)


def test_what_goes_with_a_memory_is_refused_without_one(model, make_model, ids):
    start, paper = prior_state(model.config, 3), make_model(latent_reader="paper")
    for name, value in (("latent_noise", torch.zeros(3, 12, 32)), ("latent_writes", torch.ones(3, 12).bool())):
        with pytest.raises(ValueError, match=f"{name} is of a memory"):
            model(ids, **{name: value})
    for other in (paper, make_model(num_latents=0)):
        with pytest.raises(ValueError, match="latent_state is of a memory"):
            other(ids, latent_state=start)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(latent_state=torch.zeros(3, 4, 4, 8)), r"latent_state must have the shape \(3, 4, 4, 9\)"),
        (dict(latent_state=torch.zeros(2, 4, 4, 9)), r"latent_state .* got \(2, 4, 4, 9\)"),
        (dict(latent_noise=torch.zeros(3, 11, 32)), r"latent_noise must have the shape \(3, 12, 32\)"),
        (dict(latent_writes=torch.ones(3, 11)), r"latent_writes must have the shape \(3, 12\)"),
        (dict(latents=torch.zeros(3, *SHAPE)), "only one of latents and latent_state"),
    ],
)
def test_shapes_that_do_not_fit(model, ids, given, words):
    with pytest.raises(ValueError, match=words):
        model(ids, **dict(latent_state=prior_state(model.config, 3)) | given)


def test_embeddings_have_nothing_to_learn_from(model, ids):
    with pytest.raises(ValueError, match="learns from token ids"):
        model(inputs_embeds=model.get_input_embeddings()(ids), latent_state=prior_state(model.config, 3))


# ------------------------------------------------------------------ inference


@torch.no_grad()
def test_inference_is_reading(model, text, ids):
    """The posterior of a text is the one that its memory holds; its trace the text's likelihood as it was read."""
    posterior = model.infer_posterior(**text)
    writes = F.pad(text["labels"][:, 1:] != -100, (1, 0)) & F.pad(text["attention_mask"][:, :-1], (1, 0)).bool()
    output = read(model, **text, latent_writes=writes)
    expected = kept_latents(output.cache)["memory"].posterior()
    close(posterior.mean, expected.mean, 1e-5)
    close(posterior.log_variance, expected.log_variance, 1e-5)
    losses = read(model, **text, latent_writes=writes, loss_reduction="none").loss
    close(posterior.elbo_trace, -losses.sum(dim=1)[None])
    assert torch.equal(posterior.sample(seed=1), model.infer_posterior(**text, seed=5).sample(seed=1))
    score = model.elbo(**text, posterior=posterior, num_particles=2)
    assert score.elbo.isfinite().all() and (score.kl > 0).all()


def test_a_start_and_no_steps(model, ids, make_noise):
    start = LatentPosterior(make_noise(3, *SHAPE), make_noise(3, *SHAPE, seed=1))
    same = model.infer_posterior(ids, num_inference_steps=0, initial_posterior=start)
    assert torch.equal(same.mean, start.mean) and torch.equal(same.log_variance, start.log_variance)
    prior = model.infer_posterior(ids, num_inference_steps=0)
    assert not prior.mean.any() and not prior.log_variance.any() and prior.elbo_trace.shape == (0, 3)
    moved = model.infer_posterior(ids, initial_posterior=start)
    with torch.no_grad():
        output = read(model, state_of(start, 4), input_ids=ids)
    close(moved.mean, kept_latents(output.cache)["memory"].posterior().mean, 1e-5)


def objective(model, ids, mean):
    """-log p(x|mean) + κ|mean|²/2, from the logits."""
    log_probabilities = model(ids, latents=mean).logits[:, :-1].log_softmax(dim=-1)
    nll = -log_probabilities.gather(-1, ids[:, 1:, None]).sum(dim=(1, 2))
    return nll + 0.01 * mean.square().sum(dim=(1, 2, 3)) / 2


@pytest.mark.parametrize("steps", [2, 3, 6])
def test_further_steps_by_hand(model, make_ids, steps):
    ids = make_ids(4, 20)
    first = model.infer_posterior(ids)
    means, lowest, rates, moves = first.mean, None, torch.ones(4), None
    tried = means
    for _ in range(steps):
        z = tried.clone().requires_grad_()
        value = objective(model, ids, z)
        (slope,) = torch.autograd.grad(value.sum(), z)  # of everything, the prior's part among it
        for row in range(4):
            if lowest is None or value[row] <= lowest[row]:
                continue
            rates[row] /= 2
        better = torch.ones(4).bool() if lowest is None else value <= lowest
        lowest = torch.where(better, value, value if lowest is None else lowest).detach()
        move = slope / 0.01 * first.log_variance.exp()
        moves = torch.where(better[:, None, None, None], move, move if moves is None else moves)
        means = torch.where(better[:, None, None, None], tried, means)
        tried = means - rates[:, None, None, None] * moves
    found = model.infer_posterior(ids, num_inference_steps=steps)
    close(found.mean, means, 1e-3)
    assert torch.equal(found.log_variance, first.log_variance) and found.elbo_trace.shape == (steps, 4)
    assert (rates < 1).any() or steps < 3


def test_no_step_makes_it_worse(model, make_ids):
    ids, values, seen = make_ids(4, 20), [], []
    for steps in range(1, 7):
        posterior = model.infer_posterior(ids, num_inference_steps=steps, callback=lambda *step: seen.append(step))
        with torch.no_grad():
            values.append(objective(model, ids, posterior.mean))
    values = torch.stack(values)
    assert (values.diff(dim=0) < 1e-3).all() and (values[-1] < values[0] - 1).all()
    numbers, latents, traces = zip(*seen[-6:], strict=True)
    assert numbers == tuple(range(6)) and torch.equal(torch.stack(traces), posterior.elbo_trace)
    assert all(x.shape == (4, *SHAPE) for x in latents)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(epsilon=torch.zeros(3, *SHAPE)), "epsilon"),
        (dict(inference_learning_rate=0.3), "inference_learning_rate"),
        (dict(inference_lr_schedule="cosine"), "inference_lr_schedule"),
        (dict(inference_tolerance=0.1), "inference_tolerance"),
        (dict(inference_noise="fixed"), "inference_noise"),
        (dict(inference_kl_weight=1.0), "inference_kl_weight"),
        (dict(inference_method="adamw"), "inference_method"),
        (dict(inference_method="amortized"), "inference_method"),
    ],
)
def test_settings_that_a_memory_has_no_use_for_are_refused(model, ids, settings, words):
    calls = [lambda **given: model.infer_posterior(ids, **given)]
    if "epsilon" not in settings:
        calls.append(lambda **given: model.generate(ids, max_new_tokens=1, **given))
    if words not in ("epsilon", "inference_kl_weight"):  # which a configuration chooses
        calls.append(lambda **given: LTMConfig(**given))
    for call in calls:
        with pytest.raises(ValueError, match=words):
            call(**settings)
    model.infer_posterior(ids, inference_method="natural", inference_kl_weight=0.01)  # its own
