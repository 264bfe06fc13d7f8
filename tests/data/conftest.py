import datasets
import pytest

from ltm_hf.data import train_tokenizer

ODD_TEXTS = [
    "a , b .  two  spaces\tand a tab\r\nand lines\n\n\n",
    "naïve café — “quotes” 你好 🤖👩‍👩‍👧 \u200b\u0000 e\u0301 and é",
    " leading and trailing ",
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def odd_texts():
    return ODD_TEXTS


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat and the dog sat on the log"] * 5, 270)
