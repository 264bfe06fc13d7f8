"""A saved folder works where this package is not installed: the model's code travels with it."""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch

from ltm_hf import LTMForCausalLM, LTMModel

STRANGER = r"""
import json, shutil, sys
from pathlib import Path

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ltm_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

folder, again = sys.argv[1:]
remote = dict(trust_remote_code=True)
prompts = torch.tensor(json.loads(sys.stdin.read()))
config = AutoConfig.from_pretrained(folder, **remote)
base = AutoModel.from_pretrained(folder, **remote)
model = AutoModelForCausalLM.from_pretrained(folder, **remote)
settings = dict(max_new_tokens=10, min_new_tokens=10, do_sample=False)
texts = model.generate(prompts, **settings).tolist()
latents = model.sample_prior(len(prompts), seed=0)
states = base(prompts, latents=latents).last_hidden_state
model.save_pretrained(again)
reloaded = AutoModelForCausalLM.from_pretrained(again, **remote)

# Another run's folder of the same name, and after it the first one edited: each has its own code.
other = Path(again).parent / "other" / Path(folder).name
codes = []
for file, line in (
    ("modeling_ltm.py", "class LTMForCausalLM("), ("generation_ltm.py", "class LTMGenerationMixin("),
    ("posterior_ltm.py", "def sample_prior("),
):
    shutil.copytree(folder, other, dirs_exist_ok=True)
    source = (other / file).read_text()
    assert line in source
    (other / file).write_text(source.replace(line, f"EDITED = {file!r}\n\n\n{line}", 1))
    theirs = AutoModelForCausalLM.from_pretrained(other, **remote)
    theirs.save_pretrained(other.parent / "saved")
    codes.append([
        getattr(sys.modules[type(theirs).__module__.replace("modeling_ltm", file[:-3])], "EDITED", None) == file,
        "EDITED" in (other.parent / "saved" / file).read_text(),
    ])

print(json.dumps(dict(
    classes=[type(x).__name__ for x in (config, base, model)],
    modules=[type(x).__module__.split(".")[0] for x in (config, base, model)],
    texts=texts,
    texts_again=reloaded.generate(prompts, **settings).tolist(),
    texts_uncached=model.generate(prompts, use_cache=False, **settings).tolist(),
    codes=codes,
    steps=model.generation_config.num_inference_steps,
    posterior=model.infer_posterior(prompts).mean.sum().item(),
    states=states.sum().item(),
    installed="ltm_hf" in sys.modules,
)))
"""


@pytest.fixture
def folder(model, tmp_path):
    model.generation_config.num_inference_steps = 3
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_loads_where_the_package_is_not_installed(model, ids, folder, tmp_path, travelling_files):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", STRANGER, str(folder), str(tmp_path / "again")],
        input=json.dumps(ids.tolist()),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])
    assert seen["classes"] == ["LTMConfig", "LTMModel", "LTMForCausalLM"]
    assert seen["modules"] == ["transformers_modules"] * 3 and not seen["installed"]
    assert seen["steps"] == 3
    texts = model.generate(ids, max_new_tokens=10, min_new_tokens=10, do_sample=False).tolist()
    assert seen["texts"] == texts and seen["texts_again"] == texts and seen["texts_uncached"] == texts
    assert seen["codes"] == [[True, True]] * 3
    assert seen["posterior"] == pytest.approx(model.infer_posterior(ids).mean.sum().item(), rel=1e-5)
    with torch.no_grad():
        states = model.model(ids, latents=model.sample_prior(3, seed=0)).last_hidden_state
    assert seen["states"] == pytest.approx(states.sum().item(), abs=1e-3)
    assert sorted(path.name for path in (tmp_path / "again").glob("*.py")) == travelling_files


def test_files_and_their_imports(folder, travelling_files):
    assert sorted(path.name for path in folder.glob("*.py")) == travelling_files
    for name in travelling_files:
        for node in ast.walk(ast.parse((folder / name).read_text())):
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] != "ltm_hf" for alias in node.names), name
            elif isinstance(node, ast.ImportFrom) and node.level:
                # Anything else is not copied, or fails where it is loaded.
                assert node.level == 1 and node.module and f"{node.module}.py" in travelling_files, name
            elif isinstance(node, ast.ImportFrom):
                # safetensors and huggingface_hub are transformers' own requirements.
                assert node.module.split(".")[0] in {
                    "collections", "contextlib", "dataclasses", "functools", "numbers", "os", "types", "typing",
                    "huggingface_hub", "safetensors", "torch", "transformers",
                }, name  # fmt: skip


@pytest.mark.parametrize("model_class", [LTMModel, LTMForCausalLM])
def test_every_saved_class_loads_through_every_auto_class(make_model, tmp_path, model_class, travelling_files):
    make_model(model_class).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.py")) == travelling_files
    assert set(json.loads((tmp_path / "config.json").read_text())["auto_map"]) == {
        "AutoConfig", "AutoModel", "AutoModelForCausalLM",
    }  # fmt: skip
