"""Configuration of a Latent Thought Model. Travels to the Hub with every checkpoint."""

import math
import operator
from dataclasses import dataclass, fields
from numbers import Real
from typing import TYPE_CHECKING, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

if TYPE_CHECKING:
    # transformers tells two folders' code apart by this file and those it names: this line makes them all count.
    from .modeling_ltm import LTMForCausalLM  # noqa: F401

SELF_ATTENTIONS = ("mistral", "qwen2", "qwen3")
READERS = {  # and what each is, for cards
    "memory": "a memory after the last layer, which holds a posterior given the text so far",
    "paper": "cross-attention in the decoder's layers",
}
# Fields that are derived anew where these change. (A stride is kept with more positions: weights have learned by it.)
_FOLLOWS = {
    "head_dim": {"hidden_size", "num_attention_heads"},
    "num_key_value_heads": {"num_attention_heads"},
    "latent_chunk": {"sliding_window"},
    "latent_position_stride": {"num_latents"},
    "inference_kl_weight": {"latent_reader"},
}
# What settings of inference must be with a memory, whose steps are in closed form.
_OF_MEMORY = {
    "inference_method": "natural",
    "inference_learning_rate": None,
    "inference_lr_schedule": None,
    "inference_noise": "fresh",
    "inference_tolerance": None,
}
# Numbers of any size that cannot work, and what they must be.
_RANGES = (
    ("initializer_range", lambda x: x >= 0, "0 or more and finite"),
    ("rms_norm_eps", lambda x: x > 0, "positive and finite"),
    ("attention_dropout", lambda x: 0 <= x < 1, "at least 0 and below 1"),
)


def whole_number(name: str, value, least: int | None = None) -> int:
    """`value` as an int: numpy's integers are numbers too, True and 2.0 are not. Raises ValueError, naming it."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or (least is not None and number < least):
        raise ValueError(f"{name} must be an integer{'' if least is None else f' of {least} or more'}, got {value!r}.")
    return number


def positive_number(name: str, value) -> float:
    """`value` as a float. Raises ValueError, naming it, unless it is a number above 0 and finite."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}.")
    return float(value)


@dataclass(frozen=True)
class InferenceSettings:
    """How the fast loop runs. Each field is a field of `LTMConfig`, described there.

    Raises ValueError, naming the setting, for a value that cannot work.
    """

    inference_method: str
    num_inference_steps: int
    inference_learning_rate: float | None
    inference_lr_schedule: str | None
    inference_noise: str
    inference_kl_weight: float
    inference_tolerance: float | None

    CHOICES: ClassVar[dict[str, tuple[str | None, ...]]] = {
        "inference_method": ("natural", "adamw", "lbfgs", "langevin", "amortized"),
        "inference_lr_schedule": (None, "constant", "cosine", "inverse"),
        "inference_noise": ("fresh", "fixed"),
    }

    @classmethod
    def of(cls, config, **overrides) -> "InferenceSettings":
        """The settings of `config` (anything with these attributes), with the overrides that are not None.

        A step size and its schedule are of a method: a call that asks for another takes that one's own. A memory infers
        in closed form, as it has learned to: a call can ask for other steps, and ValueError names all else.
        """
        overrides = {name: value for name, value in overrides.items() if value is not None}
        if getattr(config, "has_memory", False):
            for name, value in overrides.items():
                if name != "num_inference_steps" and value != getattr(config, name):
                    raise ValueError(f"{name} is not a memory's to choose at each call: it infers in closed form.")
        settings = {field.name: getattr(config, field.name) for field in fields(cls)}
        if overrides.get("inference_method", config.inference_method) != config.inference_method:
            settings |= {"inference_learning_rate": None, "inference_lr_schedule": None}
        return cls(**settings | overrides)

    def __post_init__(self):
        tolerance = self.inference_tolerance
        if tolerance is not None and not (isinstance(tolerance, Real) and math.isfinite(tolerance)):
            raise ValueError(f"inference_tolerance must be None or finite, got {tolerance!r}.")
        # Numbers of numpy become Python's.
        steps = whole_number("num_inference_steps", self.num_inference_steps, least=0)
        object.__setattr__(self, "num_inference_steps", steps)
        for name in ("inference_learning_rate", "inference_kl_weight"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, positive_number(name, getattr(self, name)))
        for name, allowed in self.CHOICES.items():
            if getattr(self, name) not in allowed:
                names = ", ".join(map(str, allowed))
                raise ValueError(f"{name} must be one of {names}; got {getattr(self, name)!r}.")


