"""The decoder p(x|z): a causal Transformer with a short attention window that reads latents in every layer.

Shapes: B batch, S tokens, L layers, N latents a layer, D hidden, H attention heads, K key-value heads, d head.

The building blocks are Mistral's. Differences: each layer has a cross-attention to its own latents between
self-attention and feed-forward (paper section 3), and a learned gate on that cross-attention's output.
"""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import (
    AttentionMaskInterface,
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sdpa_mask,
)
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface, PreTrainedModel
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralMLP,
    MistralRMSNorm,
    MistralRotaryEmbedding,
    eager_attention_forward,
    rotate_half,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_ltm import CACHE, CacheByBothNames, check_filled_with_latents, keep_latents, kept_latents, the_cache
from .configuration_ltm import LTMConfig
from .generation_ltm import LTMGenerationMixin
from .posterior_ltm import IGNORED, Prelude, elbo, infer_posterior, sample_prior

_SELF_ATTENTIONS = {"mistral": MistralAttention, "qwen2": Qwen2Attention, "qwen3": Qwen3Attention}
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


def apply_rotary(states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate (B, heads, positions, d) states. In cross-attention, queries and keys have positions of their own."""
    cos, sin = (table.unsqueeze(1) for table in position_embeddings)
    return states * cos + rotate_half(states) * sin


# ------------------------------------------------------------------ attention within a window, on the CPU

BANDED_SDPA = "banded_sdpa"  # an `attn_implementation`, and the default
SHORTEST_BANDED = 512  # tokens; blocks save nothing below


def band_block(window: int, length: int) -> int:
    """Queries of a block of `banded_sdpa_attention_forward`; 0 where the whole mask is as fast (as measured)."""
    block = max(32, window // 2)
    return block if length >= SHORTEST_BANDED and 2 * length >= 3 * (window + block) else 0


def banded_sdpa_mask(*args, local_size: int | None = None, **kwargs) -> torch.Tensor | None:
    """transformers' mask for SDPA, which notes its window: a mask of the caller's own may let through anything."""
    mask = sdpa_mask(*args, local_size=local_size, **kwargs)
    if mask is not None and not torch.compiler.is_compiling():
        mask.window = local_size
    return mask


def banded_sdpa_attention_forward(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask, **kwargs
) -> tuple[torch.Tensor, None]:
    """SDPA in blocks of queries, each of which reads only the keys in its window; the same as under the whole mask.

    query, key, value: (B, heads, S, d); returns (B, S, H, d). Where blocks save nothing, transformers' `sdpa`: on other
    devices than the CPU, for texts not well above the window, with a cache, without a mask, under torch.compile.
    """
    window = None if torch.compiler.is_compiling() else getattr(attention_mask, "window", None)
    banded = window is not None and query.device.type == "cpu" and query.shape[2] == key.shape[2]
    size = band_block(window, query.shape[2]) if banded else 0
    if not size:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # Not slices, whose gradients would each be as long as the text.
    queries, keys, values = (states.split(size, dim=2) for states in (query, key, value))
    outputs = []
    for number, block in enumerate(queries):
        start = number * size
        first = max(0, (start - window + 1) // size)
        near_keys, near_values = (torch.cat(blocks[first : number + 1], dim=2) for blocks in (keys, values))
        mask = attention_mask[:, :, start : start + size, first * size : start + size]
        outputs.append(sdpa_attention_forward(module, block, near_keys, near_values, mask, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(BANDED_SDPA, banded_sdpa_attention_forward)
AttentionMaskInterface.register(BANDED_SDPA, banded_sdpa_mask)


class LTMLatentEmbeddings(nn.Module):
    """A learned vector for each of a layer's latents, added to it. A module of its own, as `LTMGate`."""

    def __init__(self, config: LTMConfig):
        super().__init__()
        self.std = config.latent_embedding_std
        self.weight = nn.Parameter(torch.zeros(config.latents_per_layer, config.hidden_size))

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return latents + self.weight


class LTMCrossAttention(nn.Module):
    """Tokens ask, the layer's latents answer. Queries rotate at their token's position, latent keys at 0, s, 2s, …;
    neither does without `cross_attention_rotary`."""

    def __init__(self, config: LTMConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        if config.cross_attention_value_projection:
            self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
            self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)
            self.o_proj.adds_to_residual = True  # for `_init_weights`
        else:
            self.v_proj, self.o_proj = nn.Identity(), nn.Identity()
        self.q_proj.finds_latents = self.k_proj.finds_latents = True
        embedded = config.latent_embedding_std is not None
        self.latent_embeddings = LTMLatentEmbeddings(config) if embedded else nn.Identity()

    def project_latents(
        self, latents: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """(B, N, D) latents to (B, 2, K, N, d): rotated keys, then values."""
        heads, dtype = (*latents.shape[:-1], -1, self.head_dim), position_embeddings[0].dtype
        if self.config.cross_attention_keys == "embeddings":
            keys, values = self.latent_embeddings(torch.zeros_like(latents)).to(dtype), latents.to(dtype)
        else:
            keys = values = self.latent_embeddings(latents).to(dtype)
        keys = self.k_proj(keys).view(heads).transpose(1, 2)
        values = self.v_proj(values).view(heads).transpose(1, 2)
        if self.config.cross_attention_rotary:
            keys = apply_rotary(keys, tuple(table.to(keys.device) for table in position_embeddings))
        return torch.stack((keys, values), dim=1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        latent_key_values: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        queries = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        if self.config.cross_attention_rotary:
            queries = apply_rotary(queries, position_embeddings)
        keys, values = latent_key_values.to(queries.dtype).unbind(dim=1)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            queries,
            keys,
            values,
            None,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            is_causal=False,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class LTMGate(nn.Module):
    """A learned factor for each channel. A module of its own, so that offloading moves the parameter."""

    def __init__(self, hidden_size: int, start: float):
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.full((hidden_size,), float(start)))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden_states


class LTMDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: LTMConfig, layer_idx: int, reads_latents: bool):
        super().__init__()
        self.self_attn = _SELF_ATTENTIONS[config.self_attention](config, layer_idx)
        self.mlp = MistralMLP(config)
        self.input_layernorm = MistralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MistralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.reads_after_mlp = reads_latents and config.cross_attention_after_mlp
        if reads_latents:
            self.cross_attn = LTMCrossAttention(config)
            self.cross_attention_layernorm = MistralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            if config.cross_attention_gate_init is None:
                self.cross_attention_gate = nn.Identity()
            else:
                self.cross_attention_gate = LTMGate(config.hidden_size, config.cross_attention_gate_init)
        self.self_attn.o_proj.adds_to_residual = True  # for `_init_weights`

    def forward(
        self,
        hidden_states: torch.Tensor,
        latents: torch.Tensor | None,
        latent_key_values: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        latent_position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        prelude: Prelude | None = None,
        **kwargs,
    ) -> torch.Tensor:
        if prelude is None or prelude.hidden_states is None:
            with torch.no_grad() if prelude is not None and prelude.frozen else nullcontext():
                attended, _ = self.self_attn(
                    hidden_states=self.input_layernorm(hidden_states),
                    attention_mask=attention_mask,
                    position_embeddings=position_embeddings,
                    **kwargs,  # the cache among them
                )
                hidden_states = hidden_states + attended
                if self.reads_after_mlp:
                    hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
            if prelude is not None:
                prelude.hidden_states = hidden_states
        else:
            hidden_states = prelude.hidden_states

        if latents is not None:
            latent_key_values = self.cross_attn.project_latents(latents, latent_position_embeddings)
        if latent_key_values is not None:
            thought, _ = self.cross_attn(
                self.cross_attention_layernorm(hidden_states), latent_key_values, position_embeddings
            )
            hidden_states = hidden_states + self.cross_attention_gate(thought)
        if not self.reads_after_mlp:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


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
        "attentions": list(_SELF_ATTENTIONS.values()),
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
        elif isinstance(module, LTMLatentEmbeddings):
            init.normal_(module.weight, mean=0.0, std=module.std)
        elif getattr(module, "adds_to_residual", False):
            # Two attentions a layer add to the residual stream: keep its variance independent of depth. The mark is on
            # the projection: in code that is not its own, transformers passes over modules that only hold others.
            std = self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5
            init.normal_(module.weight, mean=0.0, std=std)
        elif getattr(module, "finds_latents", False) and self.config.cross_attention_query_std is not None:
            init.normal_(module.weight, mean=0.0, std=self.config.cross_attention_query_std)
        elif getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)


