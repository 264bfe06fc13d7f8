"""Fine-tuning with PEFT's adapters and TRL's SFTTrainer."""

import importlib
import re
import sys

import pytest
import torch
from datasets import Dataset

from ltm_hf import LTMForCausalLM, infer_posterior
from ltm_hf.data import prompt_inputs, set_chat_template, train_tokenizer
from ltm_hf.likelihood_ltm import Text, negative_log_likelihood
from ltm_hf.memory_ltm import prior_state, token_noise
from ltm_hf.training import LTMTrainer

peft = pytest.importorskip("peft")
pytest.importorskip("trl")

SETTINGS = dict(max_steps=3, learning_rate=5e-2)


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch):
    monkeypatch.setenv("CI", "1")  # TRL sends none then


@pytest.fixture
def rows(make_ids):
    return Dataset.from_dict({"input_ids": make_ids(rows=16).tolist()})


def lora(targets=("q_proj", "v_proj"), **settings):
    targets = targets if isinstance(targets, str) else list(targets)
    return peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **settings)


def greedy(ids):
    return dict(attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), "all-linear"], ids=["q and v", "all-linear"])
def test_an_adapter_is_trained_saved_loaded_and_merged(make_model, make_arguments, rows, ids, tmp_path, targets):
    base = make_model()
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    adapted = peft.get_peft_model(base, lora(targets))
    trainer = LTMTrainer(adapted, make_arguments(**SETTINGS), train_dataset=rows)
    trainer.train()
    moved = {name: value.abs().sum().item() for name, value in adapted.named_parameters() if "lora_B" in name}
    assert all(moved.values())  # they start at zero
    assert any("cross_attn.v_proj" in name for name in moved)
    for name, value in base.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, weights[name.replace("base_layer.", "")]), name
    trainer.save_model()

    adapted.eval()
    posterior = adapted.infer_posterior(ids)
    text = adapted.generate(input_ids=ids, **greedy(ids))
    assert torch.equal(adapted.generate(input_ids=ids, reinfer_every=3, **greedy(ids))[:, :-3], text[:, :-3])
    logits = adapted(input_ids=ids, latents=posterior.mean).logits
    with adapted.disable_adapter():  # inference thinks with the adapter
        assert not torch.allclose(adapted.infer_posterior(ids).mean, posterior.mean, atol=1e-2)

    loaded = peft.PeftModel.from_pretrained(make_model(), tmp_path).eval()
    assert torch.equal(loaded.infer_posterior(ids).mean, posterior.mean)
    assert torch.equal(loaded.generate(input_ids=ids, **greedy(ids)), text)
    assert torch.equal(loaded.generate(input_ids=ids, posterior=posterior, **greedy(ids)), text)
    merged = loaded.merge_and_unload()
    assert type(merged) is LTMForCausalLM
    torch.testing.assert_close(merged(ids, latents=posterior.mean).logits, logits, rtol=0, atol=1e-4)
    assert torch.equal(merged.generate(ids, **greedy(ids)), text)


def test_adapters_are_frozen_in_the_fast_loop(make_model, ids):
    """Neither a gradient nor dropout, and both as they were after it."""
    adapted = peft.get_peft_model(make_model(), lora("all-linear", lora_dropout=0.5, init_lora_weights=False))
    expected = infer_posterior(adapted.eval(), ids)
    asked = []
    head = adapted.base_model.model.model  # which a copy of the adapted model has in its place
    head.register_forward_pre_hook(lambda module, _: asked.extend(p.requires_grad for p in module.parameters()))
    posterior = infer_posterior(adapted.train(), ids)
    assert asked and not any(asked) and torch.equal(posterior.mean, expected.mean)
    trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora_" in name and adapted.get_parameter(name).grad is None for name in trainable)
    assert adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_dropout["default"].p == 0.5


