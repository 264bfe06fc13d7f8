"""A model pushed to the Hub with its tokenizer, code and card works where this package is not installed."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ltm_hf
from ltm_hf.data import train_tokenizer

HubStub = runpy.run_path(str(Path(__file__).with_name("hub_stub.py")))["HubStub"]

REPOSITORY = "someone/ltm-tiny"
PROMPTS = ["The people of the United States", "A treaty"]
CARD = "---\nlibrary_name: transformers\ntags: [ltm]\n---\n# Tiny thoughts"
AUTO_MAP = {
    "AutoConfig": "configuration_ltm.LTMConfig",
    "AutoModel": "decoder_ltm.LTMModel",
    "AutoModelForCausalLM": "modeling_ltm.LTMForCausalLM",
}

WRITE = """
import json, sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

def write(model, tokenizer):
    prompts = tokenizer(PROMPTS, padding=True, padding_side="left", return_tensors="pt")
    return model.generate(**prompts, max_new_tokens=10, min_new_tokens=10, do_sample=False).tolist()
"""

# Arguments: the folder to push, the repository.
OWNER = """
from huggingface_hub import upload_file
import ltm_hf

folder, repository = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
tokenizer.push_to_hub(repository)
# ModelCard.push_to_hub of some versions asks huggingface.co whether the card is valid, whatever the endpoint.
upload_file(path_or_fileobj=CARD.encode(), path_in_repo="README.md", repo_id=repository)
first = model.push_to_hub(repository, max_shard_size="20KB").oid
first_texts = write(model, tokenizer)
model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.roll(1, 0)
model.push_to_hub(repository, max_shard_size="20KB")
mine = [auto.from_pretrained(repository) for auto in (AutoConfig, AutoModel, AutoModelForCausalLM)]
print(json.dumps(dict(
    first=first,
    first_texts=first_texts,
    texts=write(model, tokenizer),
    texts_loaded=write(mine[-1], AutoTokenizer.from_pretrained(repository)),
    modules=[type(one).__module__ for one in mine],
)))
"""

# Arguments: a folder or repository, the folder to save it to again, and a revision to load beside the newest one.
STRANGER = """
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ltm_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
source, again, revision = sys.argv[1:]
remote = dict(trust_remote_code=True)
config = AutoConfig.from_pretrained(source, **remote)
base = AutoModel.from_pretrained(source, **remote)
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", low_cpu_mem_usage=True, **remote)
float32 = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **remote)
tokenizer = AutoTokenizer.from_pretrained(source, **remote)
old = AutoModelForCausalLM.from_pretrained(source, revision=revision, **remote) if revision else model
model.save_pretrained(again, max_shard_size="20KB")
tokenizer.save_pretrained(again)
print(json.dumps(dict(
    classes=[type(one).__name__ for one in (config, base, model)],
    modules=[type(one).__module__.split(".")[0] for one in (config, base, model)],
    dtypes=[str(one.dtype) for one in (base, model, float32)],
    steps=model.generation_config.num_inference_steps,
    texts=write(model, tokenizer),
    old_texts=write(old, tokenizer),
    installed="ltm_hf" in sys.modules,
)))
"""


def run(script, *arguments, home, **environment):
    """What a new process prints. It has its own cache, and of the Hub only the settings given."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "TRANSFORMERS_", "PYTHONPATH")) and not name.lower().endswith("_proxy")
    }
    environment |= {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HTTPS_PROXY": "http://127.0.0.1:9"}  # nobody answers there: no request leaves this machine
    script = f"PROMPTS, CARD = {PROMPTS!r}, {CARD!r}" + WRITE + script
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=home.parent,
        env=inherited | environment,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub():
    with HubStub() as stub:
        yield stub


@pytest.fixture(scope="module")
def owner(hub, place, make_model):
    """A process with the package pushes two versions of a model in bfloat16."""
    tokenizer = train_tokenizer(PROMPTS, 300)
    tokens = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model = make_model(vocab_size=len(tokenizer), **tokens).to(torch.bfloat16)
    model.generation_config.num_inference_steps = 3
    model.save_pretrained(place / "mine")
    tokenizer.save_pretrained(place / "mine")
    return run(
        OWNER, place / "mine", REPOSITORY, home=place / "owner", HF_ENDPOINT=hub.endpoint, HF_TOKEN="hf_dummy",
        PYTHONPATH=str(Path(ltm_hf.__file__).parents[1]),
    )  # fmt: skip


@pytest.fixture(scope="module")
def stranger(hub, owner, place):
    """A process without the package loads from the Hub and saves to a folder."""
    home = place / "stranger"
    return run(STRANGER, REPOSITORY, place / "again", owner["first"], home=home, HF_ENDPOINT=hub.endpoint)


def check_loaded(seen, owner):
    assert seen["classes"] == ["LTMConfig", "LTMModel", "LTMForCausalLM"]
    assert seen["modules"] == ["transformers_modules"] * 3 and not seen["installed"]
    assert seen["dtypes"] == ["torch.bfloat16", "torch.bfloat16", "torch.float32"]
    assert seen["steps"] == 3
    assert seen["texts"] == owner["texts"]


def check_shards(files):
    """`files`: the content of each file by its name."""
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    assert len(shards) > 1
    index = json.loads(files["model.safetensors.index.json"])
    assert sorted(set(index["weight_map"].values())) == shards


def test_push(hub, owner, travelling_files):
    files = hub.files(REPOSITORY)
    assert sorted(name for name in files if name.endswith(".py")) == travelling_files
    for name in travelling_files:
        assert files[name] == (Path(ltm_hf.__file__).parent / name).read_bytes()
    config = json.loads(files["config.json"])
    assert config["auto_map"] == AUTO_MAP and config["dtype"] == "bfloat16"
    assert json.loads(files["generation_config.json"])["num_inference_steps"] == 3
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(files)
    check_shards(files)
    card = files["README.md"].decode()  # the pushes that followed it have kept it
    assert "- ltm" in card and card.endswith("# Tiny thoughts")


def test_the_package_itself_loads_without_remote_code(owner):
    assert owner["modules"] == ["ltm_hf.configuration_ltm", "ltm_hf.decoder_ltm", "ltm_hf.modeling_ltm"]
    assert owner["texts_loaded"] == owner["texts"]


def test_loads_where_the_package_is_not_installed(owner, stranger):
    check_loaded(stranger, owner)


def test_loads_a_pinned_revision(owner, stranger):
    assert stranger["old_texts"] == owner["first_texts"] != owner["texts"]


def test_saved_again_it_needs_neither_package_nor_hub(hub, owner, stranger, place, travelling_files):
    files = {path.name: path.read_bytes() for path in (place / "again").iterdir()}
    assert {name: files[name] for name in files if name.endswith(".py")} == {
        name: hub.files(REPOSITORY)[name] for name in travelling_files
    }
    assert json.loads(files["config.json"])["auto_map"] == AUTO_MAP
    check_shards(files)
    seen = run(STRANGER, place / "again", place / "once more", "", home=place / "offline", HF_HUB_OFFLINE="1")
    check_loaded(seen, owner)
    assert sorted(path.name for path in (place / "once more").iterdir()) == sorted(files)
