"""LTMTrainer: what its steps compute, what it logs, and that it lowers the bound on real text."""

import math

import pytest
import torch
from datasets import Dataset
from torch._dynamo.utils import counters

from ltm_hf import LTMConfig, LTMForCausalLM, elbo
from ltm_hf.costs.flops import training_flops
from ltm_hf.inference_ltm import infer_posterior
from ltm_hf.likelihood_ltm import Text
from ltm_hf.memory_ltm import prior_state, token_noise
from ltm_hf.training import LTMTrainer, LTMTrainingArguments, plot_curves
from ltm_hf.training.objectives import OBJECTIVES, step_flops

BLOCK = 16
READERS = {
    "memory": dict(latent_chunk=2),
    "paper": dict(latent_reader="paper", num_inference_steps=2, latent_gate_init=0.1),
}
both_readers = pytest.mark.parametrize("reader", READERS)


def make_model(reader="paper", **overrides):
    torch.manual_seed(0)
    settings = dict(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=BLOCK,
        sliding_window=4,
        num_latents=4,
        bos_token_id=1,
        eos_token_id=0,
    )
    return LTMForCausalLM(LTMConfig(**settings | READERS[reader] | overrides))


def make_blocks(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Dataset.from_dict({"input_ids": torch.randint(2, 61, (count, BLOCK), generator=generator).tolist()})


@pytest.fixture
def make_trainer(make_arguments):
    def make(model, blocks, folder="", **arguments):
        args = make_arguments(folder=folder, **arguments)
        return LTMTrainer(model, args, train_dataset=blocks, eval_dataset=make_blocks(5, seed=1))

    return make


def test_paper_defaults(tmp_path):
    args = LTMTrainingArguments(output_dir=str(tmp_path))
    assert (args.learning_rate, args.adam_beta1, args.adam_beta2, args.weight_decay) == (4e-4, 0.9, 0.95, 0.1)
    assert (args.warmup_steps, args.max_grad_norm) == (1000, 1.0)
    assert args.lr_scheduler_type == "cosine_with_min_lr" and args.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    with pytest.raises(ValueError, match="objective must be one of elbo, elbo_trajectory, prediction; got 'both'"):
        LTMTrainingArguments(output_dir=str(tmp_path), objective="both")


def test_inference_learning_rate_rises_as_in_the_paper(make_trainer):
    model = make_model(inference_method="adamw")
    args = make_trainer(model, make_blocks(4)).args
    rates = [args.inference_rate(model.config, share) for share in (0, 0.5, 1)]
    assert rates == pytest.approx([0.30, 0.32, 0.34])


def learned_with(objective, model, input_ids, seed):
    """What each pass of a slow step is given, by definition."""
    if objective == "prediction":
        keys = Text.of(model, input_ids).keys
        noise = token_noise(keys, BLOCK, None, model.config.hidden_size, seed)
        return [dict(latent_state=prior_state(model.config, len(input_ids)), latent_noise=noise)]
    latents = []
    posterior = infer_posterior(model, input_ids, seed=seed, callback=lambda step, z, elbo: latents.append(z))
    return [dict(latents=z) for z in (*(latents if objective == "elbo_trajectory" else ()), posterior.sample(seed))]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_against_their_definition(make_trainer, objective):
    """The weight gradient of a step: of the mean token NLL at the final sample, or averaged over the trajectory too; or
    of each token at a sample of what those before it have left."""
    model, blocks = make_model("memory" if objective == "prediction" else "paper"), make_blocks(4)
    trainer = make_trainer(model, blocks, objective=objective)
    input_ids = torch.tensor(blocks["input_ids"])
    passes = learned_with(objective, model, input_ids, trainer._seed(1))
    torch.stack([model(input_ids, **given, labels=input_ids).loss for given in passes]).mean().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad()
    loss = trainer.training_step(
        model, {"input_ids": input_ids, "labels": input_ids}, num_items_in_batch=torch.tensor(4 * (BLOCK - 1))
    )
    assert len(passes) == (3 if objective == "elbo_trajectory" else 1)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)
    assert math.isfinite(loss.item())


def test_learning_through_the_errors(make_trainer):
    """It is `latent_errors_learn` of a forward pass, and another gradient than with errors as constants."""
    blocks, gradients = make_blocks(4), {}
    input_ids = torch.tensor(blocks["input_ids"])
    for through in (True, False):
        model = make_model("memory")
        torch.nn.init.zeros_(model.model.reader.scales.log_read)
        trainer = make_trainer(model, blocks, learn_through_errors=through)
        (given,) = learned_with("prediction", model, input_ids, trainer._seed(1))
        model(input_ids, **given, labels=input_ids, latent_errors_learn=through).loss.backward()
        expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        inputs = {"input_ids": input_ids, "labels": input_ids}
        trainer.training_step(model, inputs, num_items_in_batch=torch.tensor(4 * (BLOCK - 1)))
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], msg=name)
        gradients[through] = expected
    name = "model.reader.q_proj.weight"
    assert (gradients[True][name] - gradients[False][name]).norm() > 0.01 * gradients[False][name].norm()


