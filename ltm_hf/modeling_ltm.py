"""The causal language model p(x|z): logits, losses, and a memory that is read and written on the way.

Shapes: B batch, S tokens, L layers, N latents a layer, D hidden, H attention heads, K key-value heads, d head.
"""

import inspect
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.utils import can_return_tuple

from .cache_ltm import CACHE, CacheByBothNames, keep_latents, kept_latents, record_call, the_cache
from .configuration_ltm import LTMConfig
from .decoder_ltm import DecoderState, LTMModel, LTMPreTrainedModel, is_paged
from .encoder_ltm import LTMEncoder
from .generation_ltm import LTMGenerationMixin
from .inference_ltm import infer_posterior
from .likelihood_ltm import elbo
from .losses_ltm import IGNORED, HeadPass, KnownLoss, Scored, mean_loss, token_losses
from .memory_ltm import Lesson, check_memory, relive, relive_through_errors, think
from .posterior_ltm import sample_prior
from .sharded_ltm import gathered_once


@dataclass
class LTMCausalLMOutputWithPast(CacheByBothNames, CausalLMOutputWithCrossAttentions):
    """transformers' causal LM output and `latents`, the (B, L, N, D) latents that the decoder read, if any.

    They are detached: a module that returned the leaf itself could not be watched by hooks while `infer_posterior`
    differentiates with respect to it (torch's FlopCounterMode refuses).
    """

    latents: torch.FloatTensor | None = None


class LossAsked(NamedTuple):
    """What a call asks of the loss.

    labels: (B, S), as they were given. targets: (B, S), shifted; None where the loss function shifts the labels.
    shifts: whether labels are to be shifted. reduction: "mean" or "none", without logits, or None. is_usual: nothing
    but a mean is asked for. options: of the loss function.
    """

    labels: torch.Tensor | None
    targets: torch.Tensor | None
    shifts: bool
    reduction: str | None
    is_usual: bool
    options: dict

    @classmethod
    def of(cls, function, labels, reduction: str | None, others: dict) -> "LossAsked":
        """Takes what is the loss function's out of a call's other arguments. Raises ValueError without labels."""
        is_plain = function is ForCausalLMLoss
        of_plain = ("num_items_in_batch", "shift_labels", "ignore_index")
        names = of_plain if is_plain else inspect.signature(function).parameters
        options = {name: others.pop(name) for name in names if name in others}
        options = {name: value for name, value in options.items() if value is not None}
        targets = options.pop("shift_labels", None)
        asks, shifts = targets is not None or labels is not None, targets is None and labels is not None
        if reduction not in (None, "mean", "none") or (reduction is not None and not asks):
            raise ValueError(
                f"loss_reduction must be None or, with labels, 'mean' or 'none'; got {reduction!r}"
                f"{'' if asks else ' without labels'}."
            )
        is_usual = is_plain and not options.keys() - {"num_items_in_batch"}
        return cls(labels, targets, shifts, reduction, is_usual, options)

    @property
    def num_items(self) -> torch.Tensor | int | None:
        return self.options.get("num_items_in_batch")

    def shifted(self) -> "LossAsked":
        """With targets, of the labels that were given."""
        if not self.shifts or self.targets is not None:
            return self
        return self._replace(targets=F.pad(self.labels[:, 1:], (0, 1), value=IGNORED))

    def among(self, targets: torch.Tensor) -> "LossAsked":
        """With those of the targets that there are."""
        return self if self.targets is None else self._replace(targets=targets)

    @property
    def directly(self) -> str | None:
        """The reduction, of a loss that needs no logits."""
        return self.reduction if self.is_usual else None

    def ahead(self, device: torch.device) -> Scored | None:
        """The tokens to score, where they can be told before the pass that scores them."""
        if self.targets is None or torch.compiler.is_compiling():
            return None
        return Scored.of(self.targets.to(device))


