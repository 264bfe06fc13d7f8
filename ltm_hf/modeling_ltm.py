"""The decoder p(x|z): a causal Transformer with a short attention window that reads latents in every layer.

Shapes: B batch, S tokens, L layers, N latents a layer, D hidden, H attention heads, K key-value heads, d head.

The building blocks are Mistral's. Differences: each layer has a cross-attention to its own latents between
self-attention and feed-forward (paper section 3), and a learned gate on that cross-attention's output.
"""

import inspect
import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
)
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
from .cache_ltm import CACHE, CacheByBothNames, check_filled_with_latents, keep_latents, kept_latents, the_cache
from .configuration_ltm import LTMConfig
from .encoder_ltm import LTMEncoder
from .generation_ltm import LTMGenerationMixin
from .layers_ltm import SELF_ATTENTIONS, LTMCrossAttention, LTMDecoderLayer, LTMGate, LTMLatentEmbeddings
from .losses_ltm import HeadPass, KnownLoss, mean_loss, token_losses
from .memory_ltm import LTMAddresses, LTMScales, MemoryReader, relive, think
from .posterior_ltm import IGNORED, Prelude, elbo, infer_posterior, sample_prior

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
        if config.num_latents and config.latent_reader == "memory":
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
        before_norm: bool = False,
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
            if before_norm:
                pass
            elif latents is None and latent_key_values is None:
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
        has_memory = hasattr(self, "reader")
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
        if has_memory and latents is not None:
            hidden_states = self.reader(hidden_states, latents)
        if use_cache and given is not None and not torch.compiler.is_compiling():
            keep_latents(cache, **{"latents" if latent_key_values is None else "latent_key_values": given})
        return LTMModelOutputWithPast(
            last_hidden_state=hidden_states if before_norm else self.norm(hidden_states),
            **{CACHE: cache if use_cache else None},
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
        latent_state: torch.FloatTensor | None = None,
        latent_noise: torch.FloatTensor | None = None,
        latent_writes: torch.BoolTensor | None = None,
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
        cache = the_cache(cache, past_key_values)
        memory = kept_latents(cache).get("memory", latent_state)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            inputs_embeds=inputs_embeds,
            latents=latents,
            latent_key_values=latent_key_values,
            use_cache=use_cache,
            prelude=prelude,
            before_norm=memory is not None,
            **kwargs,
        )
        hidden_states, logits, loss = outputs.last_hidden_state, None, None
        if memory is not None:
            hidden_states, loss = self._remember(
                hidden_states, memory, getattr(outputs, CACHE), input_ids, attention_mask, labels, latent_noise,
                latent_writes, of_loss.get("num_items_in_batch"), loss_reduction,
            )  # fmt: skip
        if loss is not None:
            pass
        elif loss_reduction == "none":
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

    @torch.compiler.disable
    def _remember(
        self, hidden_states, memory, cache, input_ids, attention_mask, labels, noise, writes, num_items, loss_reduction
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states (B, S, D) of tokens that read the memory of all before them, and the loss if one is asked for.

        The cache, if there is one, gets the memory after them.
        """
        reader, norm = self.model.reader, self.model.norm
        mask = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :].bool()
        known = F.pad(input_ids[:, 1:], (0, 1), value=IGNORED)
        if mask is not None:
            known = known.masked_fill(~(mask & F.pad(mask[:, 1:], (0, 1))), IGNORED)
        scored = known if labels is None else F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        scored = scored.masked_fill(known == IGNORED, IGNORED)
        targets = torch.where(scored == IGNORED, known, scored)
        is_scored = scored != IGNORED
        scores = None
        if loss_reduction == "mean":
            scores = is_scored / (is_scored.sum() if num_items is None else num_items)
        first_ids = input_ids[:, 0]
        if mask is not None:
            first_ids = input_ids.gather(1, mask.int().argmax(dim=1, keepdim=True)).squeeze(1)
        head_pass = HeadPass(self.lm_head)
        thought = think(
            reader, norm, head_pass, hidden_states, targets, memory, mask=mask, noise=noise, scores=scores,
            writes=None if writes is None else F.pad(writes[:, 1:], (0, 1)).bool(),
            first_ids=first_ids, keep=cache is not None,
        )  # fmt: skip
        if cache is not None:
            keep_latents(cache, memory=thought.state)
        learns = torch.is_grad_enabled()
        residual = relive(reader, hidden_states, thought, noise) if learns else thought.residual
        states = norm(residual)
        if loss_reduction == "mean" and learns and head_pass.weight_gradient is not None:
            loss = (thought.nats * scores).sum()
            gradient = thought.gradient * scores[..., None]
            return states, KnownLoss.apply(states, self.lm_head.weight, loss, gradient, head_pass.weight_gradient)
        if loss_reduction is not None and not learns:
            nats = thought.nats * is_scored
            return states, nats[:, :-1] if loss_reduction == "none" else (nats * scores).sum()
        return states, None


__all__ = ["LTMCausalLMOutputWithPast", "LTMForCausalLM", "LTMModel", "LTMModelOutputWithPast", "LTMPreTrainedModel"]
