from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ltm_hf.data import load_tokenizer, train_tokenizer

GPT2 = Path(__file__).resolve().parents[3] / "shared/data/gpt2_tokenizer"


def same(a, b, texts):
    """Whether two tokenizers agree on all that this library uses."""
    return (
        [a(text).input_ids for text in texts] == [b(text).input_ids for text in texts]
        and [a.decode(a(text).input_ids) for text in texts] == [b.decode(b(text).input_ids) for text in texts]
        and a("one", "two").input_ids == b("one", "two").input_ids
        and a("x", add_special_tokens=False).input_ids == b("x", add_special_tokens=False).input_ids
        and (len(a), a.bos_token_id, a.eos_token_id, a.pad_token_id, a.model_max_length)
        == (len(b), b.bos_token_id, b.eos_token_id, b.pad_token_id, b.model_max_length)
    )


def test_trained_vocabulary(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == 270
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|endoftext|>", "<|beginoftext|>")
    assert tokenizer.pad_token == tokenizer.eos_token
    assert len({tokenizer.eos_token_id, tokenizer.bos_token_id}) == 2
    assert len(tokenizer(" the", add_special_tokens=False).input_ids) == 1  # the commonest word is one token
    assert tokenizer("<|endoftext|>", add_special_tokens=False).input_ids == [tokenizer.eos_token_id]


def test_trained_tokenizer_is_without_loss(tokenizer, odd_texts):
    for text in [*odd_texts, "".join(map(chr, range(0x300)))]:
        plain = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(plain) == text
        assert tokenizer(text).input_ids == [tokenizer.bos_token_id, *plain]
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_training_is_deterministic(odd_texts):
    first, again = (train_tokenizer(iter(odd_texts * 3), 270) for _ in range(2))
    assert first.get_vocab() == again.get_vocab()
    assert first.backend_tokenizer.to_str() == again.backend_tokenizer.to_str()


def test_trained_tokenizer_is_saved_whole(tmp_path, tokenizer, odd_texts):
    tokenizer.save_pretrained(tmp_path)
    assert same(tokenizer, AutoTokenizer.from_pretrained(tmp_path), odd_texts)
    assert same(tokenizer, load_tokenizer(tmp_path), odd_texts)

    limited = train_tokenizer(odd_texts, 258, model_max_length=64)
    limited.save_pretrained(tmp_path / "limited")
    assert AutoTokenizer.from_pretrained(tmp_path / "limited").model_max_length == 64


def test_padding_on_the_left_is_saved(tmp_path, tokenizer):
    """A decoder continues the end of its input."""
    tokenizer.save_pretrained(tmp_path / "trained")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>").save_pretrained(
        tmp_path / "other"
    )
    load_tokenizer(tmp_path / "other").save_pretrained(tmp_path / "loaded")
    for folder, side in (("trained", "left"), ("other", "right"), ("loaded", "left")):
        assert AutoTokenizer.from_pretrained(tmp_path / folder).padding_side == side


def test_vocabulary_must_hold_the_bytes():
    assert len(train_tokenizer(["aaaa"] * 9, 258)) == 258
    with pytest.raises(ValueError, match="vocab_size must be an integer of 258 or more, got 257"):
        train_tokenizer(["aaaa"], 257)


def save_toy(folder, **special_tokens):
    words = ["<s>", "</s>", "<pad>", "hello"]
    toy = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="</s>"))
    PreTrainedTokenizerFast(tokenizer_object=toy, **special_tokens).save_pretrained(folder)
    return folder


def test_distinct_tokens_are_kept(tmp_path):
    """As in Llama: only the padding is missing."""
    folder = save_toy(tmp_path, bos_token="<s>", eos_token="</s>", add_bos_token=True)
    before, loaded = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert len(loaded) == len(before) == 4
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<s>", "</s>", "</s>")
    assert loaded("hello").input_ids == before("hello").input_ids == [0, 3]


def test_begin_of_text_and_padding_are_added_only_where_missing(tmp_path):
    loaded = load_tokenizer(save_toy(tmp_path / "a", eos_token="</s>", pad_token="<pad>"))
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<|beginoftext|>", "</s>", "<pad>")
    assert loaded("hello").input_ids == [4, 3]
    with pytest.raises(ValueError, match="no end-of-text token"):
        load_tokenizer(save_toy(tmp_path / "b", bos_token="<s>"))


@pytest.mark.skipif(not GPT2.is_dir(), reason="needs GPT-2's tokenizer")
def test_gpt2(tmp_path, odd_texts):
    tokenizer = load_tokenizer(GPT2)
    assert len(tokenizer) == 50258
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (50257, 50256, 50256)
    assert tokenizer("Hello world").input_ids == [50257, 15496, 995]
    assert tokenizer("Hello world", add_special_tokens=False).input_ids == [15496, 995]
    for text in odd_texts:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    tokenizer.save_pretrained(tmp_path)
    assert same(tokenizer, AutoTokenizer.from_pretrained(tmp_path), odd_texts)
    assert same(tokenizer, load_tokenizer(tmp_path), odd_texts)  # a second time adds nothing
