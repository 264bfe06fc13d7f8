import copy
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from datasets import Dataset, DatasetDict, IterableDatasetDict

from ltm_hf import LTMForCausalLM, preset_config
from ltm_hf.data import load_prepared, load_tokenizer, pack, prepare, shards
from ltm_hf.training import LTMTrainer, LTMTrainingArguments


def corpus_of(count, seed=0):
    choose = random.Random(seed)
    words = "the cat sat on mat and dog log é 你".split()
    texts = [" ".join(choose.choices(words, k=choose.randrange(2, 61))) for _ in range(count)]
    return DatasetDict(train=Dataset.from_dict({"text": texts[5:]}), validation=Dataset.from_dict({"text": texts[:5]}))


def bytes_of(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def corpus():
    return corpus_of(45)


@pytest.fixture
def folder(tmp_path, corpus, tokenizer):
    """40 training documents in shards of 15, 5 for validation."""
    prepare(corpus, tokenizer, 16, tmp_path / "data", source="cats", documents_per_shard=15)
    return tmp_path / "data"


def test_blocks_are_those_of_pack(folder, corpus, tokenizer):
    blocks = load_prepared(folder)
    parts = [pack(corpus["train"].select(range(*ends)), tokenizer, 16) for ends in ((0, 15), (15, 30), (30, 40))]
    assert list(blocks["train"]["input_ids"]) == [block for part in parts for block in part["input_ids"]]
    assert list(blocks["validation"]["input_ids"]) == list(pack(corpus["validation"], tokenizer, 16)["input_ids"])
    again = load_tokenizer(folder / "tokenizer")
    assert again(corpus["train"]["text"][0]).input_ids == tokenizer(corpus["train"]["text"][0]).input_ids


def test_blocks_are_mapped_and_two_bytes_a_token(folder, corpus, tokenizer, monkeypatch):
    blocks = load_prepared(folder)["train"]
    assert blocks.features["input_ids"].feature.dtype == "uint16"
    assert [os.path.basename(file["filename"]) for file in blocks.cache_files] == sorted(
        path.name for path in folder.glob("train-*.arrow")
    )
    assert sum(path.stat().st_size for path in folder.glob("train-*")) < 2 * 16 * len(blocks) + 3 * 4096
    monkeypatch.setattr(type(tokenizer), "__len__", lambda self: 2**16 + 1)
    wide = prepare(corpus, tokenizer, 16, folder.parent / "wide")["train"]
    assert wide.features["input_ids"].feature.dtype == "uint32"


def test_the_index_says_what_it_is(folder, tokenizer):
    index = json.loads((folder / "index.json").read_text())
    assert (index["source"], index["block_size"], index["dtype"]) == ("cats", 16, "uint16")
    assert index["tokenizer"]["vocab_size"] == len(tokenizer)
    assert [split["documents"] for split in index["splits"].values()] == [40, 5]
    assert [index["shards"][f"train-0000{i}-of-00003.arrow"]["documents"] for i in range(3)] == [15, 15, 10]
    for name, facts in index["shards"].items():
        assert facts["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_the_same_bytes_from_any_number_of_processes(tmp_path, folder, corpus, tokenizer):
    prepare(corpus, tokenizer, 16, tmp_path / "two", source="cats", documents_per_shard=15, num_proc=2)
    assert bytes_of(tmp_path / "two") == bytes_of(folder)


KILLED = """
import random, sys
sys.path.insert(0, sys.argv[1])
from test_shards import corpus_of
from ltm_hf.data import load_tokenizer, prepare
prepare(corpus_of(205), load_tokenizer(sys.argv[2]), 16, sys.argv[3], documents_per_shard=2)
"""


def test_goes_on_after_a_kill(tmp_path, tokenizer, monkeypatch):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = tmp_path / "data"
    arguments = [os.path.dirname(__file__), tmp_path / "tokenizer", data]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *map(str, arguments)], stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(data.glob("*.arrow"))) < 5:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    index = json.loads((data / "index.json").read_text())
    kept = index["shards"]
    kept.popitem()  # as if killed between the renaming and the entry
    (data / "index.json").write_text(json.dumps(index))
    assert 3 <= len(kept) < 100 and all((data / name).is_file() for name in kept)
    with pytest.raises(ValueError, match=r"is not finished: \d+ of 103 shards are missing"):
        load_prepared(data)

    times, made = {name: (data / name).stat().st_mtime_ns for name in kept}, []
    make = shards._make
    monkeypatch.setattr(shards, "_make", lambda path, *others: made.append(path.name) or make(path, *others))
    whole = [corpus_of(205), load_tokenizer(tmp_path / "tokenizer"), 16]
    prepare(*whole, data, documents_per_shard=2)
    assert not set(made) & set(kept) and len(made) + len(kept) == 103
    assert {name: (data / name).stat().st_mtime_ns for name in kept} == times
    prepare(*whole, tmp_path / "at once", documents_per_shard=2)
    assert bytes_of(data) == bytes_of(tmp_path / "at once")  # and no .part is left


