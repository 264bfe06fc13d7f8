"""Watching a run: figures of the fast loop, bar, trackers, and warnings that fire when they should and only then."""

import logging
import math

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from ltm_hf import elbo, infer_posterior
from ltm_hf.costs.flops import training_flops
from ltm_hf.likelihood_ltm import Text
from ltm_hf.posterior_ltm import LatentPosterior
from ltm_hf.training import LTMTrainer, monitor
from ltm_hf.training.monitor import ProgressBar, diagnose, fit_figures, trace_sums, variance_sums

BLOCK = 12


@pytest.fixture
def make_trainer(make_arguments, make_model, make_ids):
    def make(model=None, callbacks=None, **arguments):
        train, test = (Dataset.from_dict({"input_ids": make_ids(16, BLOCK, seed).tolist()}) for seed in (0, 1))
        return LTMTrainer(
            model or make_model(),
            make_arguments(**dict(folder="run", learning_rate=1e-3) | arguments),
            train_dataset=train,
            eval_dataset=test.select(range(5)),
            callbacks=callbacks,
        )

    return make


# ---------------------------------------------------------------- the figures


def test_elbo_trace_against_the_definition(make_trainer, make_model):
    """Two batches of an evaluation: nats a token at each step, and after the last one with noise of its own."""
    model = make_model()
    trainer = make_trainer(model, per_device_eval_batch_size=3)
    metrics = trainer.evaluate()
    ids, seed = torch.tensor(trainer.eval_dataset["input_ids"]), trainer._seed(0)
    posterior = infer_posterior(model, ids, seed=seed)
    with torch.no_grad():
        final = elbo(model, ids, posterior, seed=seed).elbo
    expected = (torch.cat([posterior.elbo_trace, final[None]]).sum(dim=1) / (5 * (BLOCK - 1))).tolist()
    assert metrics["eval_elbo_trace"] == pytest.approx(expected, rel=1e-5)
    assert trainer.state.log_history[-1]["eval_elbo_trace"] == metrics["eval_elbo_trace"]
    assert not any("/" in name for name in metrics)  # which is for trackers
    assert metrics["eval_elbo_trace"][-1] == pytest.approx(-metrics["eval_loss"], rel=1e-6)
    assert metrics["eval_elbo_last_gain"] == pytest.approx(expected[-1] - expected[-2], abs=1e-4)


def test_elbo_trace_leaves_out_what_is_not_a_number_and_stays_where_a_fit_stopped():
    zeros = torch.zeros(3, 1, 1, 2)
    trace = torch.tensor([[-8.0, -1.0, -3.0], [-6.0, math.nan, -3.0]])
    posterior = LatentPosterior(zeros, zeros, trace)
    ids = torch.ones(3, 5, dtype=torch.long)
    labels = ids.clone()
    labels[2] = -100  # nothing to explain
    evidence = Text.unchecked(ids, labels=labels)
    sums = trace_sums(posterior, evidence, num_steps=4)
    assert sums == {"elbo_0": -8, "elbo_1": -6, "elbo_2": -6, "elbo_3": -6, "traced_tokens": 4}
    figures = fit_figures(sums | {"wider": 0.0, "narrower": 0.0, "probed_tokens": 4})
    assert figures["elbo_trace"] == [-2.0, -1.5, -1.5, -1.5] and figures["elbo_last_gain"] == 0
    posterior.elbo_trace = trace[:0]
    assert trace_sums(posterior, evidence, num_steps=0, final=torch.zeros(3)) == {"elbo_0": 0, "traced_tokens": 8}


@pytest.mark.parametrize("log_variance", [-3.0, 0.0, 2.0])
def test_variances_of_latents_that_say_nothing(make_model, make_ids, log_variance):
    """Behind a closed gate the likelihood does not move, and what a shift gains is KL alone."""
    model, ids = make_model(latent_gate_init=0.0), make_ids()
    mean = torch.zeros(3, *model.config.latent_shape)
    posterior = LatentPosterior(mean, mean + log_variance)
    with torch.no_grad():
        sums = variance_sums(model, posterior, Text.unchecked(ids), seed=0)
    kl = {shift: 0.5 * (math.exp(log_variance + shift) - log_variance - shift - 1) for shift in (-1, 0, 1)}
    assert sums["wider"] == pytest.approx((kl[0] - kl[1]) * mean.numel(), rel=1e-4)
    assert sums["narrower"] == pytest.approx((kl[0] - kl[-1]) * mean.numel(), rel=1e-4)
    assert sums["probed_tokens"] == ids.numel() - len(ids)


