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
_STEP_SIZES = {"variational": 0.5, "langevin": 0.1, "amortized": 0.5}  # where none is given
# Fields that are derived anew where these change. (A stride is kept with more positions: weights have learned by it.)
_FOLLOWS = {
    "head_dim": {"hidden_size", "num_attention_heads"},
    "num_key_value_heads": {"num_attention_heads"},
    "latent_position_stride": {"num_latents"},
}
# Numbers of any size that cannot work, and what they must be.
_RANGES = (
    ("initializer_range", lambda x: x >= 0, "0 or more and finite"),
    ("rms_norm_eps", lambda x: x > 0, "positive and finite"),
    ("attention_dropout", lambda x: 0 <= x < 1, "at least 0 and below 1"),
    ("initial_mean_std", lambda x: x >= 0, "0 or more and finite"),
    ("initial_log_variance", lambda x: True, "finite"),
    ("initial_log_variance_std", lambda x: x >= 0, "0 or more and finite"),
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


def _is_finite(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class InferenceSettings:
    """How the fast loop runs. Each field is a field of `LTMConfig`, described there.

    Raises ValueError, naming the setting, for a value that cannot work.
    """

    inference_method: str
    num_inference_steps: int
    inference_optimizer: str
    inference_learning_rate: float
    inference_lr_schedule: str
    inference_weight_decay: float
    inference_precision: str
    inference_noise: str
    inference_tolerance: float | None

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "inference_method": tuple(_STEP_SIZES),
        "inference_optimizer": ("natural", "lbfgs", "map", "adamw"),
        "inference_lr_schedule": ("constant", "cosine", "inverse"),
        "inference_precision": ("stein", "unit"),
        "inference_noise": ("fresh", "fixed"),
    }

    @classmethod
    def of(cls, config, **overrides) -> "InferenceSettings":
        """The settings of `config` (anything with these attributes), with the overrides that are not None.

        A step size is of a fit or of a chain: a call that asks for the other than the config's takes its default.
        """
        settings = {field.name: getattr(config, field.name) for field in fields(cls)}
        settings |= {name: value for name, value in overrides.items() if value is not None}
        method = settings["inference_method"]
        if (method == "langevin") != (config.inference_method == "langevin"):
            settings["inference_learning_rate"] = overrides.get("inference_learning_rate")
        if settings["inference_learning_rate"] is None:
            settings["inference_learning_rate"] = _STEP_SIZES.get(method, 0.5)
        return cls(**settings)

    def __post_init__(self):
        steps = whole_number("num_inference_steps", self.num_inference_steps, least=0)
        rate, decay, tolerance = self.inference_learning_rate, self.inference_weight_decay, self.inference_tolerance
        if not (_is_finite(rate) and rate > 0):
            raise ValueError(f"inference_learning_rate must be positive and finite, got {rate!r}.")
        if not (_is_finite(decay) and decay >= 0):
            raise ValueError(f"inference_weight_decay must be 0 or more and finite, got {decay!r}.")
        if tolerance is not None and not _is_finite(tolerance):
            raise ValueError(f"inference_tolerance must be None or finite, got {tolerance!r}.")
        object.__setattr__(self, "num_inference_steps", steps)  # numbers of numpy become Python's
        object.__setattr__(self, "inference_learning_rate", float(rate))
        for name, allowed in self.CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}.")