class LTMForCausalLM(LTMPreTrainedModel, LTMGenerationMixin):
    """A causal language model that takes one more input, `latents`, and can infer it from tokens."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    accepts_loss_kwargs = True

    # Functions with the model as their first argument.
    infer_posterior = infer_posterior
    elbo = elbo
    sample_prior = sample_prior

    def __init__(self, config: LTMConfig):
        super().__init__(config)
        self.model = LTMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.has_encoder:
            self.encoder = LTMEncoder(config)
        self.post_init()
        self._set_inference_defaults()

    def project_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, L, N, D) latents to the keys and values (B, L, 2, K, N, d) that `forward` takes instead of them."""
        return self.model.project_latents(latents)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        latents: torch.FloatTensor | None = None,
        latent_key_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        loss_reduction: str | None = None,
        cache: Cache | None = None,
        latent_state: torch.FloatTensor | None = None,
        latent_noise: torch.FloatTensor | None = None,
        latent_writes: torch.BoolTensor | None = None,
        latent_errors_learn: bool = False,
        state: DecoderState | None = None,
        until_latents: bool = False,
        **kwargs,
    ) -> LTMCausalLMOutputWithPast:
        """Logits (B, S, vocabulary) of the next token given latents, and the mean loss in nats a token given labels.

        labels: (B, S), shifted inside, or `shift_labels`, which are already; -100 is not scored. `num_items_in_batch`
            divides the sum if given.
        loss_reduction: with labels, a loss and no logits, which need never exist all at once. "mean" gives the same
            loss (see `mean_loss`), "none" that of each token, 0 where not scored (see `token_losses`): (B, S - 1), or
            (B, S) of `shift_labels`.
        latent_state: (B, H, N, d + 1), where a memory starts (`prior_state`, `state_of`): each token is read with what
            those before it have left there, and a cache keeps the memory for the call that continues it.
        latent_noise: (B, S, D), standard normal; each token then reads a sample of its posterior, else the mean.
        latent_writes: (B, S), the tokens that a memory learns from; default all.
        latent_errors_learn: let the gradient go through the errors, too (see `relive_through_errors`).
        Everything else, and what is raised: as in `LTMModel.forward`. kwargs are of the loss function too.
        """
        asked = LossAsked.of(self.loss_function, labels, loss_reduction, kwargs)
        cache = the_cache(cache, past_key_values)
        of_memory = dict(latent_state=latent_state, latent_noise=latent_noise, latent_writes=latent_writes)
        memory = self._memory_before(cache, input_ids, latents, latent_errors_learn, **of_memory)
        text = dict(input_ids=input_ids, inputs_embeds=inputs_embeds, position_ids=position_ids, state=state)
        thoughts = dict(latents=latents, latent_key_values=latent_key_values, until_latents=until_latents)
        kwargs |= dict(attention_mask=attention_mask, past_key_values=cache, use_cache=use_cache)
        outputs = self.model(**text, **thoughts, normed=memory is None, **kwargs)
        if until_latents:
            return outputs._replace(scored=asked.ahead(outputs.hidden_states.device))
        hidden_states, logits, loss = outputs.last_hidden_state, None, None
        if memory is not None:
            asked = asked.shifted()
            lesson = Lesson.of(input_ids, attention_mask, asked.targets, latent_writes)
            asked = asked.among(lesson.scored)
            given = (memory, lesson, latent_noise, getattr(outputs, CACHE), asked.num_items, asked.directly)
            through = latent_errors_learn and torch.is_grad_enabled()
            remember = self._learn_through_errors if through else self._remember
            hidden_states, loss = remember(hidden_states, *given)
        if loss is None:
            loss, logits = self._score(hidden_states, asked, state and state.scored, logits_to_keep)
        elif asked.reduction == "none" and asked.shifts:
            loss = loss[:, :-1]
        passed_on = ("hidden_states", "attentions", "cross_attentions", CACHE)
        passed_on = {name: getattr(outputs, name) for name in passed_on}
        read = None if latents is None else latents.detach()
        return LTMCausalLMOutputWithPast(loss=loss, logits=logits, latents=read, **passed_on)

    def _memory_before(self, cache, input_ids, latents, errors_learn: bool, latent_state, **given):
        """Where a memory starts: in the cache, or as a call says; None without one."""
        memory = latent_state
        if self.config.has_memory and not is_paged(cache):
            memory = kept_latents(cache).get("memory", latent_state)
        check_memory(self.config, memory, input_ids, latents, latent_state=latent_state, **given)
        if errors_learn and not torch.is_tensor(memory):
            raise ValueError("latent_errors_learn needs a memory that starts at a latent_state, not in a cache.")
        return memory

    def _score(
        self, hidden_states, asked: LossAsked, scored: Scored | None, logits_to_keep
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The loss that was asked for, and the logits where it takes them all."""
        if asked.reduction == "none":
            targets = asked.shifted().targets if scored is None else scored
            losses = token_losses(self.lm_head, hidden_states, targets)
            return losses[:, :-1] if asked.shifts else losses, None
        if asked.directly == "mean":
            return mean_loss(self.lm_head, hidden_states, asked.shifted().targets, asked.num_items), None
        asked = asked if asked.reduction is None else asked.shifted()
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.lm_head(hidden_states[:, kept, :]), None
        if asked.labels is not None or asked.targets is not None:
            shifted = {} if asked.targets is None else {"shift_labels": asked.targets}
            of_loss = dict(labels=asked.labels, vocab_size=self.config.vocab_size, **shifted, **asked.options)
            loss = self.loss_function(logits=logits, **of_loss)
        return loss, logits if asked.reduction is None else None

    @torch.compiler.disable
    def _learn_through_errors(self, hidden_states, memory, lesson: Lesson, noise, *others):
        """As `_remember`, with a graph through the errors. The loss is yet to be taken; no cache gets the memory."""
        parts = (self.model.reader, self.model.norm, self.lm_head)
        return self.model.norm(relive_through_errors(*parts, hidden_states, lesson, memory, noise)), None

    @contextmanager
    def _reader_to_head(self, hidden_states):
        """What a memory calls for each chunk. Weights that are sharded are gathered inside."""
        modules = (self.model.reader, self.model.norm, self.lm_head)

        def touch():
            states = hidden_states[:, :1]
            latents = states.new_zeros(len(states), *self.config.latent_shape)
            self.lm_head(self.model.norm(self.model.reader(states, latents=latents)))

        with gathered_once(modules, touch) as (reader, norm, head):
            yield reader, norm, HeadPass(head)

    @torch.compiler.disable
    def _remember(
        self, hidden_states, memory, lesson: Lesson, noise, cache, num_items, reduction
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states (B, S, D) of tokens that read the memory of all before them, and the loss if one is asked for.

        The cache, if there is one, gets the memory after them.
        """
        scores = None
        if reduction == "mean":
            scores = lesson.is_scored / (lesson.is_scored.sum() if num_items is None else num_items)
        keep = cache is not None
        with self._reader_to_head(hidden_states) as modules:
            thought = think(*modules, hidden_states, lesson, memory, scores=scores, noise=noise, keep=keep)
            weight_gradient = modules[-1].weight_gradient
        if keep:

            def after(length):
                drawn, states = (None if x is None else x[:, :length] for x in (noise, hidden_states))
                with self._reader_to_head(states) as modules:
                    return think(*modules, states, lesson.until(length), memory, noise=drawn, keep=True).state

            keep_latents(cache, memory=thought.state)
            record_call(cache, hidden_states.shape[1], memory, after)
        learning = torch.is_grad_enabled()
        if not learning and reduction is not None:
            nats = thought.nats * lesson.is_scored
            return thought.residual, nats if reduction == "none" else (nats * scores).sum()
        residual = relive(self.model.reader, hidden_states, thought, noise) if learning else thought.residual
        states = self.model.norm(residual)
        if reduction == "mean" and weight_gradient is not None:
            loss, gradient = (thought.nats * scores).sum(), thought.gradient * scores[..., None]
            return states, KnownLoss.apply(states, self.lm_head.weight, loss, gradient, weight_gradient)
        return states, None


__all__ = ["LTMCausalLMOutputWithPast", "LTMForCausalLM", "LTMModel", "LTMPreTrainedModel"]