class LTMModel(LTMPreTrainedModel):
    """The decoder without its vocabulary projection."""

    _keys_to_ignore_on_load_unexpected = [r"^encoder\."]

    def __init__(self, config: LTMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            LTMDecoderLayer(config, index, index in config.reading_layers) for index in range(config.num_hidden_layers)
        )
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

        Generation calls this once and reads the result at every token.
        """
        check_latents(self.config, latents)
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
        prelude: Prelude | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> LTMModelOutputWithPast:
        """Hidden states (B, S, D) of tokens given latents.

        latents: (B, L, N, D), or None for a plain windowed decoder (the same as latents of zero).
        latent_key_values: (B, L, 2, K, N, d) from `project_latents`, in place of `latents`.
        cache, past_key_values: two names of one argument. It holds the latents that it is filled with, and later calls
            read these unless they give others.
        position_ids: counted over the unmasked tokens by default, so that padding on either side changes nothing.
        prelude: of these tokens under these weights; the fast loop's own, for a decoder without a cache. Without
            latents it is filled for the passes that read some.
        kwargs: of the attention function, and transformers' `output_hidden_states` and the like.

        Raises ValueError for latents of another shape, or given twice, and for some with a cache that was filled
        without; TypeError for an argument that nobody knows.
        """
        cache = the_cache(cache, past_key_values)
        paged = not isinstance(cache, Cache | None)  # of continuous batching, which has a protocol of its own
        if not paged:
            self._check_known(kwargs)
        if cache is not None and not paged and not torch.compiler.is_compiling():
            if latents is None and latent_key_values is None:
                given = kept_latents(cache)
                latents, latent_key_values = given.get("latents"), given.get("latent_key_values")
            else:
                check_filled_with_latents(cache)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of input_ids and inputs_embeds must be given.")
        # .shape, not len(): torch.export keeps the batch size symbolic.
        batch_size = (input_ids if inputs_embeds is None else inputs_embeds).shape[0]
        if latents is not None:
            if latent_key_values is not None:
                raise ValueError("Only one of latents and latent_key_values can be given.")
            check_latents(self.config, latents, batch_size)
        elif latent_key_values is not None:
            check_latent_key_values(self.config, latent_key_values, batch_size)
        prelude = None if torch.compiler.is_compiling() else prelude
        if prelude is not None and prelude.inputs is not None:
            hidden_states, shared = prelude.inputs
        else:
            hidden_states, cache, shared = self._layer_inputs(
                input_ids,
                inputs_embeds,
                attention_mask,
                position_ids,
                cache,
                use_cache,
                has_latents=latents is not None or prelude is not None,
            )
            if prelude is not None:
                prelude.inputs = hidden_states, shared
        given = latents if latent_key_values is None else latent_key_values
        reading = [] if given is None else self.config.reading_layers
        first = min(self.config.reading_layers if prelude is not None else reading, default=0)
        for index, layer in enumerate(self.layers[: self.config.num_hidden_layers]):  # fewer: early exit, a draft
            before = prelude is not None and index < first  # nothing there depends on latents
            if before and prelude.hidden_states is not None:
                continue
            read = given[:, reading.index(index)] if index in reading else None
            with torch.no_grad() if before and prelude.frozen else nullcontext():
                hidden_states = layer(
                    hidden_states,
                    read if latent_key_values is None else None,
                    None if latent_key_values is None else read,
                    use_cache=use_cache,
                    prelude=prelude if index == first else None,
                    **{"cache" if paged else CACHE: cache},
                    **shared,
                    **kwargs,
                )
        if use_cache and given is not None and cache is not None and not torch.compiler.is_compiling():
            keep_latents(cache, **{"latents" if latent_key_values is None else "latent_key_values": given})
        return LTMModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), **{CACHE: cache if use_cache else None}
        )

    def _check_known(self, kwargs) -> None:
        """Raise TypeError for arguments that nobody reads: the library may have meant them for this model."""
        if all(name in _PASSED_ON for name in kwargs):
            return
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        known = _PASSED_ON | {f"output_{name}" for name in self._can_record_outputs}
        known |= inspect.signature(attention).parameters.keys() - _GIVEN_BY_LAYERS
        for name in sorted(kwargs.keys() - known):
            raise TypeError(f"{type(self).__name__}.forward() got an unexpected keyword argument {name!r}.")

    def _layer_inputs(
        self, input_ids, inputs_embeds, attention_mask, position_ids, cache, use_cache, has_latents
    ) -> tuple[torch.Tensor, Cache | None, dict]:
        """Embeddings (B, S, D), the cache, and what all layers share: mask, positions, rotary tables."""
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

        return (
            inputs_embeds,
            cache,
            dict(
                attention_mask=mask,
                position_ids=position_ids,
                position_embeddings=self.rotary_emb(inputs_embeds, position_ids=position_ids),
                latent_position_embeddings=self.latent_position_embeddings(inputs_embeds) if has_latents else None,
            ),
        )

    @staticmethod
    def _default_position_ids(inputs_embeds, attention_mask, cache) -> torch.LongTensor:
        length = inputs_embeds.shape[1]
        seen = cache.get_seq_length() if cache is not None else 0
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]
        return (torch.arange(length, device=inputs_embeds.device) + seen)[None]


def check_latents(config: LTMConfig, latents: torch.Tensor, batch_size: int | None = None) -> None:
    """Raise a ValueError unless `latents` is (B, L, N, D) for this config (and this batch size)."""
    if not config.num_latents:
        raise ValueError("This model was built with num_latents=0 and takes no latents.")
    batch = "batch" if batch_size is None else batch_size
    if latents.shape[1:] != config.latent_shape or batch_size not in (None, latents.shape[0]):
        raise ValueError(
            f"latents must have the shape {(batch, *config.latent_shape)} (batch, layers, latents a layer, hidden), "
            f"got {tuple(latents.shape)}."
        )


def check_latent_key_values(config: LTMConfig, latent_key_values: torch.Tensor, batch_size: int) -> None:
    """Raise a ValueError unless `latent_key_values` is (B, L, 2, K, N, d); tensor parallelism decides on K."""
    if not config.num_latents:
        raise ValueError("This model was built with num_latents=0 and takes no latents.")
    shape = (batch_size, len(config.reading_layers), 2)
    if latent_key_values.ndim != 6 or latent_key_values.shape[:3] != shape:
        raise ValueError(
            f"latent_key_values must be from project_latents, of the shape {shape} (batch, layers, 2) and (key-value "
            f"heads, latents a layer, head), got {tuple(latent_key_values.shape)}."
        )


CHUNK_BYTES = 2**25  # of float32 logits, the most that the losses below hold at a time


def token_losses(
    head: nn.Module, hidden_states: torch.Tensor, targets: torch.Tensor, prelude: Prelude | None = None
) -> torch.Tensor:
    """(B, S) float32 nats, -log p of the targets (B, S) given hidden states (B, S, D); 0 where a target is -100.

    A head that is frozen, or used without a graph, gets the scored tokens alone, a chunk at a time. All tokens at once
    go to one that learns or is compiled, and to one with hooks, which may count calls or gather weights at each.
    prelude: of these targets, to keep in it which are scored; then one that learns gets these alone, too.
    """
    hooked, learns = head._forward_hooks or head._forward_pre_hooks, _learns(head)
    if (learns and prelude is None) or hooked or torch.compiler.is_compiling():
        logits = head(hidden_states)
        losses = F.cross_entropy(
            logits.float().flatten(0, 1),
            targets.to(logits.device).flatten().long(),
            ignore_index=IGNORED,
            reduction="none",
        )
        return losses.view(targets.shape)
    scored = None if prelude is None else prelude.scored
    if scored is None:
        targets = targets.to(hidden_states.device)
        places = (targets != IGNORED).nonzero(as_tuple=True)  # which waits for a GPU
        scored = places, targets[places].long()
        if prelude is not None:
            prelude.scored = scored
    places, wanted = scored
    if learns:  # with gradients of gradients
        losses = F.cross_entropy(head(hidden_states[places]).float(), wanted, reduction="none")
    else:
        losses = _FrozenHeadLosses.apply(hidden_states[places], wanted, head)
    return losses.new_zeros(targets.shape).index_put(places, losses)


def mean_loss(
    head: nn.Module,
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Scalar float32 nats: the sum of `token_losses`, divided by num_items or else by the number of scored tokens.

    A head that learns gets the scored tokens a chunk at a time, too: every token weighs the same in a mean, so that its
    gradients need not wait for the backward pass. But only a plain `nn.Linear` whose gradient is its own to compute:
    under adapters, hooks, sharding or torch.compile all tokens go to it at once.
    """
    if num_items is None:
        num_items = (targets != IGNORED).sum()
    if not (_learns(head) and _is_plain_linear(head)) or torch.compiler.is_compiling():
        total = token_losses(head, hidden_states, targets).sum()
        return total / (num_items.to(total.device) if torch.is_tensor(num_items) else num_items)
    targets = targets.to(hidden_states.device)
    num_items = torch.as_tensor(num_items, dtype=torch.float32, device=hidden_states.device)
    scored = (targets != IGNORED).nonzero(as_tuple=True)
    return _LearningHeadLoss.apply(hidden_states[scored], targets[scored].long(), head.weight, num_items)


