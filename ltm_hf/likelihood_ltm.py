"""A batch of texts, its likelihood given latents, and the bound that a posterior gives.

Shapes: B batch, S tokens, L layers, N latents a layer, D hidden. Everything is in nats and summed over a sequence's
tokens; nothing is averaged over the batch, so that a sequence's fit does not depend on its batch mates.

    ELBO(x) = E_q[log p(x|z)] - KL(q(z|x) || N(0, I)),   q = N(mean, diag exp(log_variance)),   z = mean + std·ε
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .configuration_ltm import whole_number
from .losses_ltm import IGNORED
from .posterior_ltm import LatentPosterior, check_posterior, sequence_keys


def check_sequences(model, input_ids, attention_mask=None, labels=None) -> None:
    """Refuse, with a ValueError, token ids, masks and labels that do not fit the model or each other."""
    for name, tensor in (("input_ids", input_ids), ("attention_mask", attention_mask), ("labels", labels)):
        if not torch.is_tensor(tensor) and (tensor is not None or name == "input_ids"):
            raise ValueError(f"{name} must be a tensor (batch, tokens), got {type(tensor).__name__}.")
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be (batch, tokens), got the shape {tuple(input_ids.shape)}.")
    for name, tensor in (("attention_mask", attention_mask), ("labels", labels)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids, {tuple(input_ids.shape)}, got {tuple(tensor.shape)}."
            )
    if attention_mask is not None and not ((attention_mask == 0) | (attention_mask == 1)).all():
        raise ValueError("attention_mask must be 1 for real tokens and 0 for padding, and holds something else.")
    for name, tokens in (("input_ids", input_ids), ("labels", labels)):
        if tokens is None:
            continue
        if tokens.dtype not in (torch.long, torch.int):
            raise ValueError(f"{name} must be int64 or int32, got {tokens.dtype}.")
        if name == "labels":
            tokens = tokens[tokens != IGNORED]
        if not tokens.numel():
            continue
        low, high = (int(bound) for bound in tokens.aminmax())
        if low < 0 or high >= model.config.vocab_size:
            raise ValueError(
                f"{name} must be at least 0 and below vocab_size ({model.config.vocab_size}), "
                f"got {low if low < 0 else high}."
            )


@dataclass(frozen=True)
class Text:
    """Token ids of a batch, checked and shifted once.

    input_ids: (B, S). mask: (B, S), 1 for real tokens and 0 for padding, or None where all are real.
    targets: (B, S), what each position is scored on, the label of the token after it; -100 where nothing is. A token is
        scored if it and the token before it are real: the first of a sequence has nothing to be predicted from, on
        whichever side the padding is.
    """

    input_ids: torch.Tensor
    mask: torch.Tensor | None
    targets: torch.Tensor

    @classmethod
    def of(cls, model, input_ids, attention_mask=None, labels=None) -> "Text":
        """Of token ids, mask and labels (B, S), or of a text that is one already.

        Raises ValueError where they do not fit the model or each other.
        """
        if isinstance(input_ids, cls):
            return input_ids
        check_sequences(model, input_ids, attention_mask, labels)
        return cls.unchecked(input_ids, attention_mask, labels)

    @classmethod
    def unchecked(cls, input_ids, attention_mask=None, labels=None) -> "Text":
        """Of what was checked before."""
        targets = F.pad(input_ids if labels is None else labels, (0, 1), value=IGNORED)[:, 1:]
        if attention_mask is not None:
            real = attention_mask.bool()
            targets = targets.masked_fill(~(real & F.pad(real, (0, 1))[:, 1:]), IGNORED)
        return cls(input_ids, attention_mask, targets)

    def scoring(self, chosen: torch.Tensor) -> "Text":
        """The same with the targets at the chosen positions (B, S) alone."""
        return replace(self, targets=self.targets.masked_fill(~chosen, IGNORED))

    @property
    def is_scored(self) -> torch.Tensor:
        """(B, S)"""
        return self.targets != IGNORED

    @property
    def num_tokens(self) -> torch.Tensor:
        """(B,) scored tokens."""
        return self.is_scored.sum(dim=1)

    @property
    def keys(self) -> torch.Tensor:
        """(B,), what identifies the sequences to noise."""
        return sequence_keys(self.input_ids, torch.ones_like(self.input_ids) if self.mask is None else self.mask)

    def outside_inference_mode(self) -> "Text":
        """With tensors that autograd can save."""
        given = (self.input_ids, self.mask, self.targets)
        return Text(*(x.clone() if x is not None and x.is_inference() else x for x in given))


# ------------------------------------------------------------------ the decoder in two stages


def before_latents(model, text: Text):
    """What no latent changes of a pass over a text: the `DecoderState` that `read` starts from."""
    return model(
        input_ids=text.input_ids,
        attention_mask=text.mask,
        shift_labels=text.targets,
        use_cache=False,
        until_latents=True,
    )


def read(model, state, text: Text, latents: torch.Tensor) -> torch.Tensor:
    """(B,) nats: -log p(x|z) of each sequence, from what `before_latents` gave."""
    given = dict(shift_labels=text.targets, loss_reduction="none", use_cache=False)
    return model(state=state, latents=latents, **given).loss.sum(dim=1)


def negative_log_likelihood(model, text: Text, latents: torch.Tensor | None = None, **memory) -> torch.Tensor:
    """(B,) nats: -log p(x|z) of each sequence, the sum over its scored tokens.

    `latents=None`: of the plain decoder, or of any other causal language model. memory: for a decoder that has one,
    `latent_state` and what goes with it: each token is given what those before it have left there.
    """
    given = dict(input_ids=text.input_ids, attention_mask=text.mask, use_cache=False, **memory)
    if latents is not None:
        given["latents"] = latents
    if getattr(getattr(model, "config", None), "model_type", None) == "ltm":  # which can do without the logits
        return model(**given, shift_labels=text.targets, loss_reduction="none").loss.sum(dim=1)
    logits = model(**given).logits
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), text.targets.flatten().long(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(text.targets.shape).sum(dim=1)


class ELBO(NamedTuple):
    """Estimates for each sequence, (B,) each; nats, except `num_tokens`. elbo = -(nll + kl) <= log p(x) on average."""

    nll: torch.Tensor
    kl: torch.Tensor
    elbo: torch.Tensor
    num_tokens: torch.Tensor


def elbo(
    model,
    input_ids: torch.Tensor | Text,
    posterior: LatentPosterior,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    num_particles: int = 1,
    seed: int | None = None,
    epsilon: torch.Tensor | None = None,
) -> ELBO:
    """The evidence lower bound of each sequence under its posterior, with noise that the fit has not seen.

    num_particles: samples of z that the likelihood is averaged over. seed: default 0; no seed gives the noise of a fit.
    epsilon: (B, L, N, D) noise to use instead, for one particle. Differentiable; wrap it in `torch.no_grad` to score.
    """
    text = Text.of(model, input_ids, attention_mask, labels)
    check_posterior(posterior, len(text.input_ids))
    if epsilon is not None and epsilon.shape != posterior.mean.shape:
        raise ValueError(f"epsilon must have the shape {tuple(posterior.mean.shape)}, got {tuple(epsilon.shape)}.")
    num_particles = whole_number("num_particles", num_particles, least=1)
    if epsilon is not None and num_particles != 1:
        raise ValueError(f"num_particles must be 1 with a given epsilon, got {num_particles}.")
    nll = 0
    for particle in range(num_particles):
        latents = posterior.scoring_sample(particle, seed) if epsilon is None else posterior.reparameterize(epsilon)
        nll = nll + negative_log_likelihood(model, text, latents) / num_particles
    kl = posterior.kl_divergence()
    return ELBO(nll, kl, -(nll + kl), text.num_tokens)


__all__ = ["ELBO", "Text", "elbo"]
