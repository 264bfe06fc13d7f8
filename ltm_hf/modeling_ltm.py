"""The decoder p(x|z): a causal Transformer with a short attention window that reads latents in every layer.

Shapes: B batch, S tokens, L layers, N latents a layer, D hidden, H attention heads, K key-value heads, d head.

The building blocks are Mistral's. Differences: each layer has a cross-attention to its own latents between
self-attention and feed-forward (paper section 3), and a learned gate on that cross-attention's output.
"""

import inspect
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.mistral.modeling_mistral import (
    MistralRMSNorm,
    MistralRotaryEmbedding,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_ltm import BANDED_SDPA
from .cache_ltm import (
    CACHE,
    CacheByBothNames,
    check_filled_with_latents,
    keep_latents,
    kept_latents,
    record_call,
    the_cache,
)
from .configuration_ltm import LTMConfig
from .encoder_ltm import LTMEncoder
from .generation_ltm import LTMGenerationMixin
from .inference_ltm import infer_posterior
from .layers_ltm import (
    SELF_ATTENTIONS,
    LTMCrossAttention,
    LTMDecoderLayer,
    LTMGate,
    check_latent_key_values,
    check_latents,
)
from .likelihood_ltm import elbo
from .losses_ltm import IGNORED, Gathered, HeadPass, KnownLoss, Scored, mean_loss, token_losses
from .memory_ltm import Lesson, LTMAddresses, LTMScales, MemoryReader, check_memory, relive, think
from .posterior_ltm import sample_prior

# Arguments of `forward` that are for others: transformers' decorators, and attention functions with **kwargs.
_PASSED_ON = {"output_hidden_states", "output_attentions", "return_dict", *FlashAttentionKwargs.__annotations__}
_GIVEN_BY_LAYERS = {"module", "query", "key", "value", "attention_mask", "scaling", "dropout", "is_causal"}
_LOSS_ARGUMENTS = ("num_items_in_batch", "shift_labels", "ignore_index")


@dataclass
class LTMModelOutputWithPast(CacheByBothNames, BaseModelOutputWithPastAndCrossAttentions):
    """transformers' output of a decoder; its cache answers to both its names."""


@dataclass
class LTMCausalLMOutputWithPast(CacheByBothNames, CausalLMOutputWithCrossAttentions):
    """transformers' causal LM output and `latents`, the (B, L, N, D) latents that the decoder read, if any.

    They are detached: a module that returned the leaf itself could not be watched by hooks while `infer_posterior`
    differentiates with respect to it (torch's FlopCounterMode refuses).
    """

    latents: torch.FloatTensor | None = None


class LTMPreTrainedModel(PreTrainedModel):
    config: LTMConfig
    config_class = LTMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LTMDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": LTMDecoderLayer,
        "attentions": list(SELF_ATTENTIONS.values()),
        "cross_attentions": LTMCrossAttention,
    }

    def get_correct_attn_implementation(self, requested_attention: str | None, *args, **kwargs) -> str:
        """As transformers', with windows on the CPU where nobody asks for anything else."""
        correct = super().get_correct_attn_implementation(requested_attention, *args, **kwargs)
        return BANDED_SDPA if requested_attention is None and correct == "sdpa" else correct

    def save_pretrained(self, *args, **kwargs):
        """As transformers'. Under FSDP2 too, which puts the model into a class of its own, whose code it would save."""
        plain = object.__new__(next(base for base in type(self).__mro__ if not hasattr(base, "unshard")))
        plain.__dict__ = self.__dict__  # the same model, seen as of its own class
        return super(LTMPreTrainedModel, plain).save_pretrained(*args, **kwargs)

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, LTMGate):
            init.constant_(module.weight, module.start)
        elif isinstance(module, LTMAddresses):
            init.normal_(module.weight, mean=0.0, std=module.SHARPNESS)
        elif isinstance(module, LTMScales):
            init.constant_(module.log_read, math.log(module.READ))
            init.zeros_(module.log_precision)
        elif getattr(module, "is_sharp", False):
            init.normal_(module.weight, mean=0.0, std=LTMAddresses.SHARPNESS * self.config.hidden_size**-0.5)
        elif getattr(module, "starts_as_identity", False):
            init.eye_(module.weight)
        elif getattr(module, "adds_to_residual", False):
            # Two attentions a layer add to the residual stream: keep its variance independent of depth. The mark is on
            # the projection: in code that is not its own, transformers passes over modules that only hold others.
            std = self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5
            init.normal_(module.weight, mean=0.0, std=std)
        elif getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)


