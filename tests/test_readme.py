"""README.md and the pages of docs/: their Python snippets run, in order, as a reader would paste them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


def snippets(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder that a first command leaves in outputs/, but for the training."""
    from ltm_hf import LTMForCausalLM, preset_config
    from ltm_hf.data import train_tokenizer

    folder = tmp_path_factory.mktemp("trained")
    tokenizer = train_tokenizer(["The people of the United States, and a treaty with Spain."], 300)
    tokens = dict(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    LTMForCausalLM(preset_config("ltm-tiny", **tokens)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if snippets(page)])
def test_snippets(trained, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "ltm-tiny").symlink_to(trained)
    namespace = {}
    for snippet in snippets(PAGES[name]):
        snippet = re.sub(r"max_steps=\d+, warmup_steps=\d+", "max_steps=1, warmup_steps=0", snippet)  # quick
        exec(compile(snippet, name, "exec"), namespace)


@pytest.mark.parametrize("name", PAGES)
def test_links(name):
    """What they point to in this repository is there."""
    links = re.findall(r"\]\((?!\w+:)([^)#\s]+)", PAGES[name].read_text())
    assert not [link for link in links if not (PAGES[name].parent / link).exists()]