@pytest.mark.parametrize("objective", ["elbo", "elbo_trajectory"])
def test_mfu_is_the_share_of_the_peak(make_trainer, make_model, monkeypatch, objective):
    monkeypatch.setattr("ltm_hf.training.trainer.peak_flops", lambda device: 1e9)
    model = make_model()
    trainer = make_trainer(model, num_inference_steps=3, objective=objective, gradient_accumulation_steps=2)
    trainer.train()
    entry = trainer.state.log_history[0]
    cost = training_flops(model.config, BLOCK)
    tokens_per_second = entry["tokens_per_second"] * BLOCK / (BLOCK - 1)  # the first of a row is not scored
    flops = 3 * cost.fast_step + (1 if objective == "elbo" else 4) * cost.slow_step
    assert entry["mfu"] == pytest.approx(tokens_per_second * flops / 1e9, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA A100-SXM4-80GB", 312),
     ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("NVIDIA A10G", 70), ("Tesla T4", None)],
)  # fmt: skip
def test_peak_by_the_name_of_the_device(monkeypatch, name, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert monitor.peak_flops(torch.device("cuda")) == (teraflops and teraflops * 1e12)
    assert monitor.peak_flops(torch.device("cpu")) is None


# ---------------------------------------------------------------- warnings

EVALUATION = dict(
    eval_loss=4.0, eval_no_latents=4.1, eval_kl=0.05, eval_gain_if_wider=-0.2, eval_gain_if_narrower=-0.1,
    eval_elbo_last_gain=0.002,
)  # fmt: skip
LOSSES = [4.3, 4.2, 4.25, 4.2, 4.15, 4.2]


@pytest.mark.parametrize(
    ("cause", "logs", "word"),
    [
        ("latents unused", EVALUATION | {"eval_kl": 0.001, "eval_loss": 4.0999}, "gains 0.0001 over no latents"),
        ("fast loop not converged", EVALUATION | {"eval_elbo_last_gain": 0.03}, "num_inference_steps"),
        ("log-variance far from its optimum", EVALUATION | {"eval_gain_if_wider": 0.4}, "wider by one"),
        ("log-variance far from its optimum", EVALUATION | {"eval_gain_if_narrower": 0.4}, "narrower by one"),
        ("non-finite rows", {"loss": 4.2, "non_finite_rows": 2.0}, "of 2 sequences"),
        ("loss spike", {"loss": 5.2}, "after 4.217"),
    ],
)
def test_each_cause_is_named_and_no_other(cause, logs, word):
    found = diagnose(logs, LOSSES)
    assert list(found) == [cause] and word in found[cause]


@pytest.mark.parametrize(
    "logs",
    [
        EVALUATION,
        EVALUATION | {"eval_kl": 0.001},  # little, but worth it
        EVALUATION | {"eval_loss": 4.2},  # not worth it, but used
        EVALUATION | {"eval_elbo_last_gain": -0.03},
        {"eval_loss": 4.1},  # of a model without latents
        {"loss": 4.5},  # six deviations are 0.3
        {"loss": math.nan},
        {"train_loss": 9.0},
    ],
)
def test_nothing_is_said_of_a_run_that_goes_well(logs):
    assert diagnose(logs, LOSSES) == {}


def test_too_little_to_judge_by():
    assert diagnose({"loss": 9.0}, LOSSES[:4]) == {}
    assert diagnose({"loss": 9.0}, [*LOSSES[:4], math.nan]) == {}
    assert diagnose({"loss": 4.05}, [4.0] * 10) == {}  # no deviation at all
    unused = EVALUATION | {"eval_kl": 0.0, "eval_loss": 4.1}
    assert diagnose(unused, LOSSES, warmed_up=False) == {}


def test_two_data_sets_are_judged_apart():
    good = {name.replace("eval_", "eval_books_"): figure for name, figure in EVALUATION.items()}
    bad = {name.replace("eval_", "eval_web_"): figure for name, figure in EVALUATION.items()}
    assert diagnose(good, LOSSES) == {}
    assert list(diagnose(bad | {"eval_web_elbo_last_gain": 0.5}, LOSSES)) == ["fast loop not converged"]


def causes(caplog):
    return [record.args[1] for record in caplog.records if record.name == monitor.__name__]


def test_a_healthy_run_is_silent(make_trainer, caplog):
    trainer = make_trainer(num_inference_steps=8, eval_strategy="steps", eval_steps=1)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert causes(caplog) == []


@pytest.mark.parametrize(
    ("overrides", "arguments", "expected"),
    [
        ({"latent_gate_init": 0.0}, {}, {"latents unused"}),
        (
            {"inference_method": "adamw", "inference_learning_rate": 0.1},
            {},
            {"fast loop not converged", "log-variance far from its optimum"},
        ),
        ({"inference_method": "adamw"}, {"inference_learning_rate": 1e30}, {"non-finite rows"}),
    ],
)
def test_runs_that_go_wrong_say_so_once(make_trainer, make_model, caplog, overrides, arguments, expected):
    model = make_model(**overrides)
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_()  # what is wrong stays wrong
    trainer = make_trainer(model, max_steps=4, eval_strategy="steps", eval_steps=1, **arguments)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    found = causes(caplog)
    assert len(found) == len(set(found)) and expected <= set(found)
    assert "step" in caplog.text.lower()


def test_a_spike_in_a_run(make_trainer, make_model, caplog):
    """Half-way the decoder is broken on purpose; the same run without is silent."""

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 8:
                model.lm_head.weight.data.mul_(10)

    for callbacks, expected in ((None, []), ([Break()], ["loss spike"])):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            make_trainer(callbacks=callbacks, max_steps=12, num_inference_steps=1).train()
        assert causes(caplog) == expected


# ---------------------------------------------------------------- the bar and trackers


def test_the_bar_shows_how_it_goes(make_trainer, monkeypatch, capsys):
    monkeypatch.setattr("ltm_hf.training.trainer.peak_flops", lambda device: 1e12)
    trainer = make_trainer(disable_tqdm=False)
    trainer.train()
    entry = trainer.state.log_history[1]
    bar = capsys.readouterr().err
    shown = f"loss={entry['loss']:.4g}, bound={entry['bound']:.4g}, tokens/s={entry['tokens_per_second']:,.0f}, "
    assert shown + f"MFU={entry['mfu']:.1%}" in bar


def test_time_left_after_a_resume_counts_the_steps_of_this_run(make_trainer, tmp_path):
    make_trainer(save_strategy="steps", save_steps=2, max_steps=2).train()
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append((bar.training_bar.n, bar.training_bar.initial))

    trainer = make_trainer(disable_tqdm=False, max_steps=4)
    bar = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ProgressCallback))
    trainer.add_callback(Look())
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert seen == [(3, 2), (4, 2)]