def _learns(head: nn.Module) -> bool:
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in head.parameters())


def _is_plain_linear(head: nn.Module) -> bool:
    """Whether its output is input @ weight.T and nothing else happens, or is to be known, when it is called."""
    weight = getattr(head, "weight", None)
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    return (
        type(head) is nn.Linear
        and head.bias is None
        and type(weight) in (nn.Parameter, torch.Tensor)  # no DTensor
        and not hasattr(weight, "ds_id")  # ZeRO-3's
        and "forward" not in vars(head)  # accelerate's way to offload
        and not any(hooks)
    )


def _in_float32(*tensors: torch.Tensor) -> bool:
    same = all(tensor.dtype == torch.float32 for tensor in tensors)
    return same and not torch.is_autocast_enabled(tensors[0].device.type)


def _chunks(vocab_size: int, *tensors: torch.Tensor):
    """Rows of all tensors, (M, …) each, in even chunks whose logits take at most `CHUNK_BYTES`."""
    rows = max(1, CHUNK_BYTES // (4 * vocab_size))
    num_chunks = max(1, -(-len(tensors[0]) // rows))
    return zip(*(x.chunk(num_chunks) for x in tensors), strict=True)


def _cross_entropy_(logits: torch.Tensor, targets: torch.Tensor, out=None) -> tuple[torch.Tensor, torch.Tensor]:
    """-log p (M, 1) of targets (M, 1), and its gradient with respect to the logits (M, V), both float32.

    out: (M, V) float32 for the gradient, of logits that are float32 too.
    """
    if out is None:
        log_probabilities = logits.log_softmax(dim=-1, dtype=torch.float32)
    else:
        log_probabilities = torch.log_softmax(logits, dim=-1, out=out)
    losses = -log_probabilities.gather(1, targets)
    excess = log_probabilities.exp_()  # probability less the target's one
    return losses, excess.scatter_add_(1, targets, excess.new_full(targets.shape, -1.0))


class _FrozenHeadLosses(torch.autograd.Function):
    """-log p (M,) of targets (M,) given hidden states (M, D). Forward has the logits, and takes the gradient too."""

    @staticmethod
    def forward(ctx, hidden_states, targets, head):
        wants_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden_states) if wants_gradient else hidden_states
        losses = []
        # Buffers for all chunks where no class of the head's own has a say: new pages take a twentieth of the time.
        reuses, buffers = _is_plain_linear(head) and _in_float32(head.weight, hidden_states), None
        for states, wanted, place in _chunks(head.out_features, hidden_states, targets[:, None], gradient):
            if reuses:
                if buffers is None:
                    buffers = states.new_empty(2, len(states), head.out_features)
                logits = torch.mm(states, head.weight.T, out=buffers[0, : len(states)])
                loss, excess = _cross_entropy_(logits, wanted, out=buffers[1, : len(states)])
                if wants_gradient:
                    torch.mm(excess, head.weight, out=place)
            else:
                with torch.set_grad_enabled(wants_gradient):
                    states = states.detach().requires_grad_(wants_gradient)
                    # By the head's own forward and backward, so that it may be of any class. It gets no leaf, which
                    # torch's FlopCounterMode could not watch.
                    logits = head(states.view_as(states))
                loss, excess = _cross_entropy_(logits.detach(), wanted.to(logits.device))
                if wants_gradient:
                    place.copy_(torch.autograd.grad(logits, states, excess.to(logits.dtype))[0])
            losses.append(loss.squeeze(1).to(place.device))  # accelerate may have put the head elsewhere
            del logits, excess  # before the next chunk's
        if wants_gradient:
            ctx.save_for_backward(gradient)
        return torch.cat(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, weights):
        (gradient,) = ctx.saved_tensors
        return weights[:, None].to(gradient.dtype) * gradient, None, None


class _LearningHeadLoss(torch.autograd.Function):
    """Σ -log p / num_items of targets (M,) given hidden states (M, D) and weight (V, D). Forward takes both gradients.

    The weight's is summed in float32 or better, over chunks that under autocast are multiplied in half precision.
    """

    @staticmethod
    def forward(ctx, hidden_states, targets, weight, num_items):
        kind = hidden_states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        # Cast here once: autocast would do it for each chunk, or keep a copy that has lost its graph.
        matrix = weight.detach().to(dtype)
        state_gradient = torch.empty_like(hidden_states) if ctx.needs_input_grad[0] else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.promote_types(dtype, torch.float32))
        total = weight_gradient.new_zeros((), dtype=torch.float32)
        places = hidden_states if state_gradient is None else state_gradient
        with torch.autocast(kind, enabled=False):
            for states, wanted, place in _chunks(len(weight), hidden_states, targets[:, None], places):
                states = states.to(dtype)
                losses, excess = _cross_entropy_(F.linear(states, matrix), wanted)
                total += losses.sum()
                excess = excess.div_(num_items).to(dtype)
                if dtype == weight_gradient.dtype:
                    torch.addmm(weight_gradient, excess.T, states, out=weight_gradient)
                else:
                    weight_gradient += excess.T @ states
                if state_gradient is not None:
                    place.copy_(excess @ matrix)
                del excess  # before the next chunk's
        ctx.save_for_backward(state_gradient, weight_gradient.to(weight.dtype))
        return total / num_items

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, weight):
        state_gradient, weight_gradient = (None if x is None else weight.to(x.dtype) * x for x in ctx.saved_tensors)
        return state_gradient, None, weight_gradient, None


