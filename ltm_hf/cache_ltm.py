"""The cache of keys and values: under both its names, and with the latents that it was filled with.

transformers 5.24 calls `cache` what was `past_key_values` before, in arguments and outputs. Here both are understood on
every version, and the library is spoken to by the name that it has.
"""

from functools import cache as once
from functools import partial

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE, OTHER_NAME = "cache", "past_key_values"
if CACHE not in BaseModelOutputWithPast.__dataclass_fields__:
    CACHE, OTHER_NAME = OTHER_NAME, CACHE


def the_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache that was given under either name. Raises ValueError for two."""
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument: only one can be given.")
    return past_key_values if cache is None else cache


class CacheByBothNames:
    """Before any `ModelOutput`: the cache in it answers to both names, as an attribute and as a key."""

    @staticmethod
    def _named(key):
        return CACHE if key == OTHER_NAME else key

    _replace_old_cache_name = _named  # of 5.24, which would warn

    def __getitem__(self, key):
        return super().__getitem__(self._named(key))

    def __setitem__(self, key, value):
        super().__setitem__(self._named(key), value)

    def __contains__(self, key):
        return super().__contains__(self._named(key))

    def get(self, key, default=None):
        return super().get(self._named(key), default)

    locals()[OTHER_NAME] = property(lambda self: getattr(self, CACHE), lambda self, x: setattr(self, CACHE, x))


# ------------------------------------------------------------------ latents in a cache


@once
def _with_latents(cls: type) -> type:
    """The class of a cache's first layer, with latents that follow the rows of its keys and values."""

    class LayerWithLatents(cls):
        # {"latents": (B, …)} or {"latent_key_values": (B, …)}, as `forward` takes them, or {"memory": MemoryState}.
        latents = {}
        # Of each call since the last crop: its tokens, the memory before them, and a function to that after some.
        calls = ()

        def __reduce__(self):
            return _empty_layer, (cls,), self.__dict__ | {"calls": ()}

        def _each(self, choose) -> None:
            rows = {name: getattr(x, "rows", None) or partial(_apply, x) for name, x in self.latents.items()}
            self.latents, self.calls = {name: of(choose) for name, of in rows.items()}, ()

        def activate_past_recording(self):
            if hasattr(super(), "activate_past_recording"):  # else attention is full, and loses nothing
                super().activate_past_recording()
            self.record_past = True

        def crop(self, tokens_to_remove):
            kept = self.get_seq_length() - tokens_to_remove  # of 5.17, which takes how many to keep as well
            self.latents = self._before_last(kept if tokens_to_remove > 0 else -tokens_to_remove)
            super().crop(tokens_to_remove)
            self.calls = ()

        def _before_last(self, tokens: int) -> dict:
            """The latents as they were before so many of the last tokens, from which a memory has learned."""
            if "memory" not in self.latents or tokens <= 0:
                return self.latents
            read = sum(length for length, *_ in self.calls)
            if tokens > read:
                raise ValueError(
                    f"A memory can forget what was read since activate_past_recording() and the last crop(), {read} "
                    f"tokens, not {tokens}."
                )
            for length, before, after in reversed(self.calls):
                if tokens <= length:
                    return {"memory": after(length - tokens) if tokens < length else before}
                tokens -= length

        def reorder_cache(self, beam_idx):
            super().reorder_cache(beam_idx)
            self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

        def batch_select_indices(self, indices):
            super().batch_select_indices(indices)
            self._each(lambda x: x[indices])

        def batch_repeat_interleave(self, repeats):
            super().batch_repeat_interleave(repeats)
            self._each(lambda x: x.repeat_interleave(repeats, dim=0))

        def reset(self):
            super().reset()
            self.latents, self.calls = {}, ()

    LayerWithLatents.__name__ = LayerWithLatents.__qualname__ = f"{cls.__name__}WithLatents"
    return LayerWithLatents


def _apply(x, function):
    return function(x)


def _empty_layer(cls: type):
    """For the state of one that was pickled."""
    made = _with_latents(cls)
    return made.__new__(made)


def keep_latents(cache: Cache, **latents: torch.Tensor) -> None:
    """Let the cache hold the latents that its keys and values are made with: `latents=` or `latent_key_values=`."""
    if not cache.layers:  # one that makes its layers when it is filled
        return
    layer = cache.layers[0]
    if not hasattr(layer, "latents"):
        layer.__class__ = _with_latents(type(layer))
    layer.latents = latents


def record_call(cache: Cache, num_tokens: int, before, after) -> None:
    """Let a cache that is to be cropped take its memory back: to `before` a call, or `after(n)` of its tokens."""
    layer = cache.layers[0] if cache.layers else None
    if getattr(layer, "record_past", False):
        layer.calls = (*layer.calls, (num_tokens, before, after))


def kept_latents(cache: Cache | None) -> dict[str, torch.Tensor]:
    """The latents that a cache was filled with, as keyword arguments of `forward`; none for an empty cache."""
    layer = cache.layers[0] if cache is not None and cache.layers else None
    latents = getattr(layer, "latents", {})
    return latents if latents and cache.get_seq_length() else {}


def check_filled_with_latents(cache: Cache | None) -> None:
    """Raise ValueError for a cache that was filled without latents: what follows would not fit to what is in it."""
    if cache is not None and not kept_latents(cache) and cache.get_seq_length():
        raise ValueError(
            "The cache was filled without latents, and cannot be continued with some: fill it with "
            "forward(latents=…) or generate(), or leave it out."
        )
