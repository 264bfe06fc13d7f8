"""From texts to token ids: documents (`corpora`), conversations (`chat`), `tokenization`; blocks (`packing`, `shards`).

Blocks are packed as they are needed, or once and kept on disk."""

from .chat import load_conversations, prompt_inputs, set_chat_template
from .corpora import load_corpus
from .packing import collate_blocks, pack
from .shards import load_prepared, prepare
from .tokenization import load_tokenizer, train_tokenizer

__all__ = [
    "collate_blocks",
    "load_conversations",
    "load_corpus",
    "load_prepared",
    "load_tokenizer",
    "pack",
    "prepare",
    "prompt_inputs",
    "set_chat_template",
    "train_tokenizer",
]
