"""Upcycling: a pretrained causal language model becomes the decoder of a Latent Thought Model.

Every weight is kept, and beside them is what reads latents. Without latents, and with latents of zero, the model
computes what the backbone computes:

- A memory that holds nothing yet reads nothing, so that the first chunk of a text is the backbone's. From the second on
  it reads what it has learned of the text, before any training too.
- The paper's cross-attentions start with an output projection of zero, so that latents change nothing, whatever they
  are. Behind that zero they get no gradient and inference returns the prior; the projection itself does get one: the
  first training step opens it, and from the second on the posterior has something to fit.

A gate of zero would stop all gradients for good, of either.
"""

import copy
import dataclasses
import os

from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..configuration_ltm import LTMConfig
from ..modeling_ltm import LTMForCausalLM

# Architectures whose decoder layer, without latents, is ours, and `LTMConfig.self_attention` of each.
FAMILIES = {"llama": "mistral", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}

# Settings under which a layer of these families has weights or arithmetic that ours has not.
_UNKNOWN_OPTIONS = ("attention_bias", "mlp_bias", "quantization_config")

# What the backbone computes, which no override may change, and what it merely brings along.
_KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters", "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip
_BROUGHT = ("initializer_range", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id")

# The modules that the backbone does not have: a memory's reader, what layers read with, and an encoder.
_NEW_MODULES = ("model.reader.", ".cross_attn.", ".cross_attention_layernorm.", ".cross_attention_gate.", "encoder.")


def _is_new(name: str) -> bool:
    return any(module in name for module in _NEW_MODULES)


def _own_window(config: PreTrainedConfig) -> int | None:
    """The attention window that all layers of the backbone have, None for full attention."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(kinds) > 1 or kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"This backbone's layer_types are {', '.join(sorted(kinds))}: its layers must all have full attention, or "
            "all the same sliding window."
        )
    return None if kinds == {"full_attention"} else getattr(config, "sliding_window", None)


def convert_config(
    config: PreTrainedConfig, num_latents: int, sliding_window: int | None = None, **config_overrides
) -> LTMConfig:
    """The configuration of `from_pretrained_backbone`'s model, given the backbone's."""
    if config.model_type not in FAMILIES:
        raise ValueError(f"A {config.model_type!r} model cannot be a backbone; supported are {', '.join(FAMILIES)}.")
    for option in _UNKNOWN_OPTIONS:
        if value := getattr(config, option, None):
            raise ValueError(f"A backbone with {option}={value!r} is not supported.")

    own_window = _own_window(config)
    if sliding_window is None:
        sliding_window = own_window
    elif own_window is not None and sliding_window > own_window:
        raise ValueError(f"sliding_window ({sliding_window}) must not be wider than the backbone's ({own_window}).")

    changeable = {field.name for field in dataclasses.fields(LTMConfig)} - {*_KEPT, "self_attention"}
    if refused := sorted(set(config_overrides) - changeable):
        raise ValueError(
            f"{', '.join(refused)}: the backbone's own, or no field of LTMConfig; it cannot be overridden."
        )
    if config_overrides.get("latent_gate_init", 1) == 0:
        raise ValueError("latent_gate_init must not be 0: such a gate gets no gradient here, and never opens.")

    # `head_dim` is no field of every family: None derives it from the hidden size, as they do.
    inherited = {name: getattr(config, name, None) for name in (*_KEPT, *_BROUGHT)}
    inherited |= dict(num_latents=num_latents, sliding_window=sliding_window)
    return LTMConfig(self_attention=FAMILIES[config.model_type], **inherited | config_overrides)


def from_pretrained_backbone(
    name_or_path_or_model: str | os.PathLike | PreTrainedModel,
    num_latents: int,
    sliding_window: int | None = None,
    freeze_backbone: bool = False,
    **config_overrides,
) -> LTMForCausalLM:
    """A causal LM of another architecture, with every weight kept, as an LTM that has yet to learn to use its latents.

    Without latents it computes what the backbone computes; what it does with some is told above, in this file.

    name_or_path_or_model: a Hub name or a folder (weights in safetensors, in the dtype that they are stored in), or a
        model, whose weights are copied and whose dtype and device are kept. Llama, Mistral, Qwen2 and Qwen3 shapes.
    num_latents: in total; for `latent_reader="paper"` a multiple of the layers that read. 0 gives the backbone itself,
        for a baseline.
    sliding_window: None keeps the backbone's attention; a number of tokens narrows it, and the logits are then the
        backbone's for texts no longer than that.
    freeze_backbone: only the new parameters require gradients (see `freeze_all_but_new`).
    config_overrides: fields of `LTMConfig` that are not the backbone's shape: `latent_reader="paper"` (default: a
        memory), `num_inference_steps=…`, …. With "paper", a small `latent_gate_init` wakes the latents late, but keeps
        their noise out of a decoder that trains along; a frozen one has less to fear from None. Its
        `latent_position_stride` is by default that of the backbone's `max_position_embeddings`, however short the
        texts to come.

    Token ids and generation settings are the backbone's; its tokenizer is used as it is. The new weights are drawn
    from torch's global generator. transformers reports them as missing, since they are.
    Raises ValueError for an architecture or option that is not supported, and for tensors that are missing, misshapen
    or left over, by name.
    """
    given = name_or_path_or_model
    if isinstance(given, PreTrainedModel):
        config = given.config
    elif isinstance(given, (str, os.PathLike)):
        config = AutoConfig.from_pretrained(given, trust_remote_code=False)
    else:
        raise ValueError(f"The backbone must be a name, a folder or a PreTrainedModel, got a {type(given).__name__}.")
    ltm_config = convert_config(config, num_latents, sliding_window, **config_overrides)
    if freeze_backbone and not num_latents:
        raise ValueError("freeze_backbone with num_latents=0 would leave nothing to train.")

    model, loading = LTMForCausalLM.from_pretrained(
        **_weights_of(given), config=ltm_config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    _check_loaded(loading)
    for number in model.config.reading_layers:
        nn.init.zeros_(model.model.layers[number].cross_attn.o_proj.weight)
    if isinstance(given, PreTrainedModel):
        model = model.to(given.device)
        if getattr(given, "generation_config", None) is not None:
            model.generation_config = copy.deepcopy(given.generation_config)
            model._set_inference_defaults()
    if freeze_backbone:
        freeze_all_but_new(model)
    return model


def _weights_of(given) -> dict:
    """Where `from_pretrained` finds them."""
    if not isinstance(given, PreTrainedModel):
        return dict(pretrained_model_name_or_path=given, use_safetensors=True)
    if on_meta := [name for name, tensor in given.state_dict().items() if tensor.is_meta]:
        raise ValueError(f"The backbone's weights are not in memory (offloaded?): {', '.join(on_meta)}.")
    # Copies: transformers puts the tensors themselves into the new model.
    weights = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    return dict(pretrained_model_name_or_path=None, state_dict=weights, dtype=given.dtype)


def _check_loaded(loading: dict) -> None:
    problems = {
        "lacks tensors": [name for name in loading["missing_keys"] if not _is_new(name)],
        "has tensors without a place in the model": loading["unexpected_keys"],
        "has tensors of another shape than its configuration says": [name for name, *_ in loading["mismatched_keys"]],
    }
    for problem, names in problems.items():
        if names:
            raise ValueError(f"The backbone {problem}: {', '.join(sorted(names))}.")


def freeze_all_but_new(model: LTMForCausalLM) -> None:
    """Let only what the backbone does not have train: what reads the latents, and an encoder, if there is one.

    A checkpoint does not hold what was frozen: call this again after reloading one.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_new(name))
