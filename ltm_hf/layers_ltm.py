"""The decoder's layers, and how they read latents: by cross-attention in each (paper section 3), through a gate.

Shapes: B batch, S tokens, N latents a layer, D hidden, H attention heads, K key-value heads, d head.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralMLP,
    MistralRMSNorm,
    eager_attention_forward,
    rotate_half,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from .configuration_ltm import LTMConfig

SELF_ATTENTIONS = {"mistral": MistralAttention, "qwen2": Qwen2Attention, "qwen3": Qwen3Attention}


def apply_rotary(states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate (B, heads, positions, d) states. In cross-attention, queries and keys have positions of their own."""
    cos, sin = (table.unsqueeze(1) for table in position_embeddings)
    return states * cos + rotate_half(states) * sin


class LTMCrossAttention(nn.Module):
    """Tokens ask, the layer's latents answer. Queries rotate at their token's position, latent keys at 0, s, 2s, …"""

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
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)
        self.o_proj.adds_to_residual = True  # for `_init_weights`

    def project_latents(
        self, latents: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """(B, N, D) latents to (B, 2, K, N, d): rotated keys, then values."""
        heads, latents = (*latents.shape[:-1], -1, self.head_dim), latents.to(position_embeddings[0].dtype)
        keys = self.k_proj(latents).view(heads).transpose(1, 2)
        values = self.v_proj(latents).view(heads).transpose(1, 2)
        keys = apply_rotary(keys, tuple(table.to(keys.device) for table in position_embeddings))
        return torch.stack((keys, values), dim=1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        latent_key_values: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        queries = apply_rotary(self.q_proj(hidden_states).view(heads).transpose(1, 2), position_embeddings)
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
        self.self_attn = SELF_ATTENTIONS[config.self_attention](config, layer_idx)
        self.mlp = MistralMLP(config)
        self.input_layernorm = MistralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MistralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if reads_latents:
            self.cross_attn = LTMCrossAttention(config)
            self.cross_attention_layernorm = MistralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            gated = config.latent_gate_init is not None
            self.cross_attention_gate = LTMGate(config.hidden_size, config.latent_gate_init) if gated else nn.Identity()
        self.self_attn.o_proj.adds_to_residual = True  # for `_init_weights`

    def forward(
        self,
        hidden_states: torch.Tensor,
        latents: torch.Tensor | None = None,
        latent_key_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        latent_position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        half: str | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """half: "first", what no latent of this layer changes; "second", the rest; None, both."""
        if half != "second":
            attended, _ = self.self_attn(
                hidden_states=self.input_layernorm(hidden_states),
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                **kwargs,  # the cache among them
            )
            hidden_states = hidden_states + attended
        if half == "first":
            return hidden_states
        if latents is not None:
            latent_key_values = self.cross_attn.project_latents(latents, latent_position_embeddings)
        if latent_key_values is not None:
            thought, _ = self.cross_attn(
                self.cross_attention_layernorm(hidden_states), latent_key_values, position_embeddings
            )
            hidden_states = hidden_states + self.cross_attention_gate(thought)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


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