@pytest.mark.parametrize(
    "settings",
    [dict(latent_reader="memory"), *(dict(latent_reader="paper", latent_gate_init=gate) for gate in (0.1, None))],
    ids=str,
)
def test_an_adapter_brings_what_a_new_decoder_reads_latents_by(make_arguments, rows, ids, tmp_path, settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    from ltm_hf.training.sft import latent_modules

    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    upcycled = LTMForCausalLM.from_pretrained_backbone(
        LlamaForCausalLM(LlamaConfig(**sizes)), num_latents=4, **settings
    )
    upcycled.save_pretrained(tmp_path / "base")
    base = LTMForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, lora("all-linear", modules_to_save=latent_modules(base.config)))
    trainer = LTMTrainer(adapted, make_arguments(**SETTINGS), train_dataset=rows)
    trainer.train()
    trainer.save_model()
    posterior = adapted.eval().infer_posterior(ids)
    assert posterior.mean.abs().max() > 0  # before training its latents carry nothing
    loaded = peft.PeftModel.from_pretrained(LTMForCausalLM.from_pretrained(tmp_path / "base"), tmp_path).eval()
    assert torch.equal(loaded.infer_posterior(ids).mean, posterior.mean)
    text = adapted.generate(input_ids=ids, **greedy(ids))
    merged = loaded.merge_and_unload()
    assert torch.equal(merged.generate(ids, **greedy(ids)), text)
    before = LTMForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    moved = {name: value - before[name] for name, value in merged.state_dict().items()}
    moved = {
        name: change for name, change in moved.items() if any(part in name for part in latent_modules(base.config))
    }
    assert all(change.any() for change in moved.values())
    assert all(torch.linalg.matrix_rank(change) > 4 for name, change in moved.items() if "proj" in name)  # not low-rank


def test_prompt_learning_is_refused(make_model, make_arguments, rows):
    tuned = peft.get_peft_model(make_model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="Prompt learning puts tokens before the text"):
        LTMTrainer(tuned, make_arguments(**SETTINGS), train_dataset=rows)


# ---------------------------------------------------------------- supervised fine-tuning


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer([f"User:\nWhat is {a} + {a}?\nAssistant:\n{2 * a}." for a in range(30)], 300)
    set_chat_template(tokenizer)
    return tokenizer


@pytest.fixture
def make_trainer(make_model, make_arguments, tokenizer):
    from ltm_hf.training.sft import LTMSFTConfig, LTMSFTTrainer

    def make(rows=None, peft_config=None, reader="paper", **arguments):
        model = make_model(reader, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=0)
        settings = SETTINGS | dict(max_length=64, bf16=False)
        return LTMSFTTrainer(
            model,
            make_arguments(LTMSFTConfig, **settings | arguments),
            train_dataset=Dataset.from_list(rows or QUESTIONS),
            eval_dataset=Dataset.from_list((rows or QUESTIONS)[:5]),
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return make


QUESTIONS = [
    {
        "prompt": [{"role": "user", "content": f"What is {a} + {a}?"}],
        "completion": [{"role": "assistant", "content": f"{2 * a}." + " Yes." * (a % 3)}],
    }
    for a in range(24)
]
CHATS = [{"messages": row["prompt"] + row["completion"] + row["prompt"] + row["completion"]} for row in QUESTIONS]


@pytest.mark.parametrize("infer_from", ["labels", "text", "prompt"])
def test_a_step_against_the_definition(make_trainer, tokenizer, infer_from):
    """TRL's loss, on its own path past the head, is that of the completions at samples of the posterior."""
    trainer = make_trainer(infer_from=infer_from, gradient_checkpointing=False)
    model, seed, loss, kl, total = trainer.model, trainer._seed(1), 0, 0, 0
    for row in QUESTIONS[:3]:
        prompt = prompt_inputs(row, tokenizer)["input_ids"]
        ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True, return_tensors="pt")
        ids = ids["input_ids"]
        labels = ids.clone()
        labels[:, : prompt.shape[1]] = -100
        evidence = {"labels": (ids, None, labels), "text": (ids,), "prompt": (prompt,)}[infer_from]
        posterior = infer_posterior(model, *evidence, seed=seed)
        loss = loss + negative_log_likelihood(model, Text.of(model, ids, labels=labels), posterior.sample(seed)).sum()
        kl, total = kl + posterior.kl_divergence().sum().item(), total + ids.shape[1] - prompt.shape[1]
    (loss / total).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad()
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
    step = trainer.training_step(model, batch, num_items_in_batch=torch.tensor(total))
    assert step.item() == pytest.approx(loss.item() / total, rel=1e-4)
    assert trainer._sums["tokens"] == total and trainer._sums["kl"] == pytest.approx(kl, rel=1e-3)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("infer_from", ["text", "prompt"])
