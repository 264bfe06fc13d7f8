"""Fine-tune a Latent Thought Model on questions and answers, prompts and completions, or chat.

    accelerate launch examples/finetune.py                         # outputs/ltm-tiny on GSM8K of the Hub
    accelerate launch examples/finetune.py --files train.jsonl.gz  # rows with messages, prompt and completion, or
                                                                   # question and answer
    accelerate launch examples/finetune.py --lora --infer_from prompt
    accelerate launch examples/finetune.py --backbone Qwen/Qwen2.5-0.5B --freeze_backbone

Needs the extra `finetune` (TRL and PEFT).
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import set_seed

from ltm_hf import LTMForCausalLM, cli
from ltm_hf.data import load_conversations, prompt_inputs, set_chat_template
from ltm_hf.loading import check_vocabulary, load_causal_lm, load_own_tokenizer
from ltm_hf.training import check_run

with cli.one_sentence():  # where one is not installed
    from peft import LoraConfig

    from ltm_hf.training.sft import LTMSFTConfig, LTMSFTTrainer, latent_modules

# Where the command line says nothing; beyond these, TRL's defaults hold.
RECIPE = dict(
    output_dir="outputs/finetuned",
    max_steps=100,
    per_device_train_batch_size=8,
    per_device_eval_batch_size=16,
    learning_rate=1e-3,
    warmup_steps=10,
    lr_scheduler_type="cosine",
    gradient_checkpointing=False,
    bf16=torch.cuda.is_available(),
    dataloader_pin_memory=torch.cuda.is_available(),
    save_strategy="no",
    report_to="none",
)


@dataclass
class ModelArguments:
    model: str = field(default="outputs/ltm-tiny", metadata={"help": "Folder of an LTM, or its name on the Hub."})
    backbone: str | None = field(
        default=None, metadata={"help": "Instead, a Llama, Mistral, Qwen2 or Qwen3 model to make an LTM of."}
    )
    num_latents: int = field(
        default=64, metadata={"help": "Of an LTM made of a backbone: for the paper's reader, a multiple of its layers."}
    )
    latent_reader: str = field(default="memory", metadata={"help": "How it reads them: memory or paper."})
    sliding_window: int | None = field(default=None, metadata={"help": "Its attention window; default: as it is."})
    freeze_backbone: bool = field(default=False, metadata={"help": "Train only what reads the latents."})
    lora: bool = field(default=False, metadata={"help": "Train a low-rank adapter and save it alone."})
    lora_rank: int = field(default=16, metadata={"help": "Its rank."})
    lora_targets: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Modules it changes, such as q_proj v_proj."}
    )

    def __post_init__(self):
        cli.at_least(1, lora_rank=self.lora_rank)


@dataclass
class DataArguments:
    files: list[str] | None = field(default=None, metadata={"help": "Local json or parquet files."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Or a data set of the Hub; default: openai/gsm8k, its configuration main."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    eval_rows: int = field(default=64, metadata={"help": "Held-out rows to score."})
    max_new_tokens: int = field(default=80, metadata={"help": "Length of the answer that is written at the end."})

    def __post_init__(self):
        cli.at_least(1, eval_rows=self.eval_rows, max_new_tokens=self.max_new_tokens)


def parse():
    """What the command line asks for, checked, and the names of the options that it has."""
    parser = cli.DataclassParser((ModelArguments, DataArguments, LTMSFTConfig))
    parser.set_defaults(**RECIPE)
    named = cli.given(parser)
    if "num_train_epochs" in named and "max_steps" not in named:
        parser.set_defaults(max_steps=-1)  # the recipe's would win
    options, data, args = parser.parse_args_into_dataclasses(look_for_args_file=False)
    of_backbone = ("num_latents", "latent_reader", "sliding_window", "freeze_backbone")
    cli.refuse_idle(
        named,
        (options.backbone, "with --backbone", ("model",)),
        (not options.backbone, "without --backbone", of_backbone),
        (options.lora, "with --lora, which trains no weight of the backbone", ("freeze_backbone",)),
        (not options.lora, "without --lora", ("lora_rank", "lora_targets")),
        *cli.idle_in_corpora(data),
        *cli.idle_in_training(args),
    )
    cli.at_least(2, max_length=args.max_length)
    if not data.files and not data.dataset_name:
        data.dataset_name, data.dataset_config_name = "openai/gsm8k", "main"
    return options, data, args, named


def meanings(objective):
    """What is printed of an evaluation: figures by name, and what they are."""
    if objective.pays_kl:
        loss = "a bound: latents fitted to the answer itself, and their KL"
    elif objective.perplexity:
        loss = "a predictor's loss: each token from what comes before it"
    else:
        loss = "given latents that have no variance: no bound where they are fitted to the answer"
    return {
        "eval_loss": loss,
        "eval_from_prompt": "a predictor's loss: latents from the prompt only, as in generation",
        "eval_no_latents": "a predictor's loss without latents",
    }


def load_model(options, output_dir):
    if not options.backbone:
        return load_causal_lm(options.model, dtype=torch.float32, auto=LTMForCausalLM)[0]
    model = LTMForCausalLM.from_pretrained_backbone(
        options.backbone,
        options.num_latents,
        options.sliding_window,
        options.freeze_backbone,
        latent_reader=options.latent_reader,
    ).float()
    if options.lora:  # an adapter is of no use without the model that it was made for
        model.save_pretrained(output_dir / "base")
        model = LTMForCausalLM.from_pretrained(output_dir / "base")
    return model


def adapter(options, config):
    if not options.lora:
        return None
    targets = options.lora_targets
    return LoraConfig(
        r=options.lora_rank,
        lora_alpha=2 * options.lora_rank,
        target_modules=targets[0] if len(targets) == 1 else targets,
        modules_to_save=latent_modules(config) if options.backbone else None,
        task_type="CAUSAL_LM",
    )


@cli.one_sentence()
def main():
    options, data, args, named = parse()
    check_run(args)
    folder = Path(args.output_dir)
    rows = load_conversations(data.files or data.dataset_name, config_name=data.dataset_config_name, seed=args.seed)
    held_out = rows["validation"].select(range(min(data.eval_rows, len(rows["validation"]))))
    tokenizer = load_own_tokenizer(options.backbone or options.model)
    set_chat_template(tokenizer)
    set_seed(args.seed)  # a new decoder's weights are the same on every process
    model = load_model(options, folder)
    check_vocabulary(model, tokenizer)
    cli.refuse_idle(named, *cli.idle_without_latents(model.config))
    longest = model.config.max_position_embeddings
    if "max_length" in named and args.max_length > longest:
        raise ValueError(f"--max_length is {args.max_length} and the model takes {longest} tokens.")
    args.max_length = min(args.max_length or longest, longest)
    args.assistant_only_loss |= "messages" in held_out.column_names

    trainer = LTMSFTTrainer(
        model,
        args,
        train_dataset=rows["train"],
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=adapter(options, model.config),
        card_facts={"dataset_name": None if data.files else data.dataset_name},
    )
    if options.lora:
        trainer.model.print_trainable_parameters()
    before = trainer.evaluate()
    trainer.train(args.resume_from_checkpoint)
    after = trainer.evaluate()
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return

    print(f"\n{len(held_out)} held-out rows, nats a scored token:\n")
    for name, meaning in meanings(trainer.objective).items():
        if name in after:
            print(f"{name:17} {before[name]:.3f} -> {after[name]:.3f}  {meaning}")
    inputs = prompt_inputs(held_out[0], tokenizer).to(model.device)
    output = trainer.model.eval().generate(
        **inputs, max_new_tokens=data.max_new_tokens, pad_token_id=tokenizer.pad_token_id
    )
    print(f"\n{tokenizer.decode(output[0], skip_special_tokens=True)}")
    print(f"\n{'Adapter' if options.lora else 'Model'} and tokenizer are in {folder}.")


if __name__ == "__main__":
    main()
