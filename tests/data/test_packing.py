import copy
import random

import pytest
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from ltm_hf.data import collate_blocks, document_blocks, load_corpus, pack, train_tokenizer
from ltm_hf.data.packing import DOCUMENTS_AT_A_TIME


def corpus_of(texts):
    return Dataset.from_dict({"text": texts})


def stream_of(texts, tokenizer):
    """The tokens that the blocks must hold, begin-of-text aside."""
    return [i for t in texts for i in [*tokenizer(t, add_special_tokens=False).input_ids, tokenizer.eos_token_id]]


@pytest.fixture
def texts():
    """Documents of 0 to 60 words, enough for several batches."""
    choose = random.Random(0)
    words = "the cat sat on mat and dog log é 你".split()
    return [" ".join(choose.choices(words, k=choose.randrange(61))) for _ in range(3 * DOCUMENTS_AT_A_TIME + 7)]


def test_every_position():
    """Bytes for tokens, so that all can be counted by hand."""
    tokenizer = train_tokenizer([], 258)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    a, b, c = (tokenizer.convert_tokens_to_ids(letter) for letter in "abc")
    blocks = pack(corpus_of(["aa", "b", "", "cccc", "a"]), tokenizer, 4)
    assert blocks.column_names == ["input_ids"]
    assert list(blocks["input_ids"]) == [
        [begin, a, a, end],
        [begin, b, end, end],
        [begin, c, c, c],
        [begin, c, end, a],
    ]  # and the last end-of-text fills no block


def test_blocks_of_one_document_each():
    """The end of each document that fills no block is dropped, and with it a whole document that is too short."""
    tokenizer = train_tokenizer([], 258)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    a, b, c = (tokenizer.convert_tokens_to_ids(letter) for letter in "abc")
    documents = corpus_of(["aab", "b", "", "cccca", "aa"])
    wanted = [[begin, a, a, b], [begin, c, c, c], [begin, c, a, end], [begin, a, a, end]]
    assert list(pack(documents, tokenizer, 4, join=False)["input_ids"]) == wanted
    stream = pack(documents.to_iterable_dataset(num_shards=2), tokenizer, 4, num_shards=2, join=False)
    assert [row["input_ids"] for row in stream] == wanted
    with pytest.raises(ValueError, match="No document of the corpus fills a block of 9 tokens"):
        pack(documents, tokenizer, 9, join=False)