def test_only_a_memory_of_whole_weights_learns_through_errors(make_trainer, monkeypatch):
    with pytest.raises(ValueError, match="learn_through_errors is of a memory"):
        make_trainer(make_model("paper"), make_blocks(4), learn_through_errors=True)
    monkeypatch.setattr("ltm_hf.training.checks._is_sharded", lambda trainer: True)
    with pytest.raises(ValueError, match="learn_through_errors takes second derivatives"):
        make_trainer(make_model("memory"), make_blocks(4), learn_through_errors=True)


def test_logs(make_trainer):
    trainer = make_trainer(make_model(), make_blocks(16))
    trainer.train()
    for entry in trainer.state.log_history[:2]:
        assert entry["bound"] == pytest.approx(entry["loss"] + entry["kl"])
        assert entry["perplexity_bound"] == pytest.approx(math.exp(entry["bound"]))
        assert entry["kl"] > 0 and entry["inference_seconds"] > 0 and entry["tokens_per_second"] > 0
        assert math.isfinite(entry["gain"])


def test_a_memory_logs_no_bound(make_trainer):
    """What it pays no KL for; and no time for inference, which is within the step."""
    trainer = make_trainer(make_model("memory"), make_blocks(16))
    trainer.train()
    entry, metrics = trainer.state.log_history[0], trainer.evaluate()
    assert not {"kl", "bound", "perplexity_bound", "inference_seconds"} & set(entry)
    assert math.isfinite(entry["gain"])
    assert not {"eval_kl", "eval_elbo_trace", "eval_perplexity_bound", "eval_from_prompt"} & set(metrics)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))


def test_baseline_logs_nothing_about_latents(make_trainer):
    trainer = make_trainer(make_model(num_latents=0), make_blocks(16))
    trainer.train()
    entry = trainer.state.log_history[0]
    assert not {"kl", "gain", "bound", "inference_seconds"} & set(entry)
    assert entry["perplexity"] == pytest.approx(math.exp(entry["loss"]))
    assert not {"eval_kl", "eval_gain"} & set(trainer.evaluate())


def test_evaluation_is_the_bound_with_fresh_noise(make_trainer):
    model = make_model()
    trainer = make_trainer(model, make_blocks(4), per_device_eval_batch_size=2)
    metrics = trainer.evaluate()
    input_ids = torch.tensor(trainer.eval_dataset["input_ids"])
    posterior = infer_posterior(model, input_ids, seed=trainer._seed(0))
    with torch.no_grad():
        expected = elbo(model, input_ids, posterior, seed=trainer._seed(0))
        plain = model(input_ids, labels=input_ids).loss.item()
    num_tokens = expected.num_tokens.sum()
    assert metrics["eval_loss"] == pytest.approx((-expected.elbo.sum() / num_tokens).item(), abs=1e-5)
    assert metrics["eval_kl"] == pytest.approx((expected.kl.sum() / num_tokens).item(), abs=1e-5)
    assert metrics["eval_no_latents"] == pytest.approx(plain, abs=1e-5)
    assert metrics["eval_gain"] == pytest.approx(metrics["eval_no_latents"] - metrics["eval_nll"], abs=1e-6)