@strict
class LTMConfig(PreTrainedConfig):
    r"""Everything that defines a Latent Thought Model and how it thinks by default.

    Decoder (paper section 3, "Decoder"):
        vocab_size: entries of the vocabulary; the paper's is GPT-2's 50,257 and a begin-of-text token.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim,
        hidden_act, rms_norm_eps, initializer_range, attention_dropout, rope_parameters, tie_word_embeddings:
            as in Llama and Mistral. `num_key_value_heads=None` means one for each attention head.
        max_position_embeddings: tokens of a sequence (the paper's 1,024).
        sliding_window: tokens a token can attend to, itself included; `None` is full attention.
        self_attention: whose self-attention the layers have: "mistral" (also Llama's; the paper's), "qwen2" (biases on
            queries, keys and values) or "qwen3" (a norm on each head's queries and keys).

    Latents:
        num_latents: the TOTAL number of latent vectors (the paper's N_z), a multiple of the layers that read them; each
            owns `latents_per_layer`, of width `hidden_size`. 0 builds the autoregressive baseline without
            cross-attention.
        cross_attention_layers: the layers that read latents, counted from 0, or from -1 back; `None` is all, as in the
            paper. The others have no cross-attention, and those before the first are computed once for all steps.
        latent_position_stride: distance between the rotary positions of a layer's latents; default
            `max_position_embeddings // num_latents`, as in the paper.
        latent_embedding_std: standard deviation, at first, of a learned vector for each latent, added to it where it is
            read; `None` is the paper's layer, which has none. Without them the latents of a layer are all the same to a
            decoder that reads z = 0, and the first gradient there moves them alike.
        cross_attention_rotary: queries and latent keys rotate, as in the paper. Without, which latents a token reads
            depends on what it says and not on where it stands.
        cross_attention_keys: what latents are found by: "latents", keys are projections of what is in them, as in the
            paper, or "embeddings", of their embeddings alone. Then inference changes what a token reads and never where
            it looks, and reading z = 0 is the same as having no latents.
        cross_attention_query_std: standard deviation, at first, of the projections to queries and latent keys; `None`
            is `initializer_range`, with which a token reads all latents of a layer alike at first.
        cross_attention_value_projection: latents pass through a projection on their way into the heads and another on
            their way out, as in the paper. Without, the residual stream gets what is read of the latents as they are,
            times the gate: a layer of few parameters. Each head then needs keys of its own, and all heads together must
            be as wide as `hidden_size`.
        cross_attention_after_mlp: a layer that reads latents does so after its MLP, and not between its self-attention
            and it, as in the paper. In the last layer, what inference computes anew at each step is then little more
            than the vocabulary's projection.
        cross_attention_gate_init: start value of a learned gate for each channel of the cross-attention's output;
            `None` is the paper's layer, which has no gate.

    Inference (paper Algorithm 1, fast loop). Defaults of `infer_posterior` and `generate`; each call can override them:
        inference_method: "variational" (the paper's), or one of its ablations (section 5). "langevin" makes of z a
            sample by Langevin dynamics from the prior: a point, which has no finite bound. "amortized" builds an
            encoder into the model, trained with the decoder as a VAE: no steps, and no other setting matters.
        num_inference_steps: gradient steps on the ELBO (T_fast), or of the chain; 0 leaves the posterior at its start.
        inference_learning_rate: step size: ρ for "natural" and "map", the first step's for "lbfgs", η_fast for "adamw",
            all 0.5 by default; s for "langevin", 0.1, which stays the same. A chain has forgotten its start when s·T is
            well above 1.
      Of "variational" alone:
        inference_optimizer: "natural" (natural gradient from the prior), "lbfgs" (to the mode, without noise: the
            best bound in two to four steps, of a decoder that has learned with another), "map" (plain steps of the mean
            alone: for a decoder that has learned with `slow_gradient="unrolled"`) or "adamw" (the paper).
        inference_lr_schedule: "constant"; "cosine" (to a tenth); "inverse" (ρ / (1 + ρ t)).
        inference_weight_decay: of "adamw" on mean and log-variance.
        inference_precision: "stein" updates the precision of "natural" by the Stein estimate; "unit" holds it at 1.
        inference_noise: "fresh" draws new noise each step (Algorithm 1); "fixed" one for the loop (released code).
        inference_tolerance: stop a sequence's steps when its ELBO gains less than this in 4 steps over the 4 before, in
            nats a token; None runs them all.
        initial_mean_std, initial_log_variance, initial_log_variance_std: where "adamw" starts.

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

    num_latents: int = 24
    latent_position_stride: int | None = None
    latent_embedding_std: float | int | None = None
    cross_attention_layers: list[int] | None = None
    cross_attention_rotary: bool = True
    cross_attention_keys: str = "latents"
    cross_attention_query_std: float | int | None = None
    cross_attention_value_projection: bool = True
    cross_attention_after_mlp: bool = False
    cross_attention_gate_init: float | int | None = 0.1

    inference_method: str = "variational"
    num_inference_steps: int = 2
    inference_optimizer: str = "natural"
    inference_learning_rate: float | int | None = None
    inference_lr_schedule: str = "inverse"
    inference_weight_decay: float | int = 0.01
    inference_precision: str = "stein"
    inference_noise: str = "fresh"
    inference_tolerance: float | int | None = None
    initial_mean_std: float | int = 0.01
    initial_log_variance: float | int = -5.0
    initial_log_variance_std: float | int = 0.1

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
        if self.cross_attention_layers is not None:
            depth, named = self.num_hidden_layers, self.cross_attention_layers
            layers = sorted({layer % depth for layer in named})
            if not layers or len(layers) < len(named) or not all(-depth <= layer < depth for layer in named):
                raise ValueError(
                    f"cross_attention_layers must be None or different layers of the {depth} (0 to {depth - 1}), "
                    f"got {named}."
                )
            self.cross_attention_layers = layers
        owners = len(self.cross_attention_layers or range(self.num_hidden_layers))
        if self.num_latents < 0 or self.num_latents % owners:
            counted = "num_hidden_layers" if self.cross_attention_layers is None else "the cross_attention_layers"
            raise ValueError(
                f"num_latents ({self.num_latents}) must be 0 or a multiple of {counted} ({owners}): it counts the "
                "latents of all layers together."
            )
        for name in ("latent_embedding_std", "cross_attention_query_std"):
            std = getattr(self, name)
            if std is not None and not 0 <= std < math.inf:
                raise ValueError(f"{name} must be None, or 0 or more and finite, got {std}.")
        if self.cross_attention_keys not in ("latents", "embeddings"):
            raise ValueError(f"cross_attention_keys must be latents or embeddings, got {self.cross_attention_keys!r}.")
        if self.cross_attention_keys == "embeddings" and self.latent_embedding_std is None:
            raise ValueError("cross_attention_keys='embeddings' needs a latent_embedding_std: there are none.")
        if not self.cross_attention_value_projection and not (
            self.num_key_value_heads == self.num_attention_heads == self.hidden_size / self.head_dim
        ):
            raise ValueError(
                "cross_attention_value_projection=False needs num_key_value_heads = num_attention_heads, and "
                f"num_attention_heads · head_dim = hidden_size, got {self.num_key_value_heads}, "
                f"{self.num_attention_heads}, {self.head_dim} and {self.hidden_size}."
            )
        InferenceSettings.of(self)  # raises where a setting cannot work
        # Rules for modules that this model lacks would be warned of at each parallel load.
        # Without projections of values, cross-attention is not split.
        lacking = [] if self.num_latents and self.cross_attention_value_projection else [".cross_attn."]
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
                "AutoModel": "modeling_ltm.LTMModel",
                "AutoModelForCausalLM": "modeling_ltm.LTMForCausalLM",
            },
        )
        super().__post_init__(**kwargs)
        theta, kind = (self.rope_parameters.get(name) for name in ("rope_theta", "rope_type"))
        if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
            known = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
            raise ValueError(f"rope_type must be one of {known}; got {kind!r}.")
        if not (_is_finite(theta) and theta > 0):
            raise ValueError(f"rope_theta must be positive and finite, got {theta!r}.")

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
        if self.hidden_size % self.num_attention_heads == 0:
            derived["head_dim"] = self.hidden_size // self.num_attention_heads
        if self.num_latents:
            derived["latent_position_stride"] = max(1, self.max_position_embeddings // self.num_latents)
        return derived

    @property
    def layer_types(self) -> list[str]:
        """What transformers' masks and caches go by: as `sliding_window` is now."""
        kind = "full_attention" if self.sliding_window is None else "sliding_attention"
        return [kind] * self.num_hidden_layers

    @property
    def reading_layers(self) -> list[int]:
        """The layers that read latents; none without latents, and of the first alone in an early exit."""
        layers = self.cross_attention_layers or range(self.num_hidden_layers)
        return [layer for layer in layers if layer < self.num_hidden_layers] if self.num_latents else []

    @property
    def latents_per_layer(self) -> int:
        """Of a layer that reads latents."""
        return self.num_latents // len(self.cross_attention_layers or range(self.num_hidden_layers))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(layers that read latents, latents a layer, hidden): the shape of one sequence's latents."""
        return (len(self.reading_layers), self.latents_per_layer, self.hidden_size)


__all__ = ["InferenceSettings", "LTMConfig"]