class DecoderState(NamedTuple):
    """What no latent changes of a pass over a text.

    hidden_states: (B, S, D), as they meet the first latents. scored: the tokens to score, where that is known ahead.
    The others are what layers share.
    """

    hidden_states: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    latent_position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    scored: Scored | None = None

    @property
    def shared(self) -> dict:
        names = ("attention_mask", "position_ids", "position_embeddings", "latent_position_embeddings")
        return {name: getattr(self, name) for name in names}


class LTMModel(LTMPreTrainedModel):
    """The decoder without its vocabulary projection."""

    _keys_to_ignore_on_load_unexpected = [r"^encoder\."]

    def __init__(self, config: LTMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            LTMDecoderLayer(config, index, index in config.reading_layers) for index in range(config.num_hidden_layers)
        )
        if config.has_memory:
            self.reader = MemoryReader(config)
        self.norm = MistralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MistralRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def latent_position_embeddings(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rotary tables of a layer's latents, at positions 0, s, 2s, …; device and dtype are those of `like`."""
        positions = torch.arange(self.config.latents_per_layer, device=like.device)
        return self.rotary_emb(like, position_ids=(positions * self.config.latent_position_stride)[None])

    def project_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, L, N, D) latents to the keys and values (B, L, 2, K, N, d) that `forward` takes instead of them.

        Generation calls this once and reads the result at every token. Raises ValueError for a memory, which has none.
        """
        check_latents(self.config, latents)
        if self.config.has_memory:
            raise ValueError("A memory's latents have no keys and values: give them as latents.")
        tables = self.latent_position_embeddings(latents.to(self.dtype))
        projected = []
        for index, number in enumerate(self.config.reading_layers):
            layer = self.layers[number]
            sharded = hasattr(layer, "unshard")  # FSDP2 gathers weights for a layer's own forward only
            if sharded:
                layer.unshard()
            projected.append(layer.cross_attn.project_latents(latents[:, index], tables))
            if sharded:
                layer.reshard()
        return torch.stack([one.to(projected[0].device) for one in projected], dim=1)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        latents: torch.FloatTensor | None = None,
        latent_key_values: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        state: DecoderState | None = None,
        until_latents: bool = False,
        normed: bool = True,
        **kwargs,
    ) -> LTMModelOutputWithPast:
        """Hidden states (B, S, D) of tokens given latents.

        latents: (B, L, N, D), or None for a plain windowed decoder (the same as latents of zero).
        latent_key_values: (B, L, 2, K, N, d) from `project_latents`, in place of `latents`.
        cache, past_key_values: two names of one argument. It holds the latents that it is filled with, and later calls
            read these unless they give others.
        position_ids: counted over the unmasked tokens by default, so that padding on either side changes nothing.
        until_latents: stop there, and return a `DecoderState`. state: go on from one; then no tokens are given.
        normed: with the last norm.
        kwargs: of the attention function, and transformers' `output_hidden_states` and the like.

        Raises ValueError for latents of another shape, or given twice, and for some with a cache that was filled
        without; TypeError for an argument that nobody knows.
        """
        cache = the_cache(cache, past_key_values)
        if not _is_paged(cache):
            self._check_known(kwargs)
            if cache is not None and not until_latents and not torch.compiler.is_compiling():
                latents, latent_key_values = _with_kept(cache, latents, latent_key_values)
        if (input_ids is not None) + (inputs_embeds is not None) + (state is not None) != 1:
            raise ValueError("Exactly one of input_ids, inputs_embeds and state must be given.")
        # .shape, not len(): torch.export keeps the batch size symbolic.
        tokens = next(x for x in (input_ids, inputs_embeds, state and state.hidden_states) if x is not None)
        self._check_latents(latents, latent_key_values, tokens.shape[0])
        part = "first" if until_latents else None if state is None else "second"
        if state is None:
            has_latents = until_latents or latents is not None
            state, cache = self._enter(
                input_ids, inputs_embeds, attention_mask, position_ids, cache, use_cache, has_latents
            )
        cached = {"cache" if _is_paged(cache) else CACHE: cache, "use_cache": use_cache}
        hidden_states = self._layers(state, latents, latent_key_values, part, **cached, **kwargs)
        if until_latents:
            return state._replace(hidden_states=hidden_states)
        if self.config.has_memory and latents is not None:
            hidden_states = self.reader(hidden_states, latents=latents)  # so named, hooks leave the leaf alone
        if use_cache and not torch.compiler.is_compiling():
            _keep(cache, latents, latent_key_values)
        return LTMModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states) if normed else hidden_states,
            **{CACHE: cache if use_cache else None},
        )

    def _layers(self, state: DecoderState, latents, latent_key_values, part: str | None, **kwargs) -> torch.Tensor:
        """(B, S, D) after all layers, or what no latent changes of them ("first"), or the rest ("second")."""
        reading, hidden_states = self.config.reading_layers, state.hidden_states
        first = min(reading, default=self.config.num_hidden_layers)
        for index, layer in enumerate(self.layers[: self.config.num_hidden_layers]):  # fewer: early exit, a draft
            if (part == "first" and index > first) or (part == "second" and index < first):
                continue
            read = {name: x[:, reading.index(index)] for name, x in (("latents", latents),
                    ("latent_key_values", latent_key_values)) if x is not None and index in reading}  # fmt: skip
            half = part if index == first else None
            hidden_states = layer(hidden_states, half=half, **read, **state.shared, **kwargs)
        return hidden_states

    def _check_latents(self, latents, latent_key_values, batch_size: int) -> None:
        if latents is not None:
            if latent_key_values is not None:
                raise ValueError("Only one of latents and latent_key_values can be given.")
            check_latents(self.config, latents, batch_size)
        elif latent_key_values is not None:
            check_latent_key_values(self.config, latent_key_values, batch_size)

    def _check_known(self, kwargs) -> None:
        """Raise TypeError for arguments that nobody reads: the library may have meant them for this model."""
        if all(name in _PASSED_ON for name in kwargs):
            return
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        known = _PASSED_ON | {f"output_{name}" for name in self._can_record_outputs}
        known |= inspect.signature(attention).parameters.keys() - _GIVEN_BY_LAYERS
        for name in sorted(kwargs.keys() - known):
            raise TypeError(f"{type(self).__name__}.forward() got an unexpected keyword argument {name!r}.")

    def _enter(
        self, input_ids, inputs_embeds, attention_mask, position_ids, cache, use_cache, has_latents
    ) -> tuple[DecoderState, Cache | None]:
        """What layers start from, and the cache."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = self._default_position_ids(inputs_embeds, attention_mask, cache)

        kind = self.config.layer_types[0]  # all layers are of one kind
        if isinstance(attention_mask, dict):  # made by generate() for caches that compile
            mask = attention_mask[kind]
        else:
            create_mask = create_causal_mask if kind == "full_attention" else create_sliding_window_causal_mask
            mask = create_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE: cache},
            )
        tables = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        rotates = has_latents and self.config.reading_layers
        latent_tables = self.latent_position_embeddings(inputs_embeds) if rotates else None
        return DecoderState(inputs_embeds, mask, position_ids, tables, latent_tables), cache

    @staticmethod
    def _default_position_ids(inputs_embeds, attention_mask, cache) -> torch.LongTensor:
        length = inputs_embeds.shape[1]
        seen = cache.get_seq_length() if cache is not None else 0
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]
        return (torch.arange(length, device=inputs_embeds.device) + seen)[None]


