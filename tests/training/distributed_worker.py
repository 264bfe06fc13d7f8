"""What each process of `test_distributed.py` runs: `distributed_worker.py MODE FOLDER [CASE …]`.

Every case trains a tiny model on the same rows in the same order; rank 0 writes FOLDER/MODE.json.
"""

import json
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset

import ltm_hf.training.trainer
from ltm_hf import LTMConfig, LTMForCausalLM, infer_posterior
from ltm_hf.training import LTMTrainer, LTMTrainingArguments, sharding

MODE, FOLDER = sys.argv[1], Path(sys.argv[2])
RANK, WORLD_SIZE = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
launching = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("launching.py"))))
launching.shard_on_cpu(MODE)

FIGURES = ("loss", "kl", "bound", "gain", "grad_norm")


def make_rows(count, seed=0):
    """Prompts of 3 to 6 tokens and completions of 2 to 9."""
    generator = torch.Generator().manual_seed(seed)
    rows = {"input_ids": [], "labels": []}
    for _ in range(count):
        prompt, completion = (int(torch.randint(*span, (), generator=generator)) for span in ((3, 7), (2, 10)))
        ids = torch.randint(3, 61, (prompt + completion,), generator=generator).tolist()
        rows["input_ids"].append(ids)
        rows["labels"].append([-100] * prompt + ids[prompt:])
    return Dataset.from_dict(rows)


def make_model(**overrides):
    """Weights and gate are larger than a real model starts with, so that latents and distant tokens matter."""
    torch.manual_seed(0)
    settings = dict(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, sliding_window=4, num_latents=4,
        num_inference_steps=3, cross_attention_gate_init=0.5, initializer_range=0.3,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LTMForCausalLM(LTMConfig(**settings | overrides))


def make_trainer(name, model=None, rows=None, trainer_class=LTMTrainer, **arguments):
    """8 rows a micro-batch over all processes, two of them a step."""
    defaults = dict(
        output_dir=str(FOLDER / MODE / name),
        max_steps=4,
        per_device_train_batch_size=8 // WORLD_SIZE,
        per_device_eval_batch_size=4 // WORLD_SIZE,
        gradient_accumulation_steps=2,
        warmup_steps=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=MODE in ("single", "ddp"),
        disable_tqdm=True,
    )
    trainer = trainer_class(
        model or make_model(),
        LTMTrainingArguments(**defaults | arguments),
        train_dataset=make_rows(64) if rows is None else rows,
        eval_dataset=make_rows(7, seed=1),
    )
    if MODE == "zero3":  # shards a model of this size as one of many billions
        limits = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
        config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
        config["zero_optimization"] |= {f"stage3_{limit}": 0 for limit in limits}
    return trainer


def logs(trainer):
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: [float(entry[name]) for entry in entries] for name in FIGURES if name in entries[-1]}


def evaluations(trainer):
    names = ("loss", "nll", "kl", "no_latents", "gain", "from_prompt")
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    return {name: [entry[f"eval_{name}"] for entry in entries] for name in names}


