"""What the tests of research share: tiny models, checkpoints of them, and commands run in this process."""

import importlib
import json
import sys

import pytest
import torch

from ltm_hf import LTMConfig, LTMForCausalLM
from ltm_hf.data import train_tokenizer

torch.set_num_threads(1)  # models are tiny, and more threads only wait for each other

TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, sliding_window=8)
READERS = {
    "memory": dict(num_latents=6),
    "paper": dict(latent_reader="paper", num_latents=4, latent_gate_init=0.5, num_inference_steps=2),
}


@pytest.fixture(scope="session")
def texts():
    """60 documents of 60 letters, of which the second half has those of the first."""
    generator = torch.Generator().manual_seed(0)
    draws = (
        torch.randint(26, (4,), generator=generator)[torch.randint(4, (60,), generator=generator)] for _ in "x" * 60
    )
    return ["".join(chr(97 + letter) for letter in drawn) for drawn in draws]


@pytest.fixture(scope="session")
def corpus(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "letters.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def checkpoint(texts, tmp_path_factory):
    """The folder of a model of a reader, with its tokenizer. Weights are large, so that latents matter."""
    tokenizer = train_tokenizer(texts, 258)
    facts = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    folders = {}

    def checkpoint(reader, **overrides):
        key = reader, *overrides.items()
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("models") / reader
            given = TINY | READERS[reader] | facts | overrides
            config = LTMConfig(vocab_size=258, max_position_embeddings=32, initializer_range=0.2, **given)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                LTMForCausalLM(config).save_pretrained(folders[key])
            tokenizer.save_pretrained(folders[key])
        return folders[key]

    return checkpoint


@pytest.fixture
def run(monkeypatch, capsys):
    """What `python -m research.NAME ARGUMENTS` prints, run here; torch's threads are what they were afterwards."""
    threads = torch.get_num_threads()

    def run(name, *arguments):
        module = importlib.import_module(f"research.{name}")
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def refused(run, capsys):
    """The sentence in which a command ends that cannot work."""

    def refused(*arguments):
        with pytest.raises(SystemExit) as stopped:
            run(*arguments)
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return refused
