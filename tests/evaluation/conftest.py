"""What the tests of studies of latents share."""

import string

import pytest

BOS = 1


class Letters:
    """Token i is character i of the alphabet, and `a` begins each text: all that the studies ask of a tokenizer."""

    ALPHABET = "_" + string.ascii_letters + "01234567"
    eos_token_id = 2

    def __call__(self, texts, truncation, max_length, **_):
        return {"input_ids": [[BOS, *map(self.ALPHABET.index, text)][:max_length] for text in texts]}

    def decode(self, ids):
        return "".join(self.ALPHABET[int(index)] for index in ids)


@pytest.fixture(scope="session")
def letters():
    return Letters()


@pytest.fixture
def blocks(make_ids):
    """Of three lengths, so that batches are padded."""
    return [{"input_ids": [BOS, *ids[:length].tolist()]} for ids, length in zip(make_ids(), (7, 12, 4), strict=True)]


def leaves(result):
    """Every leaf of a JSON value, in order."""
    if isinstance(result, dict):
        return [leaf for key in result for leaf in (key, *leaves(result[key]))]
    return [leaf for one in result for leaf in leaves(one)] if isinstance(result, list) else [result]


@pytest.fixture(scope="session")
def same_numbers():
    """Whether two results of a study are the same, to rounding."""

    def same(one, other):
        pairs = list(zip(leaves(one), leaves(other), strict=True))
        close = (a == (pytest.approx(b, rel=1e-4, abs=1e-4) if isinstance(b, float) else b) for a, b in pairs)
        return len(pairs) > 10 and all(close)

    return same


@pytest.fixture(scope="session")
def is_table():
    """Whether a Markdown text has tables with rows of the same cells, and no figure that is none."""

    def check(markdown):
        lines = markdown.splitlines()
        for row, following in zip(lines, lines[1:], strict=False):
            if row.startswith("|") and following.startswith("|"):
                assert row.count("|") - row.count("\\|") == following.count("|") - following.count("\\|")
        return sum(line.startswith("|") for line in lines) > 2 and "nan" not in markdown

    return check
