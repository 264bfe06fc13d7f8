"""Gradients through inference: the decoder learns what latents, fitted to a prefix, do for the text that follows."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..configuration_ltm import InferenceSettings
from ..posterior_ltm import (
    IGNORED,
    LatentPosterior,
    MAPInference,
    Prelude,
    negative_log_likelihood,
    scored_tokens,
    step_size,
)


def split_labels(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    share: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, S) labels of the first `share` of the tokens that each row scores, and of the others; -100 elsewhere."""
    labels = F.pad(scored_tokens(input_ids, attention_mask, labels), (1, 0), value=IGNORED)
    scored = labels != IGNORED
    rank = scored.cumsum(dim=1)
    first = scored & (rank <= share * rank[:, -1:])
    return labels.masked_fill(~first, IGNORED), labels.masked_fill(first, IGNORED)


def unrolled_posterior(
    model: nn.Module,
    num_inference_steps: int,
    inference_learning_rate: float,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
) -> tuple[LatentPosterior, torch.Tensor, Prelude]:
    """What `infer_posterior` gives with inference_optimizer="map" from z = 0.

    The model's weights learn, and their gradient goes through the steps, as in MAML (Finn et al. 2017). Step sizes are
    as the model's schedule has them. Returns with it the nats of all scored tokens at z = 0, where the steps begin; and
    the prelude of these tokens, for another pass with other labels.
    """
    settings = InferenceSettings.of(
        model.config, num_inference_steps=num_inference_steps, inference_learning_rate=inference_learning_rate
    )
    prelude = Prelude(frozen=False)
    mean = torch.zeros(len(input_ids), *model.config.latent_shape, device=input_ids.device, requires_grad=True)
    optimizer, trace = MAPInference(mean, torch.zeros_like(mean), settings), []
    model.get_decoder()(input_ids, attention_mask=attention_mask, use_cache=False, prelude=prelude)
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
        for step in range(num_inference_steps):
            nll = negative_log_likelihood(model, input_ids, optimizer.mean, attention_mask, labels, prelude)
            trace.append(nll)
            (gradient,) = torch.autograd.grad(nll.sum(), optimizer.mean, create_graph=True)
            optimizer.update(gradient, None, step_size(settings, step))
    prelude.labels = prelude.scored = None
    posterior = LatentPosterior(optimizer.mean, optimizer.log_variance, -torch.stack(trace).detach())
    return posterior, trace[0].sum(), prelude
