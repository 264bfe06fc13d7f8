"""What the latents know: a text rebuilt from them, layer by layer; between two texts; how much each carries.

Shapes: B batch, S tokens, R rows (blocks), L layers, N latents a layer, D hidden, H heads.

Latents are read at the posterior mean, the better predictor than a sample. "Without a layer's latents" always means
that they are zero: the prior's mean, and the same as that layer having none, since a cross-attention to values of zero
adds nothing.

Two accuracies of a rebuilt text, the share of its tokens (the first excepted) that are right:
- teacher-forced: each token given the true ones before it in the window, and the latents;
- free-running: greedy search from the first token, with the latents alone. It is counted place by place, so that one
  token too many spoils the rest; end-of-text does not stop it, since blocks go on after it.
"""

import math
from contextlib import contextmanager

import torch

from ..data.numbers import check_at_least
from ..likelihood_ltm import check_sequences, negative_log_likelihood, scored_tokens
from ..losses_ltm import IGNORED
from ..posterior_ltm import LatentPosterior, kl_terms
from .figures import beyond_noise, evaluating, figure, markdown_rows, shortened, written
from .representations import batches, check_blocks, infer_posteriors, settings_of, tokenize

ACCURACIES = ("teacher_forced", "free_running")

# ------------------------------------------------------------------ a text from its latents


