import pytest

from ltm_hf.data import document_blocks, prefix_blocks, train_tokenizer

TEXTS = ["Fellow citizens of the Senate", "Ümläute, 日本語 and 🙂!", "a", "the people " * 9]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 280)


def tokens(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("block_size", [2, 5, 1000])
def test_every_token_stands_in_one_block(tokenizer, block_size):
    rows = document_blocks(TEXTS, tokenizer, block_size)
    assert {row["input_ids"][0] for row in rows} == {tokenizer.bos_token_id}
    for number, text in enumerate(TEXTS):
        own = [row for row in rows if row["document"] == number]
        assert [token for row in own for token in row["input_ids"][1:]] == tokens(tokenizer, text)
        assert all(len(row["input_ids"]) == block_size for row in own[:-1])
        assert all(len(row["token_bytes"]) == len(row["input_ids"]) for row in own)


@pytest.mark.parametrize("block_size", [2, 5, 1000])
def test_bytes_of_the_tokens_are_those_of_the_text(tokenizer, block_size):
    """Also where a character is cut into several tokens, and over the blocks of a document."""
    rows = document_blocks(TEXTS, tokenizer, block_size)
    for number, text in enumerate(TEXTS):
        assert sum(sum(row["token_bytes"]) for row in rows if row["document"] == number) == len(text.encode())


def test_bytes_of_single_tokens(tokenizer):
    (row,) = document_blocks(["a the"], tokenizer, 1000)
    pieces = [tokenizer.decode(token) for token in row["input_ids"][1:]]
    assert row["token_bytes"] == [0, *(len(piece.encode()) for piece in pieces)] and sum(row["token_bytes"]) == 5


@pytest.mark.parametrize(("block_size", "prefix_length"), [(8, None), (9, None), (8, 3), (8, 7), (8, 1), (1000, None)])
def test_what_follows_the_prefixes_is_the_document_without_its_beginning(tokenizer, block_size, prefix_length):
    rows = prefix_blocks(TEXTS, tokenizer, block_size, prefix_length)
    for number, text in enumerate(TEXTS):
        ids, own = tokens(tokenizer, text), [row for row in rows if row["document"] == number]
        first = prefix_length or (block_size // 2 if len(ids) + 1 >= block_size else (len(ids) + 1) // 2)
        assert [token for row in own for token in row["input_ids"][row["prefix_length"] :]] == ids[first - 1 :]
        assert all(len(row["input_ids"]) <= block_size for row in own)
        for before, after in zip(own, own[1:], strict=False):
            assert (
                after["input_ids"][1 : after["prefix_length"]]
                == before["input_ids"][len(before["input_ids"]) - first + 1 :]
            )


def test_a_document_shorter_than_the_prefix_gives_no_block(tokenizer):
    assert {row["document"] for row in prefix_blocks(["a", TEXTS[0]], tokenizer, 16, 8)} == {1}


def test_begin_of_text_is_end_of_text_where_there_is_no_other(tokenizer):
    plain = train_tokenizer(TEXTS, 280)
    plain.bos_token = None
    assert document_blocks(["a"], plain, 4)[0]["input_ids"][0] == plain.eos_token_id


@pytest.mark.parametrize("blocks", [document_blocks, prefix_blocks])
def test_refuses(tokenizer, blocks):
    for empty in ("", " \n"):
        with pytest.raises(ValueError, match="Document 1 has no text"):
            blocks(["a", empty], tokenizer, 8)
    with pytest.raises(ValueError, match="block_size must be an integer of 2 or more"):
        blocks(["a"], tokenizer, 1)
    with pytest.raises(ValueError, match="prefix_length must be below the block size 8, not 8"):
        prefix_blocks(["a"], tokenizer, 8, 8)
