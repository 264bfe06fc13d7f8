"""Attention within a window on a CPU: in blocks of queries, each of which reads the keys in its window alone."""

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

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