def test_a_step_of_a_memory_against_the_definition(make_trainer, tokenizer, infer_from):
    """Trainer's own path: TRL's would go past where a memory is read."""
    trainer = make_trainer(reader="memory", infer_from=infer_from, gradient_checkpointing=False)
    model, seed, loss, total = trainer.model, trainer._seed(1), 0, 0
    for row in QUESTIONS[:3]:
        ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True, return_tensors="pt")
        ids, start = ids["input_ids"], prompt_inputs(row, tokenizer)["input_ids"].shape[1]
        is_prompt = torch.arange(ids.shape[1])[None] < start
        text = Text.of(model, ids, labels=ids.masked_fill(is_prompt, -100))
        memory = {
            "latent_state": prior_state(model.config, 1),
            "latent_noise": token_noise(text.keys, ids.shape[1], None, model.config.hidden_size, seed),
            "latent_writes": is_prompt if infer_from == "prompt" else torch.ones_like(is_prompt),
        }
        loss, total = loss + negative_log_likelihood(model, text, **memory).sum(), total + ids.shape[1] - start
    (loss / total).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad()
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
    step = trainer.training_step(model, batch, num_items_in_batch=torch.tensor(total))
    assert step.item() == pytest.approx(loss.item() / total, rel=1e-4) and trainer._sums["tokens"] == total
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_only_the_assistant_is_scored_in_chat(make_trainer):
    trainer = make_trainer(CHATS, assistant_only_loss=True)
    completions = sum(label != -100 for row in make_trainer().train_dataset for label in row["labels"])
    assert sum(label != -100 for row in trainer.train_dataset for label in row["labels"]) == 2 * completions
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_nll"] + metrics["eval_kl"])
    assert "eval_from_prompt" in metrics


def test_special_tokens_in_what_is_learned_are_text(make_trainer, tokenizer):
    """In chat, pairs and plain texts: one end, after the answer, and the answer is what is scored."""
    asked, answer = "<|endoftext|>?", "<|endoftext|> or <|beginoftext|>."
    chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    for row, options in (
        ({"messages": chat}, {"assistant_only_loss": True}),
        ({"prompt": chat[:1], "completion": chat[1:]}, {}),
        ({"prompt": asked, "completion": answer}, {}),
        ({"text": answer}, {}),
    ):
        (row,) = make_trainer([row], **options).train_dataset
        assert [i for i in row["input_ids"] if i in (0, 1)] == [tokenizer.bos_token_id, tokenizer.eos_token_id]
        scored = [label for label in row["labels"] if label not in (-100, tokenizer.bos_token_id)]
        assert tokenizer.decode(scored) == answer + "<|endoftext|>"