def test_only_transformers_own_bar_is_replaced(make_trainer):
    class Own(ProgressCallback):
        pass

    def bars(trainer):
        return [type(c) for c in trainer.callback_handler.callbacks if isinstance(c, ProgressCallback)]

    assert bars(make_trainer(disable_tqdm=False)) == [ProgressBar]
    assert bars(make_trainer()) == []
    assert bars(make_trainer(callbacks=[Own()])) == [Own]


FIGURES = ("loss", "kl", "bound", "gain", "mfu", "tokens_per_second")
EVAL_FIGURES = ("loss", "kl", "gain", "no_latents", "elbo_last_gain", "gain_if_wider", "gain_if_narrower")
TRACE = {f"eval/elbo_trace/{step}": step for step in (0, 1, 2, 4, 6)}
WRITTEN = {f"train/{name}" for name in FIGURES} | {f"eval/{name}" for name in EVAL_FIGURES} | TRACE.keys()


@pytest.fixture
def tracked(make_trainer, monkeypatch):
    """Two steps and two evaluations, each with six steps of inference, written to a tracker."""

    def run(tracker, **arguments):
        monkeypatch.setattr("ltm_hf.training.trainer.peak_flops", lambda device: 1e12)
        trainer = make_trainer(
            report_to=tracker, eval_strategy="steps", eval_steps=1, num_inference_steps=6, **arguments
        )
        trainer.train()
        evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        assert [len(entry["eval_elbo_trace"]) for entry in evaluations] == [7, 7]
        assert not any("/" in name for entry in trainer.state.log_history for name in entry)
        return evaluations

    return run


def test_tensorboard_gets_every_figure(tracked, tmp_path, caplog):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    evaluations = tracked("tensorboard")
    (folder,) = (tmp_path / "run" / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    assert WRITTEN <= set(events.Tags()["scalars"])
    assert {name for name in events.Tags()["scalars"] if "trace" in name} == TRACE.keys()
    assert [event.step for event in events.Scalars("eval/elbo_last_gain")] == [1, 2]
    for name, step in TRACE.items():
        expected = [entry["eval_elbo_trace"][step] for entry in evaluations]
        assert [event.value for event in events.Scalars(name)] == pytest.approx(expected)
    assert "incorrect" not in caplog.text  # what TensorBoard says of anything but numbers


def test_trackio_gets_every_figure(tracked, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    evaluations = tracked("trackio", project="ltm", run_name="one")
    logs = storage.get_logs("ltm", "one")
    assert WRITTEN <= set().union(*logs)
    found = [log for log in logs if "eval/loss" in log]
    assert [log["eval/elbo_last_gain"] for log in found] == [entry["eval_elbo_last_gain"] for entry in evaluations]
    for name, step in TRACE.items():
        assert [log[name] for log in found] == [entry["eval_elbo_trace"][step] for entry in evaluations]
