import json
import multiprocessing
import runpy
from pathlib import Path

import pytest
import torch

from ltm_hf import LTMConfig, LTMForCausalLM
from ltm_hf.training import LTMTrainingArguments

SCRIPT = Path(__file__).with_name("run_to_kill.py")


READERS = {"paper": dict(latent_reader="paper", num_inference_steps=2, num_latents=4), "memory": dict(latent_chunk=2)}


@pytest.fixture(scope="session")
def make_model():
    """A tiny model in eval mode, of the paper's reader unless told otherwise; the same at each call.

    Weights, gate and reads are larger than a real model starts with, so that latents and distant tokens matter.
    """

    def make(reader="paper", **overrides):
        settings = dict(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, sliding_window=4, latent_gate_init=0.5,
            initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = LTMForCausalLM(LTMConfig(**settings | READERS[reader] | overrides)).eval()
        if model.config.has_memory:
            torch.nn.init.zeros_(model.model.reader.scales.log_read)
        return model

    return make


@pytest.fixture(params=READERS)
def reader(request):
    """Both, one after the other."""
    return request.param


@pytest.fixture
def make_arguments(tmp_path):
    """Training arguments: two steps on the CPU, each logged, nothing saved or shown, unless told otherwise by name."""

    def make(arguments_class=LTMTrainingArguments, folder="", **arguments):
        defaults = dict(
            output_dir=str(tmp_path / folder),
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            warmup_steps=0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        return arguments_class(**defaults | arguments)

    return make


@pytest.fixture(scope="session")
def start_run():
    """`run_to_kill.py` in a process of its own, forked from one that has imported what it needs."""

    def start(folder, **arguments):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ltm_hf.training", "ltm_hf.data"])
        code = {"argv": [str(SCRIPT), str(folder), json.dumps(arguments)]}
        process = context.Process(target=runpy.run_path, args=(str(SCRIPT), code, "__main__"))
        process.start()
        return process

    return start