def test_broken_shards_are_named_and_made_again(folder, corpus, tokenizer):
    shard, before = folder / "train-00001-of-00003.arrow", bytes_of(folder)
    whole = shard.read_bytes()

    shard.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="train-00001-of-00003.arrow' is torn: "):
        load_prepared(folder, verify=False)
    shard.write_bytes(whole[:-600] + bytes([whole[-600] ^ 1]) + whole[-599:])
    with pytest.raises(ValueError, match="train-00001-of-00003.arrow' is altered"):
        load_prepared(folder)
    (folder / "tokenizer/tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer_config.json' is altered"):
        load_prepared(folder, verify=False)
    shard.unlink()
    with pytest.raises(ValueError, match="train-00001-of-00003.arrow' is missing"):
        load_prepared(folder)
    prepare(corpus, tokenizer, 16, folder, source="cats", documents_per_shard=15)
    assert bytes_of(folder) == before


def test_bad_input_is_named(tmp_path, folder, corpus, tokenizer):
    with pytest.raises(FileNotFoundError, match="no prepared data .index.json. in '.*nowhere'"):
        load_prepared(tmp_path / "nowhere")
    same = dict(source="cats", documents_per_shard=15)
    with pytest.raises(ValueError, match="made from another block_size: name another folder"):
        prepare(corpus, tokenizer, 17, folder, **same)
    with pytest.raises(ValueError, match="made from another splits"):
        prepare(corpus_of(45, seed=1), tokenizer, 16, folder, **same)
    with pytest.raises(ValueError, match="num_proc must be an integer of 1 or more, got 0"):
        prepare(corpus, tokenizer, 16, folder, num_proc=0, **same)
    with pytest.raises(ValueError, match="train has 2773 tokens, too few for one block of 4000"):
        prepare(corpus, tokenizer, 4000, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="is not empty and holds no prepared data"):
        prepare(corpus, tokenizer, 16, tmp_path / "mine")
    with pytest.raises(ValueError, match="letter.txt' is a file: name a folder"):
        prepare(corpus, tokenizer, 16, tmp_path / "mine/letter.txt")
    for splits, message in (
        (DatasetDict({"../x": corpus["train"]}), "'../x' cannot name files"),
        (IterableDatasetDict(train=corpus["train"].to_iterable_dataset()), "The train is a stream"),
        (DatasetDict(), "There is no split to prepare"),
        (DatasetDict(train=Dataset.from_dict({"body": ["a"]})), "in a column 'text', which there is not: only body"),
        (
            DatasetDict(train=Dataset.from_dict({"text": ["a"] * 99})),
            "No shard of the train, 9 documents, fills a block",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(splits, tokenizer, 32, tmp_path / "new", documents_per_shard=9)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: setattr(tokenizer, "eos_token", "<|im_end|>"),
        lambda tokenizer: setattr(tokenizer, "bos_token", "<|im_end|>"),
        lambda tokenizer: tokenizer.add_tokens(["sat"]),
    ],
)
def test_shards_of_other_special_tokens_do_not_mix(tmp_path, corpus, tokenizer, change):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    arguments = (corpus, tokenizer, 16, tmp_path / "data")
    prepare(*arguments, documents_per_shard=15)
    before = bytes_of(tmp_path / "data")
    tokenizer("cat", truncation=True, max_length=1)  # a state that a call leaves behind
    prepare(*arguments, documents_per_shard=15)
    change(tokenizer)
    with pytest.raises(ValueError, match="made from another .*tokenizer: name another folder"):
        prepare(*arguments, documents_per_shard=15)
    assert bytes_of(tmp_path / "data") == before