def train(name, resume=None, **arguments):
    trainer = make_trainer(name, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def everywhere(found):
    """A list of what each process found."""
    if WORLD_SIZE == 1:
        return [found]
    lists = [None] * WORLD_SIZE
    torch.distributed.all_gather_object(lists, found)
    return lists


# ---------------------------------------------------------------- cases


def final():
    """With two evaluations on 7 rows, of which processes get unequal shares, and a saved model."""
    trainer = train("final", eval_strategy="steps", eval_steps=2)
    trainer.save_model()
    return logs(trainer) | {"evaluations": evaluations(trainer), "generated": generated(trainer.model)}


def generated(model):
    """Completions of four prompts, the first two of which end before the others: each process has a part of them."""
    rows, completions = make_rows(4, seed=2)["input_ids"], []
    model.eval()
    for index in range(RANK * 4 // WORLD_SIZE, (RANK + 1) * 4 // WORLD_SIZE):
        output = model.generate(torch.tensor([rows[index]]), max_new_tokens=3 if index < 2 else 9, do_sample=False)
        completions.append(output[0].tolist())
    return sum(everywhere(completions), [])


def resumed():
    """How far 2 + 2 steps are from 4: exactly nothing."""
    settings = dict(save_strategy="steps", save_steps=2, slow_gradient="trajectory")
    whole = logs(train("whole", **settings))
    continued = logs(train("resumed", resume=str(FOLDER / MODE / "whole" / "checkpoint-2"), **settings))
    return {name: max(abs(x - y) for x, y in zip(whole[name], continued[name], strict=True)) for name in FIGURES}


class Counted(LTMTrainer):
    """Notes how many passes the decoder learns from, of each micro-batch."""

    def _think(self, decoder, inputs):
        thoughts = super()._think(decoder, inputs)
        vars(self).setdefault("passes", []).append(len(thoughts))
        return thoughts


def tolerance():
    """A fast loop that stops early does so at one step on all processes, else the slow steps would not meet."""
    model = make_model(num_inference_steps=24, inference_tolerance=0.02)
    trainer = train("tolerance", model=model, trainer_class=Counted, slow_gradient="trajectory")
    return logs(trainer) | {"passes": everywhere(trainer.passes)}


# Rows of each 8 whose labels are changed, for training and evaluation. The second process trains on rows 4 to 7 of 8,
# and evaluates rows 2 and 3 of 4.
CHANGED = {"labels": ((4, 5, 6, 7), (2, 3)), "prompt": ((4, 5, 6, 7), (0, 1))}


def unequal(infer_from):
    """One process has nothing to explain in its micro-batch, or no prompt; the other has."""

    def change(rows, changed):
        labels = [
            row["labels"]
            if index % 8 not in changed
            else row["input_ids"]
            if infer_from == "prompt"
            else [-100] * len(row["labels"])
            for index, row in enumerate(rows)
        ]
        return Dataset.from_dict({"input_ids": rows["input_ids"], "labels": labels})

    train_changed, eval_changed = CHANGED[infer_from]
    train_rows, eval_rows = change(make_rows(64), train_changed), change(make_rows(7, seed=1), eval_changed)
    trainer = make_trainer(infer_from, rows=train_rows, infer_from=infer_from, train_sampling_strategy="sequential")
    trainer.eval_dataset = eval_rows
    trainer.train()
    trainer.evaluate()
    return logs(trainer) | {"evaluations": evaluations(trainer)}


class Typed(LTMTrainer):
    """Notes what latents and losses are computed in."""

    dtypes = set()

    def _think(self, decoder, inputs):
        thoughts = super()._think(decoder, inputs)
        self.dtypes |= {str(latents.dtype) for latents in thoughts}
        return thoughts

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.dtypes.add(str(loss.dtype))
        return loss


def bf16():
    trainer = train("bf16", trainer_class=Typed, bf16=True, gradient_checkpointing=True)
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    reduced_in = str(plugin.mixed_precision_policy.reduce_dtype) if plugin else None
    whole_batches = dict(per_device_train_batch_size=16 // WORLD_SIZE, gradient_accumulation_steps=1)
    never = train("bf16-never", bf16=True, gather_during_inference="never", **whole_batches)
    return logs(trainer) | {"dtypes": sorted(trainer.dtypes), "reduced_in": reduced_in, "never": logs(never)}


def settings(decoder):
    """What the fast loop must leave as it was."""
    found = [(p.requires_grad, p.ds_status.name, sorted(p.ds_active_sub_modules)) if hasattr(p, "ds_status")
             else p.requires_grad for p in decoder.parameters()]  # fmt: skip
    for module in sharding._fsdp_modules(decoder):
        found.append(module._get_fsdp_state()._auto_reshard_after_forward)
        for group in sharding._groups(module):
            found.append((group.reshard_after_backward, group.reduce_grads, group.all_reduce_grads))
            found.append(group.post_forward_mesh_info is None)
    return found


class Interrupted(LTMTrainer):
    """Each fast loop fails after a step, and is run again."""

    class Error(Exception): ...

    def _think(self, decoder, inputs):
        def failing(*args, callback, **kwargs):
            def fail(*_):
                raise self.Error

            return infer_posterior(*args, callback=fail, **kwargs)

        before, sums = settings(decoder), dict(self._sums)
        ltm_hf.training.trainer.infer_posterior = failing
        try:
            super()._think(decoder, inputs)
        except self.Error:
            self.errors = getattr(self, "errors", 0) + 1
        finally:
            ltm_hf.training.trainer.infer_posterior = infer_posterior
            self._sums.clear()
            self._sums.update(sums)
        self.same = getattr(self, "same", True) and settings(decoder) == before
        sharded = [hasattr(parameter, "device_mesh") for parameter in decoder.parameters()]
        self.same = self.same and (MODE != "fsdp2" or all(sharded))
        thoughts = super()._think(decoder, inputs)
        self.same = self.same and settings(decoder) == before
        return thoughts


def interrupted():
    trainer = train("interrupted", trainer_class=Interrupted)
    return logs(trainer) | {"errors": trainer.errors, "same": everywhere(trainer.same)}


def amortized():
    """An encoder, which runs outside of the forward that DDP wraps; where weights are sharded it is refused."""
    if MODE not in ("single", "ddp"):
        return None
    model = make_model(inference_method="amortized")
    return logs(train("amortized", model=model, kl_annealing_steps=2, learning_rate=1e-2))


def unrolled():
    """Gradients through inference, likewise; of one small step, since what rounding does to more of them grows."""
    if MODE not in ("single", "ddp"):
        return None
    model = make_model(latent_embedding_std=1.0, num_inference_steps=1, inference_learning_rate=0.05)
    return logs(train("unrolled", model=model, slow_gradient="unrolled", inference_start_ratio=0.3))


def online():
    if MODE not in ("single", "ddp"):
        return None
    model = make_model(
        num_key_value_heads=None,
        cross_attention_layers=[-1],
        cross_attention_keys="embeddings",
        cross_attention_rotary=False,
        cross_attention_value_projection=False,
        latent_embedding_std=1.0,
        inference_learning_rate=0.5,
    )
    return logs(train("online", model=model, slow_gradient="online", inference_start_ratio=0.3))


class CountsGathers(LTMTrainer):
    def _think(self, decoder, inputs):
        with launching.AllGathers() as counter:
            thoughts = super()._think(decoder, inputs)
        vars(self).setdefault("fast", []).append((counter.calls, counter.elements))
        return thoughts

    def compute_loss(self, *args, **kwargs):
        with launching.AllGathers() as counter:
            loss = super().compute_loss(*args, **kwargs)
        vars(self).setdefault("slow", []).append((counter.calls, counter.elements))
        return loss


def gathers():
    """All-gathers (calls, elements) of a fast loop of 3 steps and of the slow forward after it."""
    found = {"elements": sum(parameter.numel() for parameter in make_model().parameters())}
    for when in ("always", "never"):
        trainer = train(when, trainer_class=CountsGathers, gather_during_inference=when)
        found[when] = {"fast": trainer.fast[-2], "slow": trainer.slow[-2]}
    return found


CASES = {
    "final": final,
    "trajectory": lambda: logs(train("trajectory", slow_gradient="trajectory")),
    "never": lambda: logs(train("never", gather_during_inference="never")),
    "resumed": resumed,
    "tolerance": tolerance,
    "labels": lambda: unequal("labels"),
    "prompt": lambda: unequal("prompt"),
    "checkpointing": lambda: logs(train("checkpointing", gradient_checkpointing=True)),
    "bf16": bf16,
    "interrupted": interrupted,
    "amortized": amortized,
    "unrolled": unrolled,
    "online": online,
    "gathers": gathers,
}


def main():
    results = {name: CASES[name]() for name in sys.argv[3:] or CASES}
    results["world_size"] = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if RANK == 0:
        (FOLDER / f"{MODE}.json").write_text(json.dumps(results))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