def test_evaluation_of_a_memory_is_exact(make_trainer):
    """By the mean of what the tokens before have left; of second halves after all that was read."""
    model = make_model("memory")
    trainer = make_trainer(model, make_blocks(4), per_device_eval_batch_size=2)
    metrics = trainer.evaluate()
    input_ids = torch.tensor(trainer.eval_dataset["input_ids"])
    start = prior_state(model.config, len(input_ids))
    with torch.no_grad():
        nats = model(input_ids, latent_state=start, labels=input_ids, loss_reduction="none").loss
        plain = model(input_ids, labels=input_ids, loss_reduction="none").loss
    assert metrics["eval_loss"] == pytest.approx(nats.mean().item(), abs=1e-5)
    assert metrics["eval_second_half"] == pytest.approx(nats[:, BLOCK // 2 - 1 :].mean().item(), abs=1e-5)
    assert metrics["eval_second_half_no_latents"] == pytest.approx(plain[:, BLOCK // 2 - 1 :].mean().item(), abs=1e-5)
    assert metrics["eval_gain"] == pytest.approx((plain - nats).mean().item(), abs=1e-5)
    assert metrics["eval_prediction_sampled"] != metrics["eval_loss"]


@both_readers
def test_weight_decay_on_matrices_only(make_trainer, reader):
    model = make_model(reader)
    decayed = set(make_trainer(model, make_blocks(4)).get_decay_parameter_names(model))
    for name, parameter in model.named_parameters():
        assert (name in decayed) == (parameter.ndim == 2), name


def test_weight_decay_on_matrices_that_zero3_keeps_elsewhere(make_trainer):
    model = make_model()
    decayed = make_trainer(model, make_blocks(4)).get_decay_parameter_names(model)
    for parameter in model.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    assert decayed and make_trainer(model, make_blocks(4)).get_decay_parameter_names(model) == decayed


@both_readers
def test_runs_of_one_seed_are_equal_and_of_another_are_not(make_trainer, reader):
    def losses(seed):
        trainer = make_trainer(make_model(reader), make_blocks(16), seed=seed, data_seed=0)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)  # noise of its own, on the same data


def test_number_of_inference_steps_is_drawn(make_trainer, monkeypatch):
    """Once for each optimiser step, whatever its parts; by the seed; all from the least to the most."""

    def drawn(least, seed=0, **arguments):
        steps = []

        def recorded(*args, num_inference_steps, **kwargs):
            steps.append(num_inference_steps)
            return infer_posterior(*args, num_inference_steps=num_inference_steps, **kwargs)

        monkeypatch.setattr("ltm_hf.training.objectives.infer_posterior", recorded)
        settings = dict(num_inference_steps=2, num_inference_steps_min=least, max_steps=12, logging_steps=12)
        make_trainer(make_model(), make_blocks(48), seed=seed, **settings | arguments).train()
        return steps

    steps = drawn(0)
    assert set(steps) == {0, 1, 2} and drawn(0) == steps != drawn(0, seed=1)
    parts = drawn(0, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert parts == [number for number in steps for _ in range(2)]
    assert set(drawn(2)) == set(drawn(None)) == {2}
    with pytest.raises(ValueError, match=r"num_inference_steps_min must be at most num_inference_steps \(2\), got 3"):
        make_trainer(make_model(), make_blocks(4), num_inference_steps_min=3)
    with pytest.raises(ValueError, match="num_inference_steps_min must be 0 or more, got -1"):
        make_trainer(make_model(), make_blocks(4), num_inference_steps_min=-1)


def test_flops_of_a_step(make_arguments):
    """On average over the numbers of steps that are drawn; the decoder learns from each of a trajectory."""

    def flops(config, **arguments):
        return step_flops(config, make_arguments(**arguments), BLOCK)

    config = make_model(num_inference_steps=3).config
    cost = training_flops(config, BLOCK)
    assert flops(config) == 3 * cost.fast_step + cost.slow_step
    assert flops(config, num_inference_steps_min=1) == 2 * cost.fast_step + cost.slow_step
    drawn = dict(num_inference_steps_min=1, objective="elbo_trajectory")
    assert flops(config, **drawn) == 2 * cost.fast_step + 3 * cost.slow_step
    for other in (make_model(num_latents=0).config, make_model("memory").config):
        assert flops(other) == training_flops(other, BLOCK).slow_step


def test_resumes_where_it_stopped(make_trainer, tmp_path):
    settings = dict(max_steps=4, save_strategy="steps", save_steps=2)
    whole = make_trainer(make_model(), make_blocks(16), folder="whole", **settings)
    whole.train()
    resumed = make_trainer(make_model(), make_blocks(16), folder="resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    last = [[e["loss"] for e in t.state.log_history if "loss" in e][-2:] for t in (whole, resumed)]
    assert last[0] == last[1]


@both_readers
def test_training_lowers_the_loss_on_real_text(make_trainer, reader):
    from ltm_hf.data import load_corpus, pack, train_tokenizer

    corpus = load_corpus()
    corpus["train"] = corpus["train"].select(range(12))
    tokenizer = train_tokenizer((row["text"] for row in corpus["train"]), 300)
    blocks = pack(corpus["train"], tokenizer, 32)
    model = make_model(reader, vocab_size=len(tokenizer), max_position_embeddings=32)
    trainer = make_trainer(model, blocks, max_steps=30, per_device_train_batch_size=16)
    trainer.eval_dataset = blocks.select(range(32))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 1.0


def test_curves(make_trainer, tmp_path):
    pytest.importorskip("matplotlib")
    trainer = make_trainer(make_model(), make_blocks(16), eval_strategy="steps", eval_steps=1)
    trainer.train()
    plot_curves({"ltm": trainer.state.log_history}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@both_readers
def test_a_compiled_decoder_is_compiled_in_the_fast_loop_too(make_trainer, reader):
    logs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        arguments = dict(torch_compile=True, torch_compile_backend="eager") if compiled else {}
        trainer = make_trainer(make_model(reader), make_blocks(8), **arguments)
        trainer.train()
        names = ("loss", "gain", "grad_norm", *(("kl", "bound") if reader == "paper" else ()))
        logs.append([[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry])
    torch.testing.assert_close(*logs, rtol=1e-5, atol=1e-6)
    inference = 2 * (reader == "paper")  # before latents and what reads them; learning, the gain with and without
    assert counters["stats"]["unique_graphs"] == 3 + inference
