"""Modules called often with weights that FSDP2 or ZeRO-3 share out: gathered once, and without hooks."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ltm_hf.losses_ltm import HeadPass
from ltm_hf.sharded_ltm import gathered_once

VOCABULARY, HIDDEN = 61, 32


@pytest.fixture
def states(make_noise):
    return make_noise(10, HIDDEN)


def untouched():
    pytest.fail("Only ZeRO-3 needs a call.")


class Unsharded(nn.Linear):
    """As FSDP2 makes it: `unshard` gathers the weight, hooks do so around each call."""

    gathered = 0

    def unshard(self):
        self.gathered += 1


def test_plain_modules_are_themselves():
    modules = nn.Linear(2, 3), nn.RMSNorm(2)
    with gathered_once(modules, untouched) as found:
        assert found == modules


def test_fsdp(states):
    module, norm = Unsharded(HIDDEN, VOCABULARY, bias=False).to(torch.bfloat16), nn.RMSNorm(HIDDEN)
    expected = module(states.to(torch.bfloat16))
    module.register_forward_pre_hook(lambda *call: pytest.fail("A hook was called."))
    norm.unshard = lambda: None  # it has no features to count
    with gathered_once((module, norm), untouched) as (head, its_norm):
        assert module.gathered == 1 and head.out_features == VOCABULARY and head.weight is module.weight
        assert torch.equal(head(states), expected)
        assert torch.equal(its_norm(states), norm(states))
        head_pass = HeadPass(head)
        targets = torch.randint(VOCABULARY, (10,), generator=torch.Generator().manual_seed(1))
        nats, _ = head_pass(states, targets, torch.ones(10))
        assert head_pass.weight_gradient is None  # it learns by a call of its own
    torch.testing.assert_close(nats, nn.functional.cross_entropy(expected.float(), targets, reduction="none"))


class Zero3:
    """ZeRO-3's protocol, of one process: weights come before a call and go after it, unless somebody uses them."""

    def __init__(self, module: nn.Module):
        self.gathers, self.parameters = 0, list(module.parameters())
        for parameter in self.parameters:
            parameter.whole, parameter.ds_persist = parameter.data, False
            parameter.ds_active_sub_modules = set()
            parameter.partition = lambda param_list: self.let_go(param_list)
        self.let_go(self.parameters)
        for one in module.modules():
            own = list(one.parameters(recurse=False))
            one.register_forward_pre_hook(lambda module, args, own=own: self.gather(own))
            one.register_forward_hook(lambda module, args, output, own=own: self.release(own))

    def let_go(self, parameters):
        for parameter in parameters:
            parameter.data, parameter.ds_status = torch.empty(0), SimpleNamespace(name="NOT_AVAILABLE")

    def gather(self, parameters):
        for parameter in parameters:
            if parameter.ds_status.name == "NOT_AVAILABLE":
                self.gathers += 1
                parameter.data, parameter.ds_status = parameter.whole, SimpleNamespace(name="AVAILABLE")

    def release(self, parameters):
        self.let_go([parameter for parameter in parameters if not parameter.ds_active_sub_modules])


def test_zero3(states):
    module = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, VOCABULARY))
    expected, zero3 = module(states), Zero3(module)
    with gathered_once((module,), lambda: module(states[:1])) as (bare,):
        assert zero3.gathers == len(zero3.parameters)
        for _ in range(3):
            assert torch.equal(bare(states), expected)
    assert zero3.gathers == len(zero3.parameters)
    assert all(p.ds_status.name == "NOT_AVAILABLE" and not p.ds_active_sub_modules for p in zero3.parameters)
    assert torch.equal(module(states), expected) and zero3.gathers == 2 * len(zero3.parameters)


def test_zero3_leaves_what_others_use(states):
    module = nn.Linear(HIDDEN, VOCABULARY)
    zero3 = Zero3(module)
    zero3.gather(zero3.parameters)
    module.weight.ds_active_sub_modules.add("another")
    with pytest.raises(KeyError), gathered_once((module,), lambda: module(states)):
        raise KeyError
    assert [p.ds_status.name for p in zero3.parameters] == ["AVAILABLE", "NOT_AVAILABLE"]
