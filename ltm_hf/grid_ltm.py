"""Where tokens stand on a memory's grid of chunks, counted from each row's first real token.

Shapes: B batch, S tokens, C tokens of a chunk, K chunks.
"""

import torch
from torch.nn import functional as F


class Grid:
    """Where tokens stand on a row's grid of chunks, counted from its first real token.

    mask: (B, S) bool, real tokens; None for all. offset: (B,), how many of the first chunk's places are taken already;
    None for none. Without either, it is no more than a change of shape.
    """

    def __init__(self, shape: tuple[int, int], chunk: int, mask=None, offset=None):
        (rows, self.length), self.chunk = shape, chunk
        self.plain = mask is None and offset is None
        taken = 0 if offset is None else chunk - 1  # at most
        self.num_chunks = -(-(taken + self.length) // chunk)
        self.offset, self.places = offset, self.num_chunks * chunk
        if self.plain:
            return
        device = (mask if offset is None else offset).device
        mask = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask
        self.offset = torch.zeros(rows, dtype=torch.long, device=device) if offset is None else offset
        place = self.offset[:, None] + mask.long().cumsum(dim=1) - 1
        self.count = mask.sum(dim=1)
        self.place = torch.where(mask, place, self.places)  # beyond the last: nowhere
        self.token = torch.full((rows, self.places + 1), self.length, device=device)
        self.token.scatter_(1, self.place, torch.arange(self.length, device=device).expand(rows, -1))

    def chunks(self, states: torch.Tensor, fill=0) -> torch.Tensor:
        """(B, S, …) to (B, K, C, …); places without a token get `fill`."""
        if self.plain:
            padding = [0, 0] * (states.ndim - 2) + [0, self.places - self.length]
            return F.pad(states, padding, value=fill).unflatten(1, (-1, self.chunk))
        padded = F.pad(states, [0, 0] * (states.ndim - 2) + [0, 1], value=fill)
        return rows_of(padded, self.token[:, :-1]).unflatten(1, (-1, self.chunk))

    def tokens(self, states: torch.Tensor) -> torch.Tensor:
        """(B, K, C, …) back to (B, S, …)."""
        states = states.flatten(1, 2)
        return states[:, : self.length] if self.plain else rows_of(states, self.place.clamp(max=self.places - 1))

    def begins(self, number: int) -> torch.Tensor | bool:
        """(B,), or for all: whether a row has a token in that chunk, and is at the chunk's start."""
        if self.plain:
            return True
        present = self.offset + self.count > number * self.chunk
        return present if number else present & (self.offset == 0)


def rows_of(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(B, M, …) from states (B, S, …) and places (B, M)."""
    index = index.view(*index.shape, *[1] * (states.ndim - 2)).expand(-1, -1, *states.shape[2:])
    return states.gather(1, index)