@strict
class LTMConfig(PreTrainedConfig):
    r"""Everything that defines a Latent Thought Model and how it thinks by default.

    Decoder (paper section 3, "Decoder"):
        vocab_size: entries of the vocabulary.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim,
        hidden_act, rms_norm_eps, initializer_range, attention_dropout, rope_parameters, tie_word_embeddings:
            as in Llama and Mistral. `num_key_value_heads=None` means one for each attention head.
        max_position_embeddings: tokens of a sequence (the paper's 1,024).
        sliding_window: tokens a token can attend to, itself included (the paper's 256); `None` is full attention.
        self_attention: whose self-attention the layers have: "mistral" (also Llama's; the paper's), "qwen2" (biases on
            queries, keys and values) or "qwen3" (a norm on each head's queries and keys).

    Latents:
        num_latents: vectors of width `hidden_size` in all (the paper's N_z). 0 builds the autoregressive twin, which
            reads none.
        latent_reader: how they are read. "memory": after the last layer, by learned addresses; they hold a posterior
            given the text so far, which each token updates (memory_ltm.py). "paper": in each layer, by cross-attention
            between self-attention and MLP; each layer that reads has `latents_per_layer` of its own.
        latent_gate_init: start of a learned gate for each channel of what is read; None, with "paper" alone, is none,
            as published.
      Of "memory" alone:
        latent_chunk: tokens that read the same posterior, before what they add to it is in it; at most the window.
            Default: 8, or the window where it is shorter.
      Of "paper" alone:
        latent_layers: the layers that read, counted from 0, or from -1 back; `None` is all, as published. Those before
            the first are computed once for all steps of inference.
        latent_position_stride: distance between the rotary positions of a layer's latents; default
            `max_position_embeddings // num_latents`, as published.

    Inference. Defaults of `infer_posterior` and `generate`; each call can override them:
        inference_method: "natural" (natural gradient from the prior; the memory's, there in closed form), "adamw" (the
            paper's, Algorithm 1), "lbfgs" (to the mode, without noise: the best bound in two to four steps, of a
            decoder that has learned with another), or one of the paper's ablations (section 5): "langevin" makes of z a
            sample by Langevin dynamics from the prior, a point, which has no finite bound; "amortized" builds an
            encoder into the model, trained with the decoder as a VAE: no steps.
        num_inference_steps: gradient steps on the ELBO (T_fast), or of the chain; 0 leaves the posterior at its start.
            Of a memory, passes over a prompt: 1 reads it once, and 0 reads it without a memory.
        inference_learning_rate: step size. Default: 0.5 for "natural" (ρ) and "lbfgs" (its first step), 0.3 for "adamw"
            (η_fast), 0.1 for "langevin" (s).
        inference_lr_schedule: "constant"; "cosine" (to a tenth); "inverse" (ρ / (1 + ρ t)). Default: "inverse" for
            "natural", else "constant".
        inference_noise: "fresh" draws new noise each step (Algorithm 1); "fixed" one for the loop (released code).
        inference_kl_weight: κ, weight of the KL in what inference maximises; 1 is the ELBO. Below, the posterior is a
            cold one (Wenzel et al. 2020). Default: 0.01 for "memory", 1 for "paper".
        inference_tolerance: stop a sequence's steps when its ELBO gains less than this in 4 steps over the 4 before, in
            nats a token; None runs them all.

    Raises ValueError for values that do not fit together. Wrong types raise at construction and on assignment.
    """

    model_type = "ltm"
    attention_bias = False  # Qwen3Attention reads it
    keys_to_ignore_at_inference = ["cache", "past_key_values", "latents"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.cross_attn.q_proj": "colwise",
        "layers.*.cross_attn.k_proj": "colwise",
        "layers.*.cross_attn.v_proj": "colwise",
        "layers.*.cross_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50258
    hidden_size: int = 512
    intermediate_size: int = 1376
    num_hidden_layers: int = 3
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 1024
    initializer_range: float | int = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 50257
    eos_token_id: int | list[int] | None = 50256
    tie_word_embeddings: bool = True
    rope_parameters: dict | None = None
    sliding_window: int | None = 256
    self_attention: str = "mistral"
    attention_dropout: float | int = 0.0

    num_latents: int = 64
    latent_reader: str = "memory"
    latent_gate_init: float | int | None = 0.2
    latent_chunk: int | None = None
    latent_layers: list[int] | None = None
    latent_position_stride: int | None = None

    inference_method: str = "natural"
    num_inference_steps: int = 1
    inference_learning_rate: float | int | None = None
    inference_lr_schedule: str | None = None
    inference_noise: str = "fresh"
    inference_kl_weight: float | int | None = None
    inference_tolerance: float | int | None = None

    def __post_init__(self, **kwargs):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "max_position_embeddings", "latent_position_stride"):  # fmt: skip
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} must be 1 or more, got {number}.")
        for name, fits, words in _RANGES:
            number = getattr(self, name)
            if not (math.isfinite(number) and fits(number)):
                raise ValueError(f"{name} must be {words}, got {number}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be one of {', '.join(ACT2FN)}; got {self.hidden_act!r}.")
        for name, value in self._derived().items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self._check_attention()
        self._check_latents()
        InferenceSettings.of(self)  # raises where a setting cannot work
        # Rules for modules that this model lacks would be warned of at each parallel load.
        lacking = [] if self.reading_layers else [".cross_attn."]
        lacking += [] if self.self_attention == "qwen3" else [".q_norm", ".k_norm"]
        self.base_model_tp_plan = {
            name: rule for name, rule in self.base_model_tp_plan.items() if not any(part in name for part in lacking)
        }
        layer_types = kwargs.pop("layer_types", None)
        if layer_types not in (None, self.layer_types):
            raise ValueError(f"layer_types follow from sliding_window, {self.layer_types} here; got {layer_types}.")
        # Saving a model maps only the saved class; a checkpoint should load through all three Auto classes.
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_ltm.LTMConfig",
                "AutoModel": "decoder_ltm.LTMModel",
                "AutoModelForCausalLM": "modeling_ltm.LTMForCausalLM",
            },
        )
        super().__post_init__(**kwargs)
        theta, kind = (self.rope_parameters.get(name) for name in ("rope_theta", "rope_type"))
        if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
            known = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
            raise ValueError(f"rope_type must be one of {known}; got {kind!r}.")
        positive_number("rope_theta", theta)

    def _check_attention(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})."
            )
        if self.head_dim is None:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of "
                f"num_attention_heads ({self.num_attention_heads}), or head_dim must be given."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}.")
        if self.sliding_window is not None and self.sliding_window < 2:  # transformers' cache cannot hold a window of 1
            raise ValueError(
                f"sliding_window must be 2 or more, or None for full attention, got {self.sliding_window}."
            )
        if self.self_attention not in SELF_ATTENTIONS:
            raise ValueError(
                f"self_attention must be one of {', '.join(SELF_ATTENTIONS)}; got {self.self_attention!r}."
            )

    def _check_latents(self):
        if self.latent_reader not in READERS:
            raise ValueError(f"latent_reader must be one of {', '.join(READERS)}; got {self.latent_reader!r}.")
        if self.latent_reader == "memory":
            self._check_memory()
        if self.latent_layers is not None:
            depth, named = self.num_hidden_layers, self.latent_layers
            layers = sorted({layer % depth for layer in named})
            if not layers or len(layers) < len(named) or not all(-depth <= layer < depth for layer in named):
                raise ValueError(
                    f"latent_layers must be None or different layers of the {depth} (0 to {depth - 1}), got {named}."
                )
            self.latent_layers = layers
        if self.num_latents < 0 or self.num_latents % self._owners:
            counted = "num_hidden_layers" if self.latent_layers is None else "the latent_layers"
            raise ValueError(
                f"num_latents ({self.num_latents}) must be 0 or a multiple of {counted} ({self._owners}): it counts "
                "the latents of all layers together."
            )

    def _check_memory(self):
        if self.latent_layers is not None:
            raise ValueError("latent_layers is for latent_reader='paper': a memory is read after the last layer.")
        for name, fixed in _OF_MEMORY.items():
            if getattr(self, name) != fixed:
                raise ValueError(
                    f"latent_reader='memory' infers in closed form, with {name}={fixed!r}; got {getattr(self, name)!r}."
                )
        if self.latent_gate_init is None:
            raise ValueError("latent_gate_init must be a number for latent_reader='memory', which is read by a gate.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"latent_reader='memory' needs a hidden_size ({self.hidden_size}) that is a multiple of "
                f"num_attention_heads ({self.num_attention_heads})."
            )
        if self.latent_chunk < 1 or (self.sliding_window is not None and self.latent_chunk > self.sliding_window):
            raise ValueError(
                f"latent_chunk must be at least 1 and at most sliding_window ({self.sliding_window}), since tokens of "
                f"a chunk read each other by attention alone; got {self.latent_chunk}."
            )

    @property
    def _owners(self) -> int:
        """How many layers share the latents out."""
        return 1 if self.latent_reader == "memory" else len(self.latent_layers or range(self.num_hidden_layers))

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers, which would load a checkpoint of another architecture with no more than a warning, and
        set overrides on a configuration that is made already: here all is checked, and derived anew, with them."""
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(f"This is the checkpoint of a {config_dict['model_type']!r} model, not of an LTM.")
        names = {field.name for field in fields(cls)} | {"layer_types"}
        overrides = {name: kwargs.pop(name) for name in names & kwargs.keys()}
        for name, sources in _FOLLOWS.items():
            derived = overrides and config_dict.get(name) == cls(**config_dict)._derived().get(name)
            if derived and overrides.keys() & sources:
                config_dict = {other: value for other, value in config_dict.items() if other != name}
        return super().from_dict(config_dict | overrides, **kwargs)

    def _derived(self) -> dict[str, int]:
        """What fields are that nobody sets."""
        derived = {"num_key_value_heads": self.num_attention_heads}
        derived["latent_chunk"] = min(8, self.sliding_window or 8)
        derived["inference_kl_weight"] = 0.01 if self.latent_reader == "memory" else 1.0
        if self.hidden_size % self.num_attention_heads == 0:
            derived["head_dim"] = self.hidden_size // self.num_attention_heads
        if self.num_latents and self.latent_reader == "paper":
            derived["latent_position_stride"] = max(1, self.max_position_embeddings // self.num_latents)
        return derived

    @property
    def layer_types(self) -> list[str]:
        """What transformers' masks and caches go by: as `sliding_window` is now."""
        kind = "full_attention" if self.sliding_window is None else "sliding_attention"
        return [kind] * self.num_hidden_layers

    @property
    def reading_layers(self) -> list[int]:
        """The layers with a cross-attention to latents, of the first ones alone in an early exit."""
        if self.latent_reader == "memory" or not self.num_latents:
            return []
        layers = self.latent_layers or range(self.num_hidden_layers)
        return [layer for layer in layers if layer < self.num_hidden_layers]

    @property
    def has_memory(self) -> bool:
        return self.latent_reader == "memory" and self.num_latents > 0

    @property
    def has_encoder(self) -> bool:
        return self.inference_method == "amortized" and self.num_latents > 0

    @property
    def latents_per_layer(self) -> int:
        """Of a layer that reads latents."""
        return self.num_latents // self._owners

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(layers that read latents, latents a layer, hidden): the shape of one sequence's latents."""
        return (1 if self.has_memory else len(self.reading_layers), self.latents_per_layer, self.hidden_size)


__all__ = ["InferenceSettings", "LTMConfig"]
