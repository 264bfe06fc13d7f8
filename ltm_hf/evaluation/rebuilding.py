"""A text from its latents: rebuilt layer by layer and in all, and what is written between two texts.

Shapes: B batch, S tokens, R rows (blocks), L layers, N latents a layer, D hidden.

Latents are read at the posterior mean, the better predictor than a sample; of a memory all tokens read the one that it
holds at the end. "Without a layer's latents" always means that they are zero: the prior's mean, and the same as that
layer having none.

Two accuracies of a rebuilt text, the share of its tokens (the first excepted) that are right:
- teacher-forced: each token given the true ones before it in the window, and the latents;
- free-running: greedy search from the first token, with the latents alone. It is counted place by place, so that one
  token too many spoils the rest; end-of-text does not stop it, since blocks go on after it.
"""

import torch

from ..data.numbers import check_at_least
from ..likelihood_ltm import Text, negative_log_likelihood
from .figures import beyond_noise, errors_over, evaluating, figure, markdown_rows, over_blocks, shortened, written
from .representations import batches, check_blocks, infer_posteriors, settings_of, tokenize

ACCURACIES = ("teacher_forced", "free_running")
OWN = "own latents"

# ------------------------------------------------------------------ a text from its latents


@torch.no_grad()
def greedy(model, first_tokens: torch.Tensor, latents: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """(B, num_tokens) tokens, the most likely each time, after first_tokens (B, 1) given latents (B, L, N, D).

    As `generate` with greedy search, except that nothing stops it, that a memory holds what it is given and learns
    nothing more, and that no setting of the checkpoint's generation config has a say.
    """
    given = {"latents": latents}
    if not model.config.has_memory:  # once for all tokens
        given = {"latent_key_values": model.project_latents(latents)}
    tokens, cache = [first_tokens], None
    for _ in range(num_tokens):
        output = model(input_ids=tokens[-1], **given, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        tokens.append(output.logits[:, -1:].argmax(dim=-1))
    return torch.cat(tokens, dim=1)[:, 1:]


def include_layers(latents: torch.Tensor, num_layers: int) -> torch.Tensor:
    """(B, L, N, D) latents with those of the first `num_layers` layers as they are and the others zero."""
    kept = torch.arange(latents.shape[1], device=latents.device) < num_layers
    return latents * kept[:, None, None]


@torch.no_grad()
def token_accuracy(model, text: Text, variants: list[torch.Tensor]) -> list[dict]:
    """For each of several latents (B, L, N, D): (B,) `teacher_forced` and `free_running` accuracies, and `written`.

    `written`: the (B, S - 1) free-running tokens. Padding, on the right, is not counted.
    """
    targets = text.targets[:, :-1]

    def share(tokens):  # what is not scored is no token's id
        return (tokens == targets).sum(dim=1) / text.num_tokens

    # Together: a step of greedy search takes about as long for many rows as for few.
    first_tokens = text.input_ids[:, :1].repeat(len(variants), 1)
    rebuilt = greedy(model, first_tokens, torch.cat(variants), targets.shape[1]).chunk(len(variants))
    found = []
    for latents, tokens in zip(variants, rebuilt, strict=True):
        given = dict(input_ids=text.input_ids, attention_mask=text.mask, latents=latents, use_cache=False)
        predicted = model(**given).logits[:, :-1].argmax(dim=-1)
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
    Raises ValueError for a memory, which no layer reads.
    """
    result = settings_of(model, num_inference_steps, seed)
    if model.config.has_memory:
        raise ValueError("progressive_inclusion goes from layer to layer, and no layer reads a memory.")
    check_blocks(blocks, least_tokens=2)
    posterior = infer_posteriors(model, blocks, batch_size, num_inference_steps, seed, progress)
    layers = [0, *(layer + 1 for layer in model.config.reading_layers)]
    found = {name: [[] for _ in layers] for name in ACCURACIES}
    with evaluating(model):
        for rows, input_ids, mask in batches(blocks, batch_size, model.device, "Rebuilding" if progress else None):
            mean = posterior.mean[rows].to(model.device)
            variants = [include_layers(mean, count) for count in range(len(layers))]
            for layer, accuracy in enumerate(token_accuracy(model, Text.of(model, input_ids, mask), variants)):
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
    return f"{markdown_rows(rows)}\n\n{verdicts} {over_blocks(result)}"


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
        OWN: posterior.mean,
        "another text's latents": posterior.mean.roll(-1, dims=0),
        "no latents": torch.zeros_like(posterior.mean),
    }
    found = {kind: {name: [] for name in (*ACCURACIES, "nll")} for kind in kinds}
    examples = []
    with evaluating(model):
        for rows, input_ids, mask in batches(blocks, batch_size, model.device, "Rebuilding" if progress else None):
            text = Text.of(model, input_ids, mask)
            variants = [latents[rows].to(model.device) for latents in kinds.values()]
            own = [ids[real.bool()][1:] for ids, real in zip(input_ids, mask, strict=True)]
            shown = [{"text": tokenizer.decode(ids)} for ids in own]
            for kind, latents, one in zip(kinds, variants, token_accuracy(model, text, variants), strict=True):
                one["nll"] = negative_log_likelihood(model, text, latents) / text.num_tokens
                for name, values in found[kind].items():
                    values.append(one[name].cpu())
                for example, ids, tokens in zip(shown, own, one["written"], strict=True):
                    example[kind] = tokenizer.decode(tokens[: len(ids)])
            examples += shown[: num_examples - len(examples)]
    found = {kind: {name: torch.cat(values) for name, values in one.items()} for kind, one in found.items()}
    return {
        **result,
        "num_blocks": len(blocks),
        "figures": {kind: {name: figure(values) for name, values in one.items()} for kind, one in found.items()},
        "difference": {
            kind: {name: figure(found[OWN][name] - values) for name, values in one.items()}
            for kind, one in found.items()
            if kind != OWN
        },
        "rebuilt_exactly": int((found[OWN]["free_running"] == 1).sum()),
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
        f"{result['rebuilt_exactly']} of {result['num_blocks']} blocks. {over_blocks(result)} The nll leaves the "
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
        f"against no latents ({plain}); {errors_over(result['num_pairs'], 'pair')}; "
        f"inference steps: {result['num_inference_steps']}.\n\n{markdown_rows(texts)}"
    )


def _nll(model, rows, latents, batch_size) -> torch.Tensor:
    """(R,) nats a token of each row given its latents."""
    found = []
    for part, input_ids, mask in batches(rows, batch_size, model.device):
        thoughts = None if latents is None else latents[part].to(model.device)
        text = Text.of(model, input_ids, mask)
        found.append((negative_log_likelihood(model, text, thoughts) / text.num_tokens).cpu())
    return torch.cat(found)


def _up_to_end(tokenizer, tokens: torch.Tensor) -> str:
    ids = tokens.tolist()
    ids = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
    return tokenizer.decode(ids)


# ------------------------------------------------------------------ in words


def _spoken(name: str) -> str:
    return name.replace("_", "-")


def _gain_verdict(name: str, gain: dict) -> str:
    """What latents gain of an accuracy, in words that a chance difference does not earn."""
    points = f"{written(gain, 2, 100, sign=True)} points"
    if not beyond_noise(gain):
        return f"{name.capitalize()}: no difference that these blocks can show ({points})."
    return f"{name.capitalize()}: the latents {'gain' if gain['value'] > 0 else 'lose'} ({points})."