class LTMEncoder(nn.Module):
    """q(z|x) in one pass, as a VAE has it (`inference_method="amortized"`): an ablation, as deep as the decoder.

    A learned query for each latent, at the latent's rotary position, follows the tokens through layers of the decoder's
    kind without causal mask or window. A head turns each into mean and log-variance; it starts at zero, the prior.
    """

    def __init__(self, config: LTMConfig):
        super().__init__()
        self.config = config
        self.queries = nn.Embedding(config.num_latents, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(LTMDecoderLayer(config, index, reads_latents=False) for index in layers)
        for layer in self.layers:
            layer.self_attn.is_causal = False
        self.norm = MistralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=False)
        self.head.starts_at_zero = True  # for `_init_weights`
        self.rotary_emb = MistralRotaryEmbedding(config=config)

    def forward(self, inputs_embeds: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token embeddings (B, S, D), of which those in mask (B, S) are read, to mean and log-variance (B, L, N, D)."""
        config, batch_size = self.config, len(inputs_embeds)
        latents = torch.arange(config.num_latents, device=inputs_embeds.device)
        queries = self.queries(latents).to(inputs_embeds).expand(batch_size, -1, -1)
        states = torch.cat((inputs_embeds, queries), dim=1)
        text_positions = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
        latent_positions = latents % config.latents_per_layer * config.latent_position_stride
        positions = torch.cat((text_positions, latent_positions.expand(batch_size, -1)), dim=1)
        mask = torch.cat((mask, mask.new_ones(batch_size, config.num_latents)), dim=1)
        mask = create_bidirectional_mask(config=config, inputs_embeds=states, attention_mask=mask)
        position_embeddings = self.rotary_emb(states, position_ids=positions)
        for layer in self.layers:
            states = layer(states, None, None, attention_mask=mask, position_embeddings=position_embeddings)
        moments = self.head(self.norm(states[:, -config.num_latents :])).float()
        mean, log_variance = moments.view(batch_size, *config.latent_shape[:2], -1).chunk(2, dim=-1)
        return mean, log_variance


class LTMForCausalLM(LTMPreTrainedModel, LTMGenerationMixin):
    """A causal language model that takes one more input, `latents`, and can infer it from tokens."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    accepts_loss_kwargs = True

    # The functions of posterior_ltm, with the model as their first argument.
    infer_posterior = infer_posterior
    elbo = elbo
    sample_prior = sample_prior

    def __init__(self, config: LTMConfig):
        super().__init__(config)
        self.model = LTMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.num_latents and config.inference_method == "amortized":
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
        prelude: Prelude | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> LTMCausalLMOutputWithPast:
        """Logits (B, S, vocabulary) of the next token given latents, and the mean loss in nats a token given labels.

        latents: (B, L, N, D), or None for a plain windowed decoder (the same as latents of zero).
        latent_key_values: (B, L, 2, K, N, d) from `project_latents`, in place of `latents`.
        cache, past_key_values: two names of one argument. It holds the latents that it is filled with, and later calls
            read these unless they give others.
        labels: (B, S), shifted inside; -100 is not scored. `num_items_in_batch` divides the sum if given.
        loss_reduction: with labels, a loss and no logits, which need never exist all at once. "mean" gives the same
            loss (see `mean_loss`), "none" that of each token (B, S - 1), 0 where not scored (see `token_losses`).
        kwargs: of the loss and the attention function, and transformers' `output_hidden_states` and the like.

        Raises ValueError for latents of another shape, or given twice, and for some with a cache that was filled
        without; TypeError for an argument that nobody knows.
        """
        if loss_reduction not in (None, "mean", "none") or (loss_reduction is not None and labels is None):
            raise ValueError(
                f"loss_reduction must be None or, with labels, 'mean' or 'none'; got {loss_reduction!r}"
                f"{' without labels' if labels is None else ''}."
            )
        plain_loss = self.loss_function is ForCausalLMLoss
        names = _LOSS_ARGUMENTS if plain_loss else inspect.signature(self.loss_function).parameters
        of_loss = {name: kwargs.pop(name) for name in names if name in kwargs}
        of_loss = {name: value for name, value in of_loss.items() if value is not None}
        if loss_reduction == "none" and "shift_labels" in of_loss:
            raise ValueError("loss_reduction='none' takes labels, and shifts them itself: shift_labels do not fit.")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=the_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            latents=latents,
            latent_key_values=latent_key_values,
            use_cache=use_cache,
            prelude=prelude,
            **kwargs,
        )
        hidden_states, logits, loss = outputs.last_hidden_state, None, None
        if loss_reduction == "none":
            loss = token_losses(self.lm_head, hidden_states[:, :-1], labels[:, 1:], prelude)
        elif loss_reduction == "mean" and plain_loss and all(name == "num_items_in_batch" for name in of_loss):
            loss = mean_loss(self.lm_head, hidden_states[:, :-1], labels[:, 1:], of_loss.get("num_items_in_batch"))
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept, :])
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **of_loss)
            logits = logits if loss_reduction is None else None
        return LTMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            latents=None if latents is None else latents.detach(),
            **{CACHE: getattr(outputs, CACHE)},
        )


__all__ = ["LTMCausalLMOutputWithPast", "LTMForCausalLM", "LTMModel", "LTMModelOutputWithPast", "LTMPreTrainedModel"]