@pytest.mark.parametrize(("infer_from", "bounds"), [("labels", True), ("prompt", False)])
def test_the_card_calls_only_a_bound_a_bound(make_trainer, tmp_path, infer_from, bounds):
    trainer = make_trainer(infer_from=infer_from)
    metrics = trainer.evaluate()
    trainer.save_model(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert re.search(rf"\| from_prompt +\| {metrics['eval_from_prompt']:.3f} ", card)
    assert ("| bound" in card) == ("perplexity at most" in card) == bounds


@pytest.mark.parametrize("objective", ["elbo", "elbo_trajectory", "prediction"])
def test_fine_tuning_an_adapter_lowers_the_loss(make_trainer, make_model, tokenizer, tmp_path, objective):
    """With what TRL does by default (checkpointing, its own metrics), to an adapter that answers in a clean model."""
    adapter, reader = lora("all-linear", lora_dropout=0.1), "memory" if objective == "prediction" else "paper"
    trainer = make_trainer(peft_config=adapter, reader=reader, max_steps=8, learning_rate=3e-2, objective=objective)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.5
    entry = trainer.state.log_history[1]
    assert "gain" in entry
    if reader == "paper":
        assert entry["bound"] == pytest.approx(entry["loss"] + entry["kl"])
        assert {"entropy", "mean_token_accuracy"} <= set(entry)
    trainer.save_model()
    inputs = dict(prompt_inputs(QUESTIONS[0], tokenizer), max_new_tokens=6, pad_token_id=0)
    clean = make_model(reader, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=0)
    loaded = peft.PeftModel.from_pretrained(clean, tmp_path).eval()
    merged = trainer.model.eval().merge_and_unload()
    assert torch.equal(loaded.generate(**inputs), merged.generate(**inputs))


@pytest.mark.parametrize("option", ["packing", "eval_packing", "padding_free"])
def test_several_texts_in_a_row_are_refused(tmp_path, option):
    from ltm_hf.training.sft import LTMSFTConfig

    with pytest.raises(ValueError, match=f"{option} must be off: texts in one row would share one set of latents"):
        LTMSFTConfig(str(tmp_path), **{option: True})


def test_a_loss_that_is_no_likelihood_is_refused(tmp_path):
    from ltm_hf.training.sft import LTMSFTConfig

    with pytest.raises(ValueError, match="loss_type must be 'nll'"):
        LTMSFTConfig(str(tmp_path), loss_type="dft")


def test_padding_of_rows_of_ids_is_not_scored(make_trainer, make_ids):
    """TRL makes a mask of its own, under which padding is text."""
    ids = make_ids(rows=5).tolist()
    plain = [{"input_ids": row, "completion_mask": [0] * 4 + [1] * 8} for row in ids]
    padding = {"input_ids": [7] * 3, "completion_mask": [1] * 3}
    padded = [
        {name: padding[name] + values for name, values in row.items()} | {"attention_mask": [0] * 3 + [1] * 12}
        for row in plain
    ]
    trainers = [make_trainer(rows, completion_only_loss=True) for rows in (plain, padded)]
    found = [list(trainer.train_dataset.select_columns(["input_ids", "labels"])) for trainer in trainers]
    assert found[0] == found[1] and found[0][0]["labels"][3:5] == [-100, ids[0][4]]
    with pytest.raises(ValueError, match="column 'attention_mask', which would be left out"):
        rows = [row | {"labels": row["input_ids"]} for row in padded]
        make_trainer(rows, dataset_kwargs={"skip_prepare_dataset": True}).train()
    with pytest.raises(ValueError, match="column 'position_ids'"):
        make_trainer([{"input_ids": row, "position_ids": row} for row in ids])


def test_a_set_without_rows_is_refused_when_the_trainer_is_made(make_trainer):
    from ltm_hf.training.sft import LTMSFTTrainer

    trainer = make_trainer()
    given = dict(model=trainer.model, args=trainer.args, processing_class=trainer.processing_class)
    rows = Dataset.from_list(QUESTIONS)
    for name, sets in (
        ("train_dataset", dict(train_dataset=rows.select([]))),
        ("eval_dataset", dict(train_dataset=rows, eval_dataset=rows.select([]))),
        ("other", dict(train_dataset=rows, eval_dataset={"other": rows.select([])})),
    ):
        with pytest.raises(ValueError, match=f"{name} is empty"):
            LTMSFTTrainer(**given, **sets)
    with pytest.raises(ValueError, match="train_dataset is empty"):  # TRL drops what has nothing to score
        make_trainer(max_length=4).train()


def test_predictions_are_the_scored_ones(make_trainer):
    """Past TRL's own way to the loss."""
    trainer = make_trainer(reader="memory", per_device_eval_batch_size=5)
    found = trainer.predict(trainer.eval_dataset)
    logits, labels = torch.tensor(found.predictions)[:, :-1], torch.tensor(found.label_ids)[:, 1:]
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert found.metrics["test_loss"] == pytest.approx(nats.item(), rel=1e-5)


def test_trl_is_optional(monkeypatch):
    """Training imports without it, and its own trainer says what is missing."""
    import ltm_hf.training.sft

    monkeypatch.setattr(ltm_hf, "training", ltm_hf.training)  # put back after, as are the modules
    for name in [name for name in sys.modules if name.startswith("ltm_hf.training")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("trl", "peft"):
        monkeypatch.setitem(sys.modules, name, None)
    assert importlib.import_module("ltm_hf.training").LTMTrainer is not LTMTrainer  # imported once more
    with pytest.raises(ImportError, match=r"^ltm_hf.training.sft needs TRL: pip install 'ltm_hf\[finetune\]'$"):
        importlib.import_module("ltm_hf.training.sft")