@torch.no_grad()
def greedy(model, first_tokens: torch.Tensor, latents: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """(B, num_tokens) tokens, the most likely each time, after first_tokens (B, 1) given latents (B, L, N, D).

    As `generate` with greedy search, except that nothing stops it and no setting of the checkpoint's generation config
    has a say.
    """
    thoughts, tokens, cache = model.project_latents(latents), [first_tokens], None
    for _ in range(num_tokens):
        output = model(input_ids=tokens[-1], latent_key_values=thoughts, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        tokens.append(output.logits[:, -1:].argmax(dim=-1))
    return torch.cat(tokens, dim=1)[:, 1:]


def include_layers(latents: torch.Tensor, num_layers: int) -> torch.Tensor:
    """(B, L, N, D) latents with those of the first `num_layers` layers as they are and the others zero."""
    kept = torch.arange(latents.shape[1], device=latents.device) < num_layers
    return latents * kept[:, None, None]


@torch.no_grad()
def token_accuracy(model, input_ids, variants: list[torch.Tensor], attention_mask=None) -> list[dict]:
    """For each of several latents (B, L, N, D): (B,) `teacher_forced` and `free_running` accuracies, and `written`.

    `written`: the (B, S - 1) free-running tokens. Padding, on the right, is not counted.
    """
    check_sequences(model, input_ids, attention_mask)
    targets = scored_tokens(input_ids, attention_mask)
    num_tokens = (targets != IGNORED).sum(dim=1)

    def share(tokens):  # what is not scored is no token's id
        return (tokens == targets).sum(dim=1) / num_tokens

    # Together: a step of greedy search takes about as long for many rows as for few.
    first_tokens = input_ids[:, :1].repeat(len(variants), 1)
    rebuilt = greedy(model, first_tokens, torch.cat(variants), targets.shape[1]).chunk(len(variants))
    found = []
    for latents, tokens in zip(variants, rebuilt, strict=True):
        logits = model(input_ids=input_ids, attention_mask=attention_mask, latents=latents, use_cache=False).logits
        predicted = logits[:, :-1].argmax(dim=-1)
        found.append({"teacher_forced": share(predicted), "free_running": share(tokens), "written": tokens})
    return found


def progressive_inclusion(
    model,
    blocks,
    batch_size: int = 16,
    num_inference_steps: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict:
    """Token accuracy with the latents of layers 1 … l alone, for l = 0 … L (paper, probing of latents).

    blocks: rows with `input_ids`, as from `ltm_hf.data.pack`. num_inference_steps: default the model's.
    Returns, for each accuracy, a list of figures over blocks, and `gain`, of the same blocks' gain over l = 0.
    """
    result = settings_of(model, num_inference_steps, seed)
    check_blocks(blocks, least_tokens=2)
    posterior = infer_posteriors(model, blocks, batch_size, num_inference_steps, seed, progress)
    layers = [0, *(layer + 1 for layer in model.config.reading_layers)]
    found = {name: [[] for _ in layers] for name in ACCURACIES}
    with evaluating(model):
        for rows, input_ids, mask in batches(blocks, batch_size, model.device, "Rebuilding" if progress else None):
            mean = posterior.mean[rows].to(model.device)
            variants = [include_layers(mean, count) for count in range(len(layers))]
            for layer, accuracy in enumerate(token_accuracy(model, input_ids, variants, mask)):
                for name in ACCURACIES:
                    found[name][layer].append(accuracy[name].cpu())
    found = {name: [torch.cat(one) for one in by_layer] for name, by_layer in found.items()}
    return {
        **result,
        "num_blocks": len(blocks),
        "layers": layers,
        **{name: [figure(values) for values in by_layer] for name, by_layer in found.items()},
        "gain": {name: [figure(values - by_layer[0]) for values in by_layer] for name, by_layer in found.items()},
    }


def progressive_inclusion_markdown(result: dict) -> str:
    """A table of `progressive_inclusion`, in percent, and what it shows."""
    rows = [["latents of layers", *(f"{_spoken(name)}, %{what}" for name in ACCURACIES for what in ("", ": gain"))]]
    for index, layer in enumerate(result["layers"]):
        cells = ["none" if layer == 0 else "1" if layer == 1 else f"1–{layer}"]
        for name in ACCURACIES:
            cells.append(written(result[name][index], 2, 100))
            cells.append("–" if layer == 0 else written(result["gain"][name][index], 2, 100, sign=True))
        rows.append(cells)
    verdicts = " ".join(_gain_verdict(_spoken(name), result["gain"][name][-1]) for name in ACCURACIES)
    return f"{markdown_rows(rows)}\n\n{verdicts} {_over_blocks(result)}"


def reconstruction(
    model,
    tokenizer,
    blocks,
    num_examples: int = 1,
    batch_size: int = 16,
    num_inference_steps: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict:
    """A text rebuilt from its own latents, from another text's (the next block's), and from none.

    `figures`: for each of the three, both accuracies and `nll`, in nats a token at the posterior mean (not a bound:
    the latents have seen the text and their KL is left out). `difference`: own latents' less the others', by block.
    Raises ValueError for fewer than two blocks.
    """
    result = settings_of(model, num_inference_steps, seed)
    check_blocks(blocks, least_tokens=2)
    if len(blocks) < 2:
        raise ValueError("Reconstruction needs two blocks or more: each is also read with the latents of the next.")
    posterior = infer_posteriors(model, blocks, batch_size, num_inference_steps, seed, progress)
    kinds = {
        "own latents": posterior.mean,
        "another text's latents": posterior.mean.roll(-1, dims=0),
        "no latents": torch.zeros_like(posterior.mean),
    }
    found = {kind: {name: [] for name in (*ACCURACIES, "nll")} for kind in kinds}
    examples = []
    with evaluating(model):
        for rows, input_ids, mask in batches(blocks, batch_size, model.device, "Rebuilding" if progress else None):
            num_tokens = (scored_tokens(input_ids, mask) != IGNORED).sum(dim=1)
            texts = [[tokenizer.decode(ids[kept.bool()][1:])] for ids, kept in zip(input_ids, mask, strict=True)]
            variants = [latents[rows].to(model.device) for latents in kinds.values()]
            accuracies = token_accuracy(model, input_ids, variants, mask)
            for kind, latents, one in zip(kinds, variants, accuracies, strict=True):
                one["nll"] = negative_log_likelihood(model, input_ids, latents, mask) / num_tokens
                for name, values in found[kind].items():
                    values.append(one[name].cpu())
                for text, tokens, length in zip(texts, one["written"], num_tokens, strict=True):
                    text.append(tokenizer.decode(tokens[:length]))
            examples += [dict(zip(("text", *kinds), text, strict=True)) for text in texts][
                : num_examples - len(examples)
            ]
    found = {kind: {name: torch.cat(values) for name, values in one.items()} for kind, one in found.items()}
    return {
        **result,
        "num_blocks": len(blocks),
        "figures": {kind: {name: figure(values) for name, values in one.items()} for kind, one in found.items()},
        "difference": {
            kind: {name: figure(found["own latents"][name] - values) for name, values in one.items()}
            for kind, one in found.items()
            if kind != "own latents"
        },
        "rebuilt_exactly": int((found["own latents"]["free_running"] == 1).sum()),
        "examples": examples,
    }


def reconstruction_markdown(result: dict) -> str:
    """A table of `reconstruction`, what it shows, and the example texts."""
    rows = [
        ["decoder reads", *(f"{_spoken(name)} accuracy, %" for name in ACCURACIES), "nll, nats a token", "own less"]
    ]
    for kind, one in result["figures"].items():
        less = result["difference"].get(kind)
        rows.append([kind, *(written(one[name], 2, 100) for name in ACCURACIES), written(one["nll"])])
        rows[-1].append("–" if less is None else written(less["nll"], 4, sign=True))
    verdicts = " ".join(
        _gain_verdict(f"{_spoken(name)} against {kind}", differences[name])
        for kind, differences in result["difference"].items()
        for name in ACCURACIES
    )
    texts = [["", "text"]]
    for example in result["examples"]:
        for kind, text in example.items():
            texts.append(["the text" if kind == "text" else f"free-running, {kind}", shortened(text, 400)])
    return (
        f"{markdown_rows(rows)}\n\n{verdicts} Rebuilt from their latents without an error: "
        f"{result['rebuilt_exactly']} of {result['num_blocks']} blocks. {_over_blocks(result)} The nll leaves the "
        f"latents' KL out: not a bound.\n\n{markdown_rows(texts)}"
    )


# ------------------------------------------------------------------ between two texts


def interpolation(
    model,
    tokenizer,
    pairs: list[tuple[str, str]],
    weights: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0),
    max_new_tokens: int = 40,
    max_length: int | None = None,
    num_examples: int = 1,
    batch_size: int = 16,
    num_inference_steps: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict:
    """Between the thoughts of two texts, by `LatentPosterior.lerp`: weight 0 is the first text's, 1 the second's.

    At each weight: `nll` of the first and the second text under the posterior mean, nats a token, and `change`, the
    same less that text's without latents; `kl` of the posterior between, in nats; for the first pairs, the `written`
    greedy text from the first token with those latents alone, up to end-of-text. `own_end`: each text's nll under the
    weight at its own end less that at the other's, pair by pair.
    max_length: tokens of a text, default the model's. Raises ValueError if there is no pair.
    """
    result = settings_of(model, num_inference_steps, seed)
    check_at_least(1, max_new_tokens=max_new_tokens, batch_size=batch_size)
    length = max_length or model.config.max_position_embeddings
    sides = [tokenize(tokenizer, texts, length) for texts in zip(*pairs, strict=True)]
    if not sides:
        raise ValueError("There is no pair of texts to go between.")
    for rows in sides:
        check_blocks(rows, least_tokens=2)
    first, second = (infer_posteriors(model, rows, batch_size, num_inference_steps, seed, progress) for rows in sides)
    between = [first.lerp(second, weight) for weight in weights]
    with evaluating(model):
        plain = [_nll(model, rows, None, batch_size) for rows in sides]
        nll = [[_nll(model, rows, posterior.mean, batch_size) for posterior in between] for rows in sides]
        starts = torch.tensor([row["input_ids"][:1] for row in sides[0][:num_examples]], device=model.device)
        texts = [
            [
                _up_to_end(tokenizer, tokens)
                for tokens in greedy(model, starts, posterior.mean[:num_examples].to(model.device), max_new_tokens)
            ]
            for posterior in between
        ]
    names = ("first", "second")
    return {
        **result,
        "num_pairs": len(pairs),
        "weights": list(weights),
        "nll": {name: [figure(one) for one in values] for name, values in zip(names, nll, strict=True)},
        "no_latents": {name: figure(one) for name, one in zip(names, plain, strict=True)},
        "change": {
            name: [figure(one - without) for one in values]
            for name, values, without in zip(names, nll, plain, strict=True)
        },
        "own_end": {"first": figure(nll[0][0] - nll[0][-1]), "second": figure(nll[1][-1] - nll[1][0])},
        "kl": [figure(posterior.kl_divergence()) for posterior in between],
        "examples": [
            {"first": pair[0], "second": pair[1], "written": [at_weight[row] for at_weight in texts]}
            for row, pair in enumerate(pairs[:num_examples])
        ],
    }


def interpolation_markdown(result: dict) -> str:
    """A table of `interpolation`, what it shows, and the texts written on the way."""
    names = {"first": "first text", "second": "second text"}
    rows = [["weight", *(f"nll of the {name}: change" for name in names.values()), "KL, nats"]]
    for index, weight in enumerate(result["weights"]):
        changes = [written(result["change"][name][index], 4, sign=True) for name in names]
        rows.append([f"{weight:g}", *changes, written(result["kl"][index], 2)])
    texts = [["weight", "greedy text from the latents alone"]]
    for example in result["examples"]:
        texts.append(["first text", shortened(example["first"], 300)])
        texts += [
            [f"{w:g}", shortened(text, 300)] for w, text in zip(result["weights"], example["written"], strict=True)
        ]
        texts.append(["second text", shortened(example["second"], 300)])
    verdicts = " ".join(
        f"The {name} under its own thoughts, less under the other's: {written(result['own_end'][key], 4, sign=True)}"
        f"{'' if beyond_noise(result['own_end'][key]) else ', which may be chance'}."
        for key, name in names.items()
    )
    distinct = ", ".join(str(len(set(example["written"]))) for example in result["examples"])
    if distinct:
        verdicts += f" Of {len(result['weights'])} greedy texts, different: {distinct}."
    plain = ", ".join(f"{name} {written(result['no_latents'][key])}" for key, name in names.items())
    return (
        f"{markdown_rows(rows)}\n\n{verdicts} All in nats a token at the mean of the posterior between, changes "
        f"against no latents ({plain}); {_errors_over(result['num_pairs'], 'pair')}; "
        f"{result['num_inference_steps']} inference steps.\n\n{markdown_rows(texts)}"
    )


def _nll(model, rows, latents, batch_size) -> torch.Tensor:
    """(R,) nats a token of each row given its latents."""
    found = []
    for part, input_ids, mask in batches(rows, batch_size, model.device):
        thoughts = None if latents is None else latents[part].to(model.device)
        num_tokens = (scored_tokens(input_ids, mask) != IGNORED).sum(dim=1)
        found.append((negative_log_likelihood(model, input_ids, thoughts, mask) / num_tokens).cpu())
    return torch.cat(found)


def _up_to_end(tokenizer, tokens: torch.Tensor) -> str:
    ids = tokens.tolist()
    ids = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
    return tokenizer.decode(ids)


# ------------------------------------------------------------------ how much each latent carries


def kl_per_latent(posterior: LatentPosterior) -> torch.Tensor:
    """(B, L, N) nats: each latent vector's part of `posterior.kl_divergence()`."""
    return kl_terms(posterior.mean, posterior.log_variance).sum(dim=-1)


def active_units(mean: torch.Tensor, threshold: float = 0.01) -> torch.Tensor:
    """(L, N) channels of each latent whose posterior mean varies over sequences by more than the threshold.

    Burda et al. 2016, section 5.2: Var_x(E_q[z]) > 0.01. mean: (B, L, N, D), B of 2 or more. The prior's variance is 1.
    """
    _check_two(mean)
    return (mean.var(dim=0) > threshold).sum(dim=-1)


def _check_two(sequences) -> None:
    if len(sequences) < 2:
        raise ValueError("Active units are counted over two sequences or more: one has no variance.")


def latent_usage(
    model,
    blocks,
    threshold: float = 0.01,
    batch_size: int = 16,
    num_inference_steps: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict:
    """KL and active units of each latent, by layer and in all.

    `kl`: an (L, N) list of figures over blocks, in nats a block; `kl_by_layer` and `kl_total` are its sums,
    `kl_per_token` the last over the tokens scored. `active_units`: an (L, N) list of channels out of `num_channels`.
    A posterior at the prior has KL 0 and none active. KL says what a latent tells of its text, not what the decoder
    makes of it.
    """
    result = settings_of(model, num_inference_steps, seed)
    check_blocks(blocks, least_tokens=2)
    _check_two(blocks)
    posterior = infer_posteriors(model, blocks, batch_size, num_inference_steps, seed, progress)
    if posterior.log_variance.isneginf().any():
        raise ValueError(
            "Langevin dynamics end at a point, whose KL is infinite: there is none to share out by latent."
        )
    kl = kl_per_latent(posterior)
    active = active_units(posterior.mean, threshold)
    num_tokens = torch.tensor([len(blocks[index]["input_ids"]) - 1 for index in range(len(blocks))])
    return {
        **result,
        "num_blocks": len(blocks),
        "kl": [[figure(latent) for latent in layer.unbind(dim=1)] for layer in kl.unbind(dim=1)],
        "layers": [layer + 1 for layer in model.config.reading_layers],
        "kl_by_layer": [figure(layer) for layer in kl.sum(dim=2).unbind(dim=1)],
        "kl_total": figure(posterior.kl_divergence()),
        "kl_per_token": figure(posterior.kl_divergence() / num_tokens),
        "threshold": threshold,
        "num_channels": posterior.mean.shape[-1],
        "active_units": active.tolist(),
        "num_active": int(active.sum()),
        "num_units": posterior.mean[0].numel(),
    }


def latent_usage_markdown(result: dict) -> str:
    """A table of `latent_usage`, a row for each layer, and what it shows."""
    channels = result["num_channels"]
    rows = [["layer", "KL, nats a block", "of which each latent", f"active units, each latent's of {channels}"]]
    for index, (layer, total) in enumerate(zip(result["kl"], result["kl_by_layer"], strict=True)):
        each = ", ".join(f"{latent['value']:.3f}" for latent in layer)
        rows.append(
            [str(result["layers"][index]), written(total), each, ", ".join(map(str, result["active_units"][index]))]
        )
    active, units = result["num_active"], result["num_units"]
    rows.append(["all", written(result["kl_total"]), "", f"{active} of {units} ({100 * active / units:.1f} %)"])
    return (
        f"{markdown_rows(rows)}\n\nThe latents tell {written(result['kl_per_token'], 4)} nats a token of their text. "
        f"A unit is active if its posterior mean varies over blocks by more than {result['threshold']:g} "
        f"(Burda et al. 2016); the prior's variance is 1. {_over_blocks(result)}"
    )


# ------------------------------------------------------------------ where tokens look


@contextmanager
def _eager(model):
    """Attention that gives its weights, which sdpa and flex do not. Restored after."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _recorded_additions(model):
    """A list that each forward pass appends to, for each layer: (B, S) size of what latents add over what is there."""
    sizes, handles = [], []
    stream = {}

    def remember(module, inputs):
        stream["before"] = inputs[0]

    def compare(module, inputs, output):
        sizes.append(output.float().norm(dim=-1) / stream["before"].float().norm(dim=-1))

    for layer in (model.model.layers[number] for number in model.config.reading_layers):
        handles.append(layer.cross_attention_layernorm.register_forward_pre_hook(remember))
        handles.append(layer.cross_attention_gate.register_forward_hook(compare))
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def cross_attention_maps(model, input_ids, latents, attention_mask=None) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L, H, S, N) attention of each token to its layer's latents, and (B, L, S) how much the layer takes from them.

    The first sums to 1 over latents whatever they carry; the second is the length of what the cross-attention adds to
    the residual stream, gate included, over the length of what it adds to.
    """
    check_sequences(model, input_ids, attention_mask)
    with _eager(model), _recorded_additions(model) as sizes:
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            latents=latents,
            output_attentions=True,
            use_cache=False,
        )
    return torch.stack(output.cross_attentions, dim=1), torch.stack(sizes, dim=1)


def cross_attention(
    model,
    tokenizer,
    blocks,
    num_tokens: int = 48,
    batch_size: int = 16,
    num_inference_steps: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict:
    """Where tokens look among their layer's latents, read at the posterior mean, and how much they take from there.

    `weights`: (L, tokens, N) mean over heads, for the first `num_tokens` tokens of the first block, spelt in `tokens`.
    `entropy`: by layer, of a head's attention, in nats, mean over heads and tokens, figures over blocks; `max_entropy`
    is that of looking at all latents alike. `addition`: by layer, as in `cross_attention_maps`, over blocks.
    """
    result = settings_of(model, num_inference_steps, seed)
    check_blocks(blocks, least_tokens=2)
    check_at_least(1, num_tokens=num_tokens)
    posterior = infer_posteriors(model, blocks, batch_size, num_inference_steps, seed, progress)
    entropies, additions, shown = [], [], None
    with evaluating(model):
        for rows, input_ids, mask in batches(blocks, batch_size, model.device):
            mean = posterior.mean[rows].to(model.device)
            weights, sizes = cross_attention_maps(model, input_ids, mean, mask)
            if shown is None:
                shown = weights[0].mean(dim=1)[:, : min(num_tokens, int(mask[0].sum()))].cpu()
            real = mask[:, None].to(sizes.dtype)
            entropy = torch.special.entr(weights.float()).sum(dim=-1).mean(dim=2)
            for found, values in ((entropies, entropy), (additions, sizes)):
                found.append(((values * real).sum(dim=-1) / real.sum(dim=-1)).cpu())
    tokens = blocks[0]["input_ids"][: shown.shape[1]]
    return {
        **result,
        "num_blocks": len(blocks),
        "tokens": [tokenizer.decode([token]) for token in tokens],
        "weights": shown.tolist(),
        "layers": [layer + 1 for layer in model.config.reading_layers],
        "entropy": [figure(layer) for layer in torch.cat(entropies).unbind(dim=1)],
        "max_entropy": math.log(model.config.latents_per_layer),
        "addition": [figure(layer) for layer in torch.cat(additions).unbind(dim=1)],
    }


def cross_attention_markdown(result: dict) -> str:
    """A table of `cross_attention`: a row for each layer."""
    rows = [["layer", "entropy, nats", "latents add to the residual stream, % of its length"]]
    for layer, entropy, addition in zip(result["layers"], result["entropy"], result["addition"], strict=True):
        rows.append([str(layer), written(entropy, 4), written(addition, 2, 100)])
    return (
        f"{markdown_rows(rows)}\n\nLooking at all of a layer's latents alike has entropy {result['max_entropy']:.4f}. "
        "Attention sums to 1 whatever the latents carry: the last column says how much comes of it. "
        f"{_over_blocks(result)}"
    )


# ------------------------------------------------------------------ in words


def _spoken(name: str) -> str:
    return name.replace("_", "-")


def _errors_over(count: int, what: str) -> str:
    return f"± standard error over {count} {what}s" if count > 1 else f"a single {what}, without an error"


def _over_blocks(result: dict) -> str:
    return (
        f"{_errors_over(result['num_blocks'], 'block').capitalize()}; {result['num_inference_steps']} inference steps; "
        "latents at their posterior mean."
    )


def _gain_verdict(name: str, gain: dict) -> str:
    """What latents gain of an accuracy, in words that a chance difference does not earn."""
    points = f"{written(gain, 2, 100, sign=True)} points"
    if not beyond_noise(gain):
        return f"{name.capitalize()}: no difference that these blocks can show ({points})."
    return f"{name.capitalize()}: the latents {'gain' if gain['value'] > 0 else 'lose'} ({points})."