def test_nothing_is_written_into_a_folder_that_is_read(folder):
    """`datasets` keeps what it makes of a file beside it; where the folder is read-only, that fails."""
    before = bytes_of(folder)
    blocks = load_prepared(folder)["train"]
    for some in (blocks, blocks.shuffle(seed=0)):
        rows = some.map(lambda row: {"length": len(row["input_ids"])})
        rows.filter(lambda row: row["length"]).sort("length").train_test_split(2, seed=0)
    assert bytes_of(folder) == before
    assert load_prepared(folder)["train"][0] == blocks[0]  # by the same links


def entry(**changes):
    return {"documents": 40, "blocks": 1, "bytes": 1, "sha256": ""} | changes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "its format is not 2"),
        ({"block_size": 1}, "block_size, documents_per_shard and dtype"),
        ({"documents_per_shard": 0}, "block_size, documents_per_shard and dtype"),
        ({"documents_per_shard": "9"}, "block_size, documents_per_shard and dtype"),
        ({"dtype": "object"}, "block_size, documents_per_shard and dtype"),
        ({"splits": {}}, "splits must have their documents"),
        ({"splits": [1]}, "splits must have names, without folders"),
        ({"splits": {"../../x": {"documents": 1}}}, "splits must have names, without folders"),
        ({"splits": {"train": {"documents": -1}}}, "splits must have their documents"),
        ({"splits": {"train": {"documents": 10**15}}}, "is not finished: 66666666666663 of 66666666666667 shards"),
        ({"shards": None}, "shards must have names"),
        ({"shards": {"../../etc/passwd": entry()}}, "shards must have names, without folders"),
        ({"shards": {"train-00000-of-00001.arrow": entry(bytes="1")}}, "shards must have their documents, blocks"),
        ({"tokenizer_files": {"../index.json": ""}}, "tokenizer_files must have names"),
        ({"tokenizer_files": {"vocab.txt": ""}}, "tokenizer.vocab.txt' is missing"),
        ({"block_size": 15}, "is altered: it holds [0-9]+ rows of input_ids"),
    ],
)
def test_an_index_that_says_something_else_is_refused(folder, change, message):
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | change))
    with pytest.raises(ValueError, match=message):
        load_prepared(folder)


@pytest.mark.parametrize("content", [b'{"splits"', b"[]", b"null", b"\xff\xfe", b"[" * 9999])
def test_an_index_that_is_none_is_refused(folder, corpus, tokenizer, content):
    (folder / "index.json").write_bytes(content)
    for work in (lambda: load_prepared(folder), lambda: prepare(corpus, tokenizer, 16, folder)):
        with pytest.raises(ValueError, match="index.json' is no.*Prepare the data"):
            work()


def test_the_trainer_takes_it(tmp_path, folder, tokenizer):
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_latents=2)
    model = LTMForCausalLM(preset_config("ltm-tiny", vocab_size=len(tokenizer), max_position_embeddings=16, **sizes))
    arguments = LTMTrainingArguments(
        str(tmp_path / "out"), max_steps=2, use_cpu=True, report_to="none", dataloader_num_workers=1
    )
    trainer = LTMTrainer(model, arguments, train_dataset=load_prepared(folder)["train"])
    assert trainer.train().global_step == 2
