"""What each latent carries, and which tokens read it.

Shapes: B batch, S tokens, R rows (blocks), L layers that read latents (1 of a memory), N latents a layer, D hidden, H
heads.
"""

import math
from contextlib import contextmanager

import torch

from ..data.numbers import check_at_least
from ..layers_ltm import check_latents
from ..likelihood_ltm import check_sequences
from ..methods_ltm import method_of
from ..posterior_ltm import LatentPosterior, kl_terms
from .figures import evaluating, figure, markdown_rows, over_blocks, written
from .representations import batches, check_blocks, infer_posteriors, readers, settings_of

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
    A posterior at the prior has KL 0 and none active. KL says how far a text has moved a latent, not what the decoder
    makes of it. Raises ValueError for an inference method that ends at a point, whose KL is infinite.
    """
    result = settings_of(model, num_inference_steps, seed)
    check_blocks(blocks, least_tokens=2)
    _check_two(blocks)
    if method_of(model.config).is_point:
        raise ValueError(
            f"inference_method={model.config.inference_method!r} ends at a point, whose KL is infinite: there is none "
            "to share out by latent."
        )
    posterior = infer_posteriors(model, blocks, batch_size, num_inference_steps, seed, progress)
    kl = kl_per_latent(posterior)
    active = active_units(posterior.mean, threshold)
    num_tokens = torch.tensor([len(blocks[index]["input_ids"]) - 1 for index in range(len(blocks))])
    return {
        **result,
        "num_blocks": len(blocks),
        "kl_weight": model.config.inference_kl_weight,
        "kl": [[figure(latent) for latent in layer.unbind(dim=1)] for layer in kl.unbind(dim=1)],
        "readers": readers(model.config),
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
    rows = [["read by", "KL, nats a block", "of which each latent", f"active units, each latent's of {channels}"]]
    for index, (layer, total) in enumerate(zip(result["kl"], result["kl_by_layer"], strict=True)):
        each = ", ".join(f"{latent['value']:.3f}" for latent in layer)
        rows.append(
            [result["readers"][index], written(total), each, ", ".join(map(str, result["active_units"][index]))]
        )
    active, units = result["num_active"], result["num_units"]
    rows.append(["all", written(result["kl_total"]), "", f"{active} of {units} ({100 * active / units:.1f} %)"])
    weight = "" if result["kl_weight"] == 1 else f", which inference counts {result['kl_weight']:g} times"
    return (
        f"{markdown_rows(rows)}\n\nKL from the prior: {written(result['kl_per_token'], 4)} nats a token{weight}. "
        f"A unit is active if its posterior mean varies over blocks by more than {result['threshold']:g} (Burda et al. "
        f"2016); the prior's variance is 1. {over_blocks(result)}"
    )


# ------------------------------------------------------------------ which tokens read which latents


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
        sizes.append(_relative_size(output, stream["before"]))

    for layer in (model.model.layers[number] for number in model.config.reading_layers):
        handles.append(layer.cross_attention_layernorm.register_forward_pre_hook(remember))
        handles.append(layer.cross_attention_gate.register_forward_hook(compare))
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def reading_maps(model, input_ids, latents, attention_mask=None) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L, H, S, N) how much each token reads of each latent, and (B, L, S) how much it takes from them in all.

    The first sums to 1 over latents whatever they carry; the second is the length of what reading adds to the residual
    stream, gate included, over the length of what it adds to. All tokens read the same latents (B, L, N, D).
    """
    check_sequences(model, input_ids, attention_mask)
    check_latents(model.config, latents, len(input_ids))
    given = dict(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    if model.config.has_memory:
        reader, stream = model.model.reader, model.model(**given, normed=False).last_hidden_state
        added = reader(stream, latents) - stream
        return reader.weights(stream)[:, None], _relative_size(added, stream)[:, None]
    with _eager(model), _recorded_additions(model) as sizes:
        output = model(**given, latents=latents, output_attentions=True)
    return torch.stack(output.cross_attentions, dim=1), torch.stack(sizes, dim=1)


def _relative_size(added: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
    return added.float().norm(dim=-1) / stream.float().norm(dim=-1)


def latent_reading(
    model,
    tokenizer,
    blocks,
    num_tokens: int = 48,
    batch_size: int = 16,
    num_inference_steps: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict:
    """Which latents tokens read, at the posterior mean of the whole text, and how much they take from there.

    `weights`: (L, tokens, N) mean over heads, for the first `num_tokens` tokens of the first block, spelt in `tokens`.
    `entropy`: by layer, of a head's weights, in nats, mean over heads and tokens, figures over blocks; `max_entropy` is
    that of reading all latents alike. `addition`: by layer, as in `reading_maps`, over blocks.
    """
    result = settings_of(model, num_inference_steps, seed)
    check_blocks(blocks, least_tokens=2)
    check_at_least(1, num_tokens=num_tokens)
    posterior = infer_posteriors(model, blocks, batch_size, num_inference_steps, seed, progress)
    entropies, additions, shown = [], [], None
    with evaluating(model):
        for rows, input_ids, mask in batches(blocks, batch_size, model.device):
            mean = posterior.mean[rows].to(model.device)
            weights, sizes = reading_maps(model, input_ids, mean, mask)
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
        "readers": readers(model.config),
        "entropy": [figure(layer) for layer in torch.cat(entropies).unbind(dim=1)],
        "max_entropy": math.log(model.config.latents_per_layer),
        "addition": [figure(layer) for layer in torch.cat(additions).unbind(dim=1)],
    }


def latent_reading_markdown(result: dict) -> str:
    """A table of `latent_reading`: a row for each layer."""
    rows = [["read by", "entropy, nats", "latents add to the residual stream, % of its length"]]
    for reader, entropy, addition in zip(result["readers"], result["entropy"], result["addition"], strict=True):
        rows.append([reader, written(entropy, 4), written(addition, 2, 100)])
    return (
        f"{markdown_rows(rows)}\n\nReading all latents alike has entropy {result['max_entropy']:.4f}. The weights sum "
        f"to 1 whatever the latents carry: the last column says how much comes of it. {over_blocks(result)}"
    )
