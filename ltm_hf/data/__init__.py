"""From `files` to token ids: `tokenization` of documents (`corpora`) and conversations (`chat`); blocks of them.

Blocks to train on join documents (`packing`), as they are needed or once and kept on disk (`shards`); blocks to score
are each of one document (`documents`).
"""

from .builtin import CORPORA
from .chat import encode_chat, load_conversations, prompt_inputs, set_chat_template
from .corpora import load_corpus
from .documents import document_blocks, prefix_blocks
from .packing import collate_blocks, pack
from .shards import load_prepared, prepare
from .tokenization import encode, load_tokenizer, train_tokenizer

__all__ = [
    "CORPORA",
    "collate_blocks",
    "document_blocks",
    "encode",
    "encode_chat",
    "load_conversations",
    "load_corpus",
    "load_prepared",
    "load_tokenizer",
    "pack",
    "prefix_blocks",
    "prepare",
    "prompt_inputs",
    "set_chat_template",
    "train_tokenizer",
]
