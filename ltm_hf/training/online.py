"""Thinking at every token: each is predicted with latents fitted, by one step, to all tokens before it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..configuration_ltm import LTMConfig
from ..posterior_ltm import Prelude, negative_log_likelihood


def check_online(config: LTMConfig) -> None:
    """Raise a ValueError unless what a token reads is linear in the latents, and read by the last layer alone."""
    if (
        config.reading_layers != [config.num_hidden_layers - 1]
        or config.cross_attention_keys != "embeddings"
        or config.cross_attention_rotary
        or config.cross_attention_value_projection
    ):
        raise ValueError(
            "slow_gradient='online' needs a model whose last layer alone reads latents, as they are, where their "
            "embeddings are: cross_attention_layers=[-1], cross_attention_keys='embeddings', "
            "cross_attention_rotary=False and cross_attention_value_projection=False."
        )


def online_thoughts(
    model: nn.Module,
    step_size: float,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Prelude]:
    """What each token reads of latents that one step of "map" from z = 0 fits to the tokens before it, for all at once.

    A token's latents are -ρ Σ_s a_s ⊗ e_s, over tokens s whose next is known, with attention weights a (a row for each
    head) and errors e, the gradient of the next token's nats in what token s reads. So token t reads
    -ρ Σ_s (a_t · a_s) e_s: causal attention without a softmax, whose memory is of a constant size.

    Returns thoughts (B, S, D), for `reading`, and the prelude of the batch. Both have a graph where the decoder learns:
    the gradient goes through the step.
    """
    learns, prelude = torch.is_grad_enabled(), Prelude(frozen=False)
    nothing = torch.zeros(*input_ids.shape, model.config.hidden_size, device=input_ids.device, requires_grad=True)
    with torch.enable_grad(), reading(model, nothing):
        latents = no_latents(model, input_ids)
        nats = negative_log_likelihood(model, input_ids, latents, attention_mask, labels, prelude=prelude)
        (errors,) = torch.autograd.grad(nats.sum(), nothing, create_graph=learns)
    layer = model.get_decoder().layers[-1]
    weights = _attention_weights(layer.cross_attn, layer.cross_attention_layernorm(prelude.hidden_states))
    alike = (weights @ weights.mT).tril(-1)  # (B, H, S, S): of the tokens whose next one is known
    errors = errors.to(alike.dtype).unflatten(-1, (alike.shape[1], -1)).transpose(1, 2)
    return -step_size * (alike @ errors).transpose(1, 2).flatten(2), prelude


def no_latents(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Latents for a decoder that is `reading` something else."""
    return torch.zeros(len(input_ids), *model.config.latent_shape, device=input_ids.device)


@contextmanager
def reading(model: nn.Module, thoughts: torch.Tensor) -> Iterator[None]:
    """The last layer reads thoughts (B, S, D), a vector for each token, whatever latents it is given."""
    thoughts = thoughts.view_as(thoughts)  # torch's FlopCounterMode wants no leaves
    hook = model.get_decoder().layers[-1].cross_attn.register_forward_hook(lambda *_: (thoughts, None))
    try:
        yield
    finally:
        hook.remove()


def _attention_weights(cross_attn: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """(B, H, S, N): how much of each latent a token reads."""
    queries, keys = (
        projected.unflatten(-1, (-1, cross_attn.head_dim)).transpose(-3, -2)
        for projected in (cross_attn.q_proj(hidden_states), cross_attn.k_proj(cross_attn.latent_embeddings.weight))
    )
    return (queries @ keys.mT * cross_attn.scaling).softmax(dim=-1, dtype=torch.float32)
