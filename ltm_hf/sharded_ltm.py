"""Modules that are called any number of times in one pass, though FSDP2 or ZeRO-3 share their weights out.

Both gather weights by hooks, at each call, all processes together; a memory's calls are as many as a text has chunks,
about which processes need not agree. Here weights are gathered once, and the hooks left out.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import nn

_HELD = -2  # stands among the modules that use a parameter, which ZeRO-3's hooks then do not let go
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def gathered_once(modules: tuple[nn.Module, ...], touch: Callable[[], object]):
    """The modules, as they can be called inside; all processes enter and leave together.

    touch: calls each of them once, as it is.
    """
    parameters = [p for module in modules for p in module.parameters() if hasattr(p, "ds_active_sub_modules")]
    if not parameters:
        yield tuple(_Unsharded(module) if hasattr(module, "unshard") else module for module in modules)
        return
    for parameter in parameters:
        parameter.ds_active_sub_modules.add(_HELD)
    try:
        with torch.no_grad():
            touch()  # by their own hooks, which know what is on its way already
        yield tuple(_without_hooks(module) for module in modules)
    finally:
        for parameter in parameters:
            parameter.ds_active_sub_modules.discard(_HELD)
        idle = [
            p for p in parameters if p.ds_status.name == "AVAILABLE" and not (p.ds_active_sub_modules or p.ds_persist)
        ]
        if idle:
            idle[0].partition(param_list=idle)


class _Unsharded:
    """A module whose weights FSDP2 has gathered. Its next call of its own lets them go again."""

    def __init__(self, module: nn.Module):
        module.unshard()
        self.module, self.weight = module, next(module.parameters())
        self.out_features = getattr(module, "out_features", None)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        return self.module.forward(states.to(self.weight.dtype))


def _without_hooks(module: nn.Module) -> nn.Module:
    """The same weights, in modules that call nobody."""
    bare = copy.copy(module)
    for name in _HOOKS:
        setattr(bare, name, OrderedDict())
    bare._modules = {name: child and _without_hooks(child) for name, child in module._modules.items()}
    return bare
