"""The decoder's layers: a causal Transformer with a short attention window, which a reader gives latents.

Shapes: B batch, S tokens, L layers, N latents a layer, D hidden, H attention heads, K key-value heads, d head.

The building blocks are Mistral's. What is added is a reader of latents: in each layer (paper section 3), or after the
last.
"""

import inspect
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.mistral.modeling_mistral import (
    MistralRMSNorm,
    MistralRotaryEmbedding,
    eager_attention_forward,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_ltm import BANDED_SDPA
from .cache_ltm import CACHE, CacheByBothNames, check_filled_with_latents, keep_latents, kept_latents, the_cache
from .configuration_ltm import LTMConfig
from .layers_ltm import (
    SELF_ATTENTIONS,
    LTMCrossAttention,
    LTMDecoderLayer,
    LTMGate,
    check_latent_key_values,
    check_latents,
)
from .losses_ltm import Scored
from .memory_ltm import LTMAddresses, LTMScales, MemoryReader

# Arguments of `forward` that are for others: transformers' decorators, and attention functions with **kwargs.
_PASSED_ON = {"output_hidden_states", "output_attentions", "return_dict", *FlashAttentionKwargs.__annotations__}
_GIVEN_BY_LAYERS = {"module", "query", "key", "value", "attention_mask", "scaling", "dropout", "is_causal"}


@dataclass
class LTMModelOutputWithPast(CacheByBothNames, BaseModelOutputWithPastAndCrossAttentions):
    """transformers' output of a decoder; its cache answers to both its names."""


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
        if not is_paged(cache):
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
        cached = {"cache" if is_paged(cache) else CACHE: cache, "use_cache": use_cache}
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


def is_paged(cache) -> bool:
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


__all__ = ["LTMModel", "LTMModelOutputWithPast", "LTMPreTrainedModel"]
