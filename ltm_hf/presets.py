"""Configurations by name: a memory (the default), and the paper's model, as published and at a size for a CPU."""

from difflib import get_close_matches

from .configuration_ltm import LTMConfig

# The released setting of inference: AdamW from a narrow start. Noise is fresh, as in Algorithm 1; the schedule is the
# paper's text (constant), which also reaches a far better ELBO than the released cosine in 16 steps.
_PAPER = dict(latent_reader="paper", latent_gate_init=None, inference_method="adamw")

_SMALL = dict(
    vocab_size=50258,
    hidden_size=512,
    intermediate_size=1376,
    num_attention_heads=8,
    max_position_embeddings=1024,
    sliding_window=256,
)

_TINY = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    sliding_window=16,
    bos_token_id=1,
    eos_token_id=0,
)

PRESETS: dict[str, dict] = {
    "ltm-tiny": _TINY,
    "ltm-tiny-paper": dict(**_TINY, **_PAPER, num_latents=24, num_inference_steps=16),
    "ltm-small": dict(**_SMALL, **_PAPER, num_hidden_layers=3, num_latents=24, num_inference_steps=16),
    "ltm-medium": dict(**_SMALL, **_PAPER, num_hidden_layers=6, num_latents=24, num_inference_steps=16),
    "ltm-large": dict(**_SMALL, **_PAPER, num_hidden_layers=12, num_latents=96, num_inference_steps=64),
    "ltm-small-memory": dict(**_SMALL, num_hidden_layers=3),
}


def preset_config(name: str, **overrides) -> LTMConfig:
    """The configuration of a preset, with fields overridden. Raises ValueError for an unknown name or field."""
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}; there are {', '.join(PRESETS)}.")
    known = [*LTMConfig.__annotations__, "rope_theta"]  # which goes into rope_parameters
    for field in overrides:  # which transformers would keep as attributes that nothing reads
        if field not in known:
            near = get_close_matches(field, known, n=1)
            raise ValueError(f"LTMConfig has no field {field!r}{f'; did you mean {near[0]!r}?' if near else '.'}")
    return LTMConfig(**PRESETS[name] | overrides)
