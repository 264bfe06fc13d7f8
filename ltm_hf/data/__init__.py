"""From a corpus to blocks of token ids: documents (`corpora`), tokens (`tokenization`), blocks (`packing`)."""

from .corpora import load_corpus
from .packing import collate_blocks, pack
from .tokenization import load_tokenizer, train_tokenizer

__all__ = ["collate_blocks", "load_corpus", "load_tokenizer", "pack", "train_tokenizer"]