def _is_paged(cache) -> bool:
    """Whether it is one of continuous batching, which has a protocol of its own."""
    return not isinstance(cache, Cache | None)


def _with_kept(cache: Cache, latents, latent_key_values):
    """The latents that were given, or those in the cache. Raises ValueError for some that do not fit to its content."""
    if latents is not None or latent_key_values is not None:
        check_filled_with_latents(cache)
        return latents, latent_key_values
    kept = kept_latents(cache)
    return kept.get("latents"), kept.get("latent_key_values")


def _keep(cache: Cache, latents, latent_key_values) -> None:
    if latents is not None:
        keep_latents(cache, latents=latents)
    elif latent_key_values is not None:
        keep_latents(cache, latent_key_values=latent_key_values)


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
        state: DecoderState | None = None,
        until_latents: bool = False,
        **kwargs,
    ) -> LTMCausalLMOutputWithPast:
        """Logits (B, S, vocabulary) of the next token given latents, and the mean loss in nats a token given labels.

        latents: (B, L, N, D), or None for a plain windowed decoder (the same as latents of zero).
        latent_key_values: (B, L, 2, K, N, d) from `project_latents`, in place of `latents`.
        cache, past_key_values: two names of one argument. It holds the latents that it is filled with, and later calls
            read these unless they give others.
        labels: (B, S), shifted inside, or `shift_labels`, which are already; -100 is not scored. `num_items_in_batch`
            divides the sum if given.
        loss_reduction: with labels, a loss and no logits, which need never exist all at once. "mean" gives the same
            loss (see `mean_loss`), "none" that of each token, 0 where not scored (see `token_losses`): (B, S - 1), or
            (B, S) of `shift_labels`.
        latent_state: (B, H, N, d + 1), where a memory starts (`prior_state`, `state_of`): each token is read with what
            those before it have left there, and a cache keeps the memory for the call that continues it.
            latent_noise: (B, S, D), standard normal; each token then reads a sample of its posterior, else the mean.
            latent_writes: (B, S), the tokens that a memory learns from; default all.
        state, until_latents: as in `LTMModel.forward`.
        kwargs: of the loss and the attention function, and transformers' `output_hidden_states` and the like.

        Raises ValueError for latents of another shape, or given twice, and for some with a cache that was filled
        without; TypeError for an argument that nobody knows.
        """
        plain_loss = self.loss_function is ForCausalLMLoss
        names = _LOSS_ARGUMENTS if plain_loss else inspect.signature(self.loss_function).parameters
        of_loss = {name: kwargs.pop(name) for name in names if name in kwargs}
        of_loss = {name: value for name, value in of_loss.items() if value is not None}
        targets = of_loss.pop("shift_labels", None)
        scores, shifts = targets is not None or labels is not None, targets is None and labels is not None
        if loss_reduction not in (None, "mean", "none") or (loss_reduction is not None and not scores):
            raise ValueError(
                f"loss_reduction must be None or, with labels, 'mean' or 'none'; got {loss_reduction!r}"
                f"{'' if scores else ' without labels'}."
            )
        cache = the_cache(cache, past_key_values)
        memory = latent_state
        if self.config.has_memory and not _is_paged(cache):
            memory = kept_latents(cache).get("memory", latent_state)
        check_memory(self.config, memory, input_ids, latents, latent_state=latent_state, latent_noise=latent_noise,
                     latent_writes=latent_writes)  # fmt: skip
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            inputs_embeds=inputs_embeds,
            latents=latents,
            latent_key_values=latent_key_values,
            use_cache=use_cache,
            state=state,
            until_latents=until_latents,
            normed=memory is None,
            **kwargs,
        )
        if until_latents:
            known = targets is not None and not torch.compiler.is_compiling()
            return outputs._replace(scored=Scored.of(targets.to(outputs.hidden_states.device)) if known else None)
        hidden_states, logits, loss = outputs.last_hidden_state, None, None
        if shifts and (loss_reduction is not None or memory is not None):
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if memory is not None:
            lesson = Lesson.of(input_ids, attention_mask, targets, latent_writes)
            targets = lesson.scored if scores else None
            asked = loss_reduction if plain_loss and not of_loss.keys() - {"num_items_in_batch"} else None
            hidden_states, loss = self._remember(
                hidden_states, memory, lesson, latent_noise, getattr(outputs, CACHE),
                of_loss.get("num_items_in_batch"), asked,
            )  # fmt: skip
        if loss is not None:
            pass
        elif loss_reduction == "none":
            loss = token_losses(self.lm_head, hidden_states, (state and state.scored) or targets)
        elif loss_reduction == "mean" and plain_loss and not of_loss.keys() - {"num_items_in_batch"}:
            loss = mean_loss(self.lm_head, hidden_states, targets, of_loss.get("num_items_in_batch"))
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept, :])
            if scores:
                shifted = {} if targets is None else {"shift_labels": targets}
                loss = self.loss_function(
                    logits=logits, labels=labels, vocab_size=self.config.vocab_size, **shifted, **of_loss
                )
            logits = logits if loss_reduction is None else None
        if loss_reduction == "none" and shifts:
            loss = loss[:, :-1]
        return LTMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            latents=None if latents is None else latents.detach(),
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _reader_to_head(self):
        return self.model.reader, Gathered.if_sharded(self.model.norm), HeadPass(Gathered.if_sharded(self.lm_head))

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
        reader, norm, head_pass = self._reader_to_head()
        thought = think(reader, norm, head_pass, hidden_states, lesson, memory, scores=scores, noise=noise, keep=keep)
        if keep:

            def after(length):
                drawn, states = (None if x is None else x[:, :length] for x in (noise, hidden_states))
                given = (*self._reader_to_head(), states, lesson.until(length), memory)
                return think(*given, noise=drawn, keep=True).state

            keep_latents(cache, memory=thought.state)
            record_call(cache, hidden_states.shape[1], memory, after)
        learning = torch.is_grad_enabled()
        if not learning and reduction is not None:
            nats = thought.nats * lesson.is_scored
            return thought.residual, nats if reduction == "none" else (nats * scores).sum()
        residual = relive(reader, hidden_states, thought, noise) if learning else thought.residual
        states = self.model.norm(residual)
        if reduction == "mean" and head_pass.weight_gradient is not None:
            loss, gradient = (thought.nats * scores).sum(), thought.gradient * scores[..., None]
            return states, KnownLoss.apply(states, self.lm_head.weight, loss, gradient, head_pass.weight_gradient)
        return states, None


__all__ = [
    "LTMCausalLMOutputWithPast",
    "LTMForCausalLM",
    "LTMModel",
    "LTMModelOutputWithPast",
    "LTMPreTrainedModel",
]
