"""The fast loop on a decoder whose parameters are sharded over processes: FSDP2 (`fully_shard`) and DeepSpeed ZeRO-3.

Both gather a layer's parameters for its forward and again for its backward. The fast loop runs the same frozen decoder
T times, so that holding the parameters from its first step to its last saves 2T - 1 of 2T gathers.
"""

from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import nn

try:
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
except ImportError:  # built without distributed

    class FSDPModule: ...


GATHER_DURING_INFERENCE = ("auto", "always", "never")
SHARE_OF_DEVICE = 1 / 4  # what the gathered parameters may take, of the device's memory, under "auto"


@contextmanager
def gathered(decoder: nn.Module, when: str = "auto", keep: bool = False):
    """What the fast loop runs in: sharded parameters are gathered once and held, and no gradient is reduced.

    decoder: the bare module, as `accelerator.unwrap_model` gives it; for one that is not sharded nothing happens.
    when: "always"; "never", which gathers at each use, as without this context; "auto" for "always" if `fits`.
    keep: leave FSDP2's parameters gathered at the end for a forward that follows, which then gathers nothing. After an
        error they are let go. ZeRO-3's always are.

    All processes enter and leave together. Every setting is put back to what it was, after an error too.
    """
    hold = when == "always" or (when == "auto" and fits(decoder))
    fsdp, zero3 = _fsdp_modules(decoder), [p for p in decoder.parameters() if hasattr(p, "ds_status")]
    with _fsdp_held(fsdp, hold, keep) if fsdp else _zero3_held(zero3) if zero3 and hold else nullcontext():
        yield


def fits(decoder: nn.Module) -> bool:
    """Whether all parameters, at the precision they are stored in, take at most a quarter of the memory of the device.

    Of all memory, not of what is free: that would differ between processes and between steps. True on the CPU.
    """
    size, device = 0, None
    for parameter in decoder.parameters():
        size += getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        device = parameter.device
    if device is None or device.type != "cuda":
        return True
    return size <= SHARE_OF_DEVICE * torch.cuda.get_device_properties(device).total_memory


# ------------------------------------------------------------------ FSDP2


def _fsdp_modules(module: nn.Module) -> list[FSDPModule]:
    """The root first."""
    return [m for m in module.modules() if isinstance(m, FSDPModule)]


def _groups(module: FSDPModule) -> list:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # torch before 2.12 has one at most
    return [g for g in (groups if groups is not None else [state._fsdp_param_group]) if g is not None]


_STATE_SETTINGS = ("_auto_reshard_after_forward",)
_GROUP_SETTINGS = ("post_forward_mesh_info", "reshard_after_backward", "reduce_grads", "all_reduce_grads")


@contextmanager
def _fsdp_settings_restored(modules: list[FSDPModule]):
    """torch can set them and not tell them."""
    owners = [(module._get_fsdp_state(), _STATE_SETTINGS) for module in modules]
    owners += [(group, _GROUP_SETTINGS) for module in modules for group in _groups(module)]
    before = [(owner, name, getattr(owner, name)) for owner, names in owners for name in names if hasattr(owner, name)]
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


@contextmanager
def _fsdp_held(modules: list[FSDPModule], hold: bool, keep: bool):
    # Frozen parameters at its first use would leave FSDP without a gradient dtype for the slow step.
    modules[0]._get_fsdp_state()._lazy_init()
    done = False
    try:
        with _fsdp_settings_restored(modules):
            for module in modules:
                module.set_requires_gradient_sync(False, recurse=False)  # an earlier micro-batch's wait for the last
                if hold:
                    module.set_reshard_after_forward(False, recurse=False)
                    module.set_reshard_after_backward(False, recurse=False)
                    module.unshard()
                else:
                    module.reshard()  # so that who freezes the parameters freezes those that outlast the loop
            yield
        done = True
    finally:
        if not (done and hold and keep):
            for module in modules:
                module.reshard()


def float32_reductions(accelerator) -> None:
    """FSDP2 in half precision: reduce gradients in float32 and return losses as computed, in float32.

    Accelerate's policy rounds both to half precision. A policy of the user's own stays.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if getattr(plugin, "fsdp_version", 1) == 2 and policy is not None:
        half = policy.param_dtype
        if policy == MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half, output_dtype=half):
            plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)


# ------------------------------------------------------------------ DeepSpeed ZeRO-3

_HELD = -1  # stands among the modules that use a parameter, which its hooks then do not let go


@contextmanager
def _zero3_held(parameters: list[nn.Parameter]):
    # Not deepspeed.zero.GatheredParameters: the hooks of the first forward would let the parameters go.
    for parameter in parameters:
        parameter.ds_active_sub_modules.add(_HELD)
    away = [p for p in parameters if p.ds_status.name == "NOT_AVAILABLE"]  # others are here still, or on their way
    try:
        if away:
            away[0].all_gather(param_list=away)
        yield
    finally:
        for parameter in parameters:
            parameter.ds_active_sub_modules.discard(_HELD)
        here = [p for p in away if p.ds_status.name == "AVAILABLE"]
        if here:
            here[0].partition(param_list=here)


# ------------------------------------------------------------------ several backwards for one step


@contextmanager
def accumulating(accelerator, model: nn.Module):
    """Gradients add up on each process inside: none are exchanged, and DeepSpeed takes no optimiser step.

    model: as wrapped for training. Within an accumulation of the trainer's own it changes nothing.
    """
    state, fsdp = accelerator.gradient_state, _fsdp_modules(model)
    before = state.sync_gradients
    with ExitStack() as stack:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            stack.enter_context(model.no_sync())
        elif fsdp:
            stack.enter_context(_fsdp_settings_restored(fsdp))
            for module in fsdp:
                module.set_requires_gradient_sync(False, recurse=False)
        state._set_sync_gradients(False)
        try:
            yield
        finally:
            state._set_sync_gradients(before)
