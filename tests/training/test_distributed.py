"""The same training in one process, under DDP, FSDP2 and DeepSpeed: real runs of two processes on the CPU, over gloo.

Each mode is launched once and runs all cases of `distributed_worker.py`, with the launch files that users get.
"""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ltm_hf import LTMForCausalLM

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent
launching = SimpleNamespace(**runpy.run_path(str(HERE / "launching.py")))
MODES = ["ddp", "fsdp2", *(pytest.param(mode, marks=pytest.mark.deepspeed) for mode in ("zero2", "zero3"))]
SHARDED = ["fsdp2", pytest.param("zero3", marks=pytest.mark.deepspeed)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="session")
def run(folder):
    """What a mode found, by case."""
    found = {}

    def launch(mode):
        if mode.startswith("zero"):
            pytest.importorskip("deepspeed")
        ran = launching.launch(mode, 2, HERE / "distributed_worker.py", mode, folder, timeout=600)
        assert ran.returncode == 0, ran.stderr[-5000:]
        return json.loads((folder / f"{mode}.json").read_text())

    def run(mode):
        if mode not in found:
            try:
                found[mode] = launch(mode)
            except BaseException as error:  # once, not for each case
                found[mode] = error
        if isinstance(found[mode], BaseException):
            raise found[mode]
        return found[mode]

    return run


def assert_close(found, expected, name="", tolerance=5e-5):
    """Within 5e-5, of what is larger than one relatively: float32 sums it up in another order, on each CPU its own."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            assert_close(found[key], value, key, tolerance)
    elif name == "generated":
        assert found == expected
    else:
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance), name


def test_single_process_learns(run):
    """What the others are compared with."""
    single = run("single")
    assert single["world_size"] == 1
    assert len(single["final"]["loss"]) == 4 and len(single["final"]["evaluations"]["loss"]) == 2
    assert single["trajectory"]["loss"] != single["final"]["loss"]
    assert min(single["final"]["kl"]) > 0.1 and min(single["final"]["gain"]) > 0.1


@pytest.mark.parametrize("case", ["final", "trajectory", "never", "labels", "prompt", "checkpointing"])
@pytest.mark.parametrize("mode", MODES)
def test_same_mathematics(run, mode, case):
    """Losses, kl, gain and gradient norms of 4 steps of AdamW, evaluations, and completions."""
    assert run(mode)["world_size"] == 2
    assert_close(run(mode)[case], run("single")[case])


@pytest.mark.parametrize("case", ["amortized", "unrolled", "online"])
def test_what_runs_outside_the_forward_learns_the_same_under_ddp(run, case):
    """An encoder, and inference that gradients go through."""
    single = run("single")[case]
    assert abs(single.get("kl", single["gain"])[-1]) > 0.001  # latents matter; online has no kl
    assert_close(run("ddp")[case], run("single")[case])


@pytest.mark.parametrize("mode", MODES)
def test_the_fast_loop_stops_at_one_step_on_all_processes(run, mode):
    found, expected = (dict(run(name)["tolerance"]) for name in (mode, "single"))
    (passes,) = expected.pop("passes")
    assert found.pop("passes") == [passes, passes]
    assert len(set(passes)) > 1 and max(passes) < 25
    assert_close(found, expected, tolerance=5e-4)  # after many fast steps


@pytest.mark.parametrize("mode", ["single", *MODES])
def test_resumed_training_is_the_unbroken_one(run, mode):
    assert set(run(mode)["resumed"].values()) == {0.0}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("saved", ["final", "whole/checkpoint-2"])
def test_saved_models_load_in_one_process(run, folder, mode, saved):
    run("single"), run(mode)
    path = folder / mode / saved
    assert {"README.md", "modeling_ltm.py", "model.safetensors"} <= {file.name for file in path.iterdir()}
    found, expected = (LTMForCausalLM.from_pretrained(folder / name / saved).state_dict() for name in (mode, "single"))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("mode", ["single", *MODES])
def test_bfloat16_with_latents_and_losses_in_float32(run, mode):
    """And gradient checkpointing."""
    found, expected = run(mode)["bf16"], run("single")["final"]
    assert found["dtypes"] == ["torch.float32"]
    assert found["reduced_in"] == ("torch.float32" if mode == "fsdp2" else None)
    for figures in (found, found["never"]):
        assert figures["loss"] == pytest.approx(expected["loss"], rel=0.01)
        for name in ("kl", "grad_norm"):
            assert figures[name] == pytest.approx(expected[name], rel=0.06)
            assert figures[name] != pytest.approx(expected[name], rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_fast_loop_that_fails_leaves_everything_as_it_was(run, mode):
    found = dict(run(mode)["interrupted"])
    assert found.pop("errors") == 8 and found.pop("same") == [True, True]
    expected = run("single")["final"]
    assert_close(found, {name: expected[name] for name in found})


@pytest.mark.parametrize("mode", SHARDED)
def test_parameters_are_gathered_once_for_a_fast_loop(run, mode):
    found = run(mode)["gathers"]
    whole = pytest.approx(found["elements"], rel=0.1)  # a little is padding, and tied embeddings may come twice
    (calls, elements), (calls_never, elements_never) = (found[when]["fast"] for when in ("always", "never"))
    assert elements == whole and elements_never > 5 * elements  # of 3 forwards and 3 backwards
    assert calls_never > 4 * calls
    assert found["never"]["slow"][1] == whole
    # FSDP2 leaves them gathered for the slow step.
    assert found["always"]["slow"][1] == (0 if mode == "fsdp2" else whole)
