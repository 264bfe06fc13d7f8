"""What of a text latents may be inferred from."""

import torch
from torch.nn import functional as F

from ..likelihood_ltm import Text

INFER_FROM = ("labels", "text", "prompt")


def evidence_of(text: Text, infer_from: str) -> Text:
    """What latents are fitted to: what is scored ("labels"), all tokens ("text"), or what comes before ("prompt")."""
    if infer_from == "labels":
        return text
    return prompts_of(text) if infer_from == "prompt" else Text.unchecked(text.input_ids, text.mask)


def prompts_of(text: Text) -> Text:
    """What comes before the first scored token of each row, (B, longest prompt), with the rest masked out."""
    mask = _is_prompt(text)
    width = max(1, int((mask.any(dim=0) * torch.arange(1, mask.shape[1] + 1, device=mask.device)).max()))
    return Text.unchecked(text.input_ids[:, :width], mask[:, :width].long())


def have_prompts(text: Text) -> torch.Tensor:
    """(B,): whether a row has a prompt that latents can be inferred from."""
    return _is_prompt(text).sum(dim=1) > 1


def _is_prompt(text: Text) -> torch.Tensor:
    """(B, S) real tokens before the first that is scored."""
    scored = F.pad(text.is_scored[:, :-1], (1, 0))  # the tokens, not the positions that predict them
    mask = scored.cumsum(dim=1) == 0
    return mask if text.mask is None else mask & text.mask.bool()


def written(text: Text, infer_from: str) -> torch.Tensor | None:
    """(B, S) tokens that a memory may learn from; None for all."""
    if infer_from == "text":
        return None
    return _is_prompt(text) if infer_from == "prompt" else F.pad(text.is_scored[:, :-1], (1, 0))


def second_half(text: Text) -> Text:
    """The same, with the second half of each row's scored tokens alone."""
    rank = text.is_scored.cumsum(dim=1)
    return text.scoring(2 * rank > rank[:, -1:])
