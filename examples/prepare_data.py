"""Tokenise and pack a corpus once, for examples/pretrain.py --prepared.

    python examples/prepare_data.py data/stdlib --train_tokenizer 2048 --block_size 256
    python examples/prepare_data.py data/fineweb --dataset_name HuggingFaceFW/fineweb-edu \
        --dataset_config_name sample-10BT --tokenizer gpt2 --num_proc 32

Killed, it goes on where it stopped when run again with the same arguments.
"""

from argparse import RawDescriptionHelpFormatter

from ltm_hf import cli
from ltm_hf.data import CORPORA, load_corpus, load_tokenizer, prepare, train_tokenizer
from ltm_hf.data.shards import INDEX


def parse(arguments=None):
    parser = cli.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=cli.folder, help="where to write")
    parser.add_argument("--corpus", choices=CORPORA, default="stdlib", help="one that needs no network; default stdlib")
    parser.add_argument("--dataset_name", help="a data set of the Hub instead")
    parser.add_argument("--dataset_config_name", help="configuration of the Hub data set")
    parser.add_argument("--files", nargs="+", help="local text, json or parquet files instead")
    parser.add_argument("--text_column", help="column that holds the text")
    parser.add_argument("--validation_fraction", type=cli.fraction, default=0.05, help="of the documents; default 0.05")
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument("--tokenizer", default="gpt2", help="name or folder; default gpt2")
    tokenizer.add_argument("--train_tokenizer", type=cli.vocabulary, help="train a byte-level BPE of so many entries")
    parser.add_argument("--block_size", type=cli.block, default=1024, help="tokens of a block; default 1024")
    parser.add_argument("--documents_per_shard", type=cli.positive_int, default=10_000, help="default 10000")
    parser.add_argument("--num_proc", type=cli.positive_int, default=1, help="processes; default 1")
    named, args = cli.given(parser, arguments), parser.parse_args(arguments)
    cli.refuse_idle(named, *cli.idle_in_corpora(args))
    return args


@cli.one_sentence()
def main():
    args = parse()
    if args.folder.is_dir() and any(args.folder.iterdir()) and not (args.folder / INDEX).is_file():
        raise ValueError(f"{str(args.folder)!r} is not empty and holds no prepared data: name another folder.")
    corpus = load_corpus(
        args.files or args.dataset_name,
        corpus=args.corpus,
        config_name=args.dataset_config_name,
        text_column=args.text_column,
        validation_fraction=args.validation_fraction,
    )
    if args.train_tokenizer:
        tokenizer = train_tokenizer((row["text"] for row in corpus["train"]), args.train_tokenizer)
    else:
        tokenizer = load_tokenizer(args.tokenizer)
    blocks = prepare(
        corpus,
        tokenizer,
        args.block_size,
        args.folder,
        source=args.dataset_name or " ".join(args.files or [CORPORA[args.corpus].title]),
        documents_per_shard=args.documents_per_shard,
        num_proc=args.num_proc,
    )
    for name, split in blocks.items():
        print(f"{name}: {len(split):,} blocks, {len(split) * args.block_size:,} tokens")
    print(f"accelerate launch examples/pretrain.py --prepared {args.folder}")


if __name__ == "__main__":
    main()