def test_special_tokens_in_a_text_are_text(tokenizer):
    """Ends and beginnings stand where documents have them; the text is what it was, bytes and all."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    texts = ["GPT ends with <|endoftext|>", "<|beginoftext|><|im_end|> é", "plain"]
    for documents in (corpus_of(texts), corpus_of(texts).to_iterable_dataset()):
        ids = [i for row in pack(documents, tokenizer, 2) for i in row["input_ids"][1:]]
        assert [i for i in ids if i in tokenizer.all_special_ids] == [tokenizer.eos_token_id] * 3
        assert tokenizer.decode(ids).split("<|endoftext|>plain<|endoftext|>")[0] == "<|endoftext|>".join(texts[:2])
    rows = document_blocks(texts, tokenizer, 6)
    for number, text in enumerate(texts):
        own = [row for row in rows if row["document"] == number]
        ids = [i for row in own for i in row["input_ids"][1:]]
        assert not set(ids) & set(tokenizer.all_special_ids) and tokenizer.decode(ids) == text
        assert sum(sum(row["token_bytes"]) for row in own) == len(text.encode())


def test_a_tokenizer_that_makes_special_tokens_of_letters_is_refused():
    """As some of sentencepiece do, whose vocabulary holds these names like any word."""
    model = models.Unigram([("<s>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((letter, -5.0) for letter in " </s>ab")], 2)
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **names)
    assert len(pack(corpus_of(["a b a"]), unigram, 4)) == 2
    with pytest.raises(ValueError, match="cannot tell '</s>' in a text from its special token of that name"):
        pack(corpus_of(["a </s> b"]), unigram, 4)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"content": ["a"] * 9}, "in a column 'text', which there is not: only content"),
        ({"text": ["a b c"] * 99 + [None]}, "The text of document 99 must be a string, not None"),
        ({"text": [3, 4]}, "The text of document 0 must be a string, not 3"),
    ],
)
def test_other_rows_are_named(tokenizer, column, message):
    for documents in (Dataset.from_dict(column), Dataset.from_dict(column).to_iterable_dataset()):
        with pytest.raises(ValueError, match=message):
            list(pack(documents, tokenizer, 4))


@pytest.mark.parametrize("block_size", [2, 5, 64, 1000])
def test_no_token_is_lost_or_doubled(texts, tokenizer, block_size):
    blocks = list(pack(corpus_of(texts), tokenizer, block_size)["input_ids"])
    wanted = stream_of(texts, tokenizer)
    assert {len(block) for block in blocks} == {block_size}
    assert {block[0] for block in blocks} == {tokenizer.bos_token_id}
    assert len(blocks) == len(wanted) // (block_size - 1)
    assert [token for block in blocks for token in block[1:]] == wanted[: len(blocks) * (block_size - 1)]


def test_a_stream_gives_the_same_blocks(texts, tokenizer):
    documents = corpus_of(texts)
    stream = pack(documents.to_iterable_dataset(num_shards=3), tokenizer, 32)
    assert isinstance(stream, IterableDataset) and stream.column_names == ["input_ids"]
    first, again = list(stream), list(stream)
    assert first == again == list(pack(documents, tokenizer, 32))


def test_a_stream_in_several_workers_gives_every_block_once(texts, tokenizer):
    stream = pack(corpus_of(texts).to_iterable_dataset(num_shards=3), tokenizer, 32)
    assert list(DataLoader(stream, batch_size=None, num_workers=2)) == list(stream)


def test_each_split_is_packed_by_itself(texts, tokenizer):
    splits = {"train": corpus_of(texts[:50]), "validation": corpus_of(texts[50:90])}
    streams = IterableDatasetDict({name: split.to_iterable_dataset() for name, split in splits.items()})
    packed, packed_streams = pack(DatasetDict(splits), tokenizer, 16), pack(streams, tokenizer, 16)
    assert isinstance(packed, DatasetDict) and isinstance(packed_streams, IterableDatasetDict)
    for name, split in splits.items():
        assert list(packed[name]) == list(packed_streams[name]) == list(pack(split, tokenizer, 16))


def test_blocks_are_cached(texts, tokenizer):
    first, again = (pack(corpus_of(texts), tokenizer, 16) for _ in range(2))
    assert first.cache_files == again.cache_files != []
    assert pack(corpus_of(texts[1:]), tokenizer, 16).cache_files != first.cache_files
    assert pack(corpus_of(texts), tokenizer, 17).cache_files != first.cache_files


def test_bad_input_is_named(tokenizer):
    documents = corpus_of(["a", "b"])
    assert len(pack(documents, tokenizer, 5)) == 1
    for kind in (documents, documents.to_iterable_dataset()):
        with pytest.raises(ValueError, match="The corpus has 4 tokens, too few for one block of 6"):
            pack(kind, tokenizer, 6)
    with pytest.raises(ValueError, match="The validation has 0 tokens"):
        pack(DatasetDict(train=documents, validation=corpus_of([])), tokenizer, 5)
    with pytest.raises(ValueError, match="block_size must be an integer of 2 or more, got 1"):
        pack(documents, tokenizer, 1)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    with pytest.raises(ValueError, match="load_tokenizer"):
        pack(documents, bare, 5)


def test_rows_of_equal_length_need_no_mask():
    batch = collate_blocks([{"input_ids": [5, 6]}, {"input_ids": [7, 8]}])
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[5, 6], [7, 8]]


def test_rows_of_several_lengths_are_padded():
    batch = collate_blocks([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9]}])
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, 9, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["input_ids"][1, :2].tolist() == [8, 9]


def test_real_text():
    corpus = load_corpus()
    part = corpus["validation"]
    tokenizer = train_tokenizer(part["text"], 512)
    blocks = pack(part, tokenizer, 256)
    tokens = sum((block[1:] for block in blocks["input_ids"]), [])
    whole = "<|endoftext|>".join(part["text"])
    text = tokenizer.decode(tokens)
    assert whole.startswith(text.rstrip("\ufffd")) and len(whole) - len(text) < 256 * 16


# ------------------------------------------------------------------ streams in several parts


@pytest.fixture
def pairs():
    """A tokenizer of bytes, and 120 documents of two letters in 6 parts, each of which fills a block of 4 tokens."""
    letters = "abcdefghijkl"
    documents = [a + b for a in letters for b in letters[:10]]
    return train_tokenizer([], 258), documents, corpus_of(documents).to_iterable_dataset(num_shards=6)


def documents_of(batches, tokenizer):
    return [tokenizer.decode(block[1:3]) for batch in batches for block in batch["input_ids"].tolist()]


def loaded(stream, rank, epoch=0, processes=2, workers=2):
    """What the loader of a Trainer gives to a process: accelerate shares out the parts, `datasets` among workers."""
    loader = DataLoader(stream, batch_size=4, num_workers=workers, collate_fn=collate_blocks)
    loader = prepare_data_loader(loader, num_processes=processes, process_index=rank, dispatch_batches=False)
    loader.set_epoch(epoch)
    return list(loader)


@pytest.mark.parametrize("num_shards", [4, 6, 5, 1])
def test_every_document_once_in_all_processes_and_workers(pairs, num_shards):
    """1: fewer parts than processes, and each reads all and keeps its share."""
    tokenizer, documents, stream = pairs
    shuffled = pack(stream, tokenizer, 4, num_shards).shuffle(seed=3, buffer_size=16)
    orders = []
    for epoch in (0, 1):
        first, again = ([documents_of(loaded(shuffled, rank, epoch), tokenizer) for rank in (0, 1)] for _ in range(2))
        assert first == again
        assert sorted(first[0] + first[1]) == sorted(documents)
        orders.append(first)
    assert orders[0] != orders[1] and orders[0][0] != sorted(orders[0][0])


def test_blocks_do_not_depend_on_who_makes_them(texts, tokenizer):
    stream = pack(corpus_of(texts).to_iterable_dataset(num_shards=8), tokenizer, 32, num_shards=4)
    alone = sorted(map(tuple, (row["input_ids"] for row in stream)))
    for processes, workers in ((2, 2), (4, 1)):
        batches = [loaded(stream, rank, processes=processes, workers=workers) for rank in range(processes)]
        rows = [tuple(row) for rank in batches for batch in rank for row in batch["input_ids"].tolist()]
        assert sorted(rows) == alone
    whole = len(stream_of(texts, tokenizer)) // 31
    assert whole - 4 <= len(alone) <= whole  # an end of each part is dropped


def test_a_stream_goes_on_where_it_was(texts, tokenizer):
    stream = pack(corpus_of(texts).to_iterable_dataset(num_shards=3), tokenizer, 32, num_shards=3)
    rows, seen = list(stream), []
    for row in stream:
        seen.append(row)
        if len(seen) == len(rows) // 2:
            state = stream.state_dict()
            break
    again = pack(corpus_of(texts).to_iterable_dataset(num_shards=3), tokenizer, 32, num_shards=3)
    again.load_state_dict(state)
    assert seen + list(again) == rows


@pytest.mark.parametrize("num_shards", [0, 7])
def test_a_bad_number_of_parts_is_named(pairs, num_shards):
    tokenizer, _, stream = pairs
    with pytest.raises(ValueError, match=f"between 1 and the 6 parts of the stream corpus, not {num_shards}"):
        pack(stream, tokenizer, 4, num_shards)
