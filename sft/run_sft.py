"""Supervised fine-tuning: demonstrations in, a policy out, on TRL's SFTTrainer with packed rows.

    python sft/run_sft.py configs/sft.yaml                                                            # one process
    accelerate launch --config_file configs/zero2.yaml sft/run_sft.py configs/sft.yaml                # eight GPUs

A demonstration is {"prompt", "response"}, or {"messages"} ending with the assistant, or of another common shape
(baton/demonstrations.py); every assistant message is learnt, up to its end-of-turn token, and nothing else is. Of {"text"}, for
continued pretraining, all is learnt, in pieces of --max_length tokens. Where the last message was sampled, `response_token_ids`
are learnt as they are if this tokenizer sampled them, and no end-of-turn token after a `finish_reason` other than `stop`. The
finished policy's generation_config.json names the end-of-turn token. Demonstrations stand one after another in rows of
--tokens_per_row tokens, each with positions and attention of its own; the loss is the mean over the learnt tokens of a step,
however it is divided. Every field of TRL's SFTConfig is accepted in the YAML file and as a flag.
"""

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

from baton import program
from baton.ahead import note_adapter
from baton.arguments import option
from baton.errors import InputError
from baton.launch.check import check_processes
from baton.models.templates import load_tokenizer, template_warning
from baton.prompts import source_inputs
from baton.sources import check_start, loading, refuse_input, template_input
from baton.stage import Stage
from baton.task import spelling
from baton.training.adapters import LoraArguments, adapter_config, check_lora, quantization_config
from baton.training.arguments import (
    Compile,
    compile_option,
    early_stopping_option,
    keep_checkpoints_option,
    metrics_file,
    parse_training,
    tokens_per_row_option,
)
from baton.training.data import DataArguments, dataset_probs, warn_of_trained_on
from baton.training.held_out import NONE
from baton.training.reports import check_outside, place_reports
from sft.demonstrations import demonstrations, held_out_rows, holds_out, prompts_aside, training_rows

log = logging.getLogger("baton")

IMPORTS = ("sft.trainer", "baton.training.checkpoints", "baton.training.rows")

LOSSES = ("nll", "dft")  # TRL's
# Settings of SFTConfig that say what is learnt: here the assistant's turns, or a whole `text`.
LEARNT = ("assistant_only_loss", "completion_only_loss")
# Settings that ask for what is done in any case, and those of TRL's own preparation of texts.
DONE_ANYWAY = ("packing", "packing_strategy", "eval_packing", "padding_free", *LEARNT)
OF_TEXTS = ("truncation_mode", "dataset_text_field", "dataset_kwargs", "shuffle_dataset")


class Arguments(DataArguments, LoraArguments):
    """What this program adds to SFTConfig."""

    model_name_or_path: str = option(..., "the model to start from: a folder or a Hugging Face name", changes_result=False)
    dataset_name_or_path: str = option(
        ...,
        "demonstrations: .jsonl, .jsonl.gz, .json, .parquet or a Hugging Face dataset; several with commas between",
        changes_result=False,
    )
    output_key: str | None = option(
        None, "key of the demonstrated response, or of a whole conversation such as `chosen`, if it is an unusual one"
    )
    response_key: str = option("response", "an older name of `output_key`")
    pretrain_mode: bool = option(
        False, "OpenRLHF's name for: each record is a text, under `dataset_key` or else `text`, of which every token is learnt"
    )
    max_samples: int | None = option(None, "use only the first N demonstrations", ge=1)
    eval_dataset_name_or_path: str | None = option(
        None,
        "held-out demonstrations, whose loss and perplexity are computed at `eval_steps` and at the end",
        changes_result=False,
    )
    eval_dataset_split: str = option("test", "split of a held-out Hugging Face dataset")
    eval_every: int | None = option(
        None, "hold out one prompt in so many where no held-out file is given, with all its demonstrations", ge=2
    )
    output_dir: str = option(
        ..., "folder of the finished policy (in generation/ and annotate_data/ this flag names a file)", changes_result=False
    )
    max_length: int = option(
        2048, "longest conversation, in tokens; longer ones are dropped and counted, and longer texts cut into pieces", ge=2
    )
    tokens_per_row: int = tokens_per_row_option("demonstration")
    compile: Compile = compile_option()
    keep_checkpoints: int = keep_checkpoints_option()
    early_stopping: int | None = early_stopping_option()


def config_class() -> type:
    from trl import SFTConfig

    return SFTConfig


def checked_config(arguments: Arguments, settings: dict[str, Any], stage: Stage) -> Any:
    """TRL's SFTConfig. Raises InputError for settings that cannot train."""
    check_outside(settings, [arguments.model_name_or_path], ahead=arguments.check)
    from baton.training.checks import check_kept, check_order, check_settings
    from baton.training.config import trainer_config
    from baton.training.memory import sharding_of

    # TRL prepares texts; these rows are token ids already.
    fixed = {"max_length": arguments.max_length, "dataset_kwargs": {"skip_prepare_dataset": True}}
    adapter, kept = arguments.use_peft, arguments.keep_checkpoints
    config = trainer_config(config_class(), settings | fixed, Arguments.model_fields, stage, adapter, kept)
    check_settings(config, sharding_of(config), arguments, evaluates=holds_out(arguments))
    check_order(config)
    if config.loss_type not in LOSSES:
        raise InputError(f"`loss_type`: {config.loss_type!r} is not one of {', '.join(LOSSES)}")
    check_kept(arguments, config, sharding_of(config))
    return config


def make_trainer(arguments: Arguments, config: Any, tokenizer: Any, rows: Any, held_out: Any | None) -> Any:
    """The trainer, its model loaded; `held_out` are rows to evaluate on."""
    from baton.training import learnt
    from baton.training.memory import check_memory, estimate, largest_row, outline, sharding_of
    from sft.trainer import PackedSFTTrainer, why_padded

    outlined, lengths = outline(arguments.model_name_or_path, adapter_config(arguments)), learnt.outline(rows)
    per_row = None if why_padded(outlined, config) else arguments.tokens_per_row
    tokens = largest_row(int((lengths.prompts + lengths.responses).max()), config, per_row)
    check_memory(estimate(outlined, config, sharding_of(config), tokens, in_4_bit=arguments.load_in_4bit), config)
    return PackedSFTTrainer(
        arguments.model_name_or_path,
        args=config,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=adapter_config(arguments),
        quantization_config=quantization_config(arguments, config),
        tokens_per_row=arguments.tokens_per_row,
        compile_layers=arguments.compile,
    )


def held_out_facts(trainer: Any, held_out: Any) -> dict[str, Any]:
    """What the last evaluation says of the `held_out` rows, for the log and the manifest.

    Without the perplexity on padded batches, whose loss may hold more than the log-likelihood.
    """
    from baton.training.checkpoints import last_evaluation

    numbers = {name.removeprefix("eval_"): value for name, value in last_evaluation(trainer).items()}
    names = {"loss": "loss", "accuracy": "mean_token_accuracy"}
    found = {name: numbers[logged] for name, logged in names.items() if logged in numbers}
    if trainer.held_out is not None and found:
        found["perplexity"] = math.exp(min(numbers.get("nll", numbers["loss"]), 700))
    log.info("held out: %s", ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
    return found | {"demonstrations": held_out.kept, "dropped": dict(held_out.drops.counts)}


def check(arguments: Arguments, settings: dict[str, Any]) -> None:
    """Raise InputError for what can be refused before anything is read or imported."""
    check_lora(arguments)
    check_start(arguments.model_name_or_path)
    dataset_probs(arguments)
    if refused := [name for name in OF_TEXTS if name in settings]:
        raise InputError(
            f"`{refused[0]}` is of TRL's own preparation of texts, which is not used here: leave it out. `max_length` says "
            "what is dropped; `dataset_key` and `output_key` name keys"
        )
    if refused := [name for name in LEARNT if spelling(settings.get(name, True)) is False]:
        raise InputError(f"`{refused[0]}: false`: here the assistant's turns alone are learnt, or a whole `text`: leave it out")
    if arguments.output_key and arguments.response_key != "response":
        raise InputError("`output_key` and `response_key` are two names of one setting: leave one out")
    if arguments.pretrain_mode and (arguments.output_key or arguments.response_key != "response"):
        raise InputError("`pretrain_mode` reads one text of a record, so there is no response: leave out its key")


def main() -> None:
    arguments, settings = parse_training("sft/run_sft.py", Arguments, __doc__, config_class)
    check(arguments, settings)
    if asked := [name for name in DONE_ANYWAY if name in settings]:
        log.info("%s: rows are packed, and the assistant's turns learnt, in any case", ", ".join(f"`{name}`" for name in asked))
        settings = {name: value for name, value in settings.items() if name not in DONE_ANYWAY}
    output, source = Path(arguments.output_dir), arguments.eval_dataset_name_or_path
    inputs = {"model": arguments.model_name_or_path, **source_inputs("demonstrations", arguments.dataset_name_or_path)}
    inputs |= source_inputs("held-out demonstrations", source) if source else {}
    inputs |= template_input(arguments.chat_template)
    metrics_path = metrics_file(output, arguments.metrics_path)
    refuse_input(metrics_path, inputs, "--metrics_path", output)
    checked = partial(checked_config, arguments, settings)
    if arguments.use_peft and not arguments.merge_adapter:
        note_adapter(output)
    stage = Stage.begin("sft", arguments, output, inputs, settings, config_class, checked)
    if stage is None:
        return
    check_processes(settings.get("use_cpu"))
    config = checked(stage)

    from baton.training.checkpoints import SCRATCH, finish_policy, train
    from baton.training.checks import check_tokens
    from baton.training.config import log_training

    tokenizer = load_tokenizer(arguments.model_name_or_path, arguments.chat_template, of_texts=arguments.pretrain_mode)
    check_tokens(config, tokenizer)
    # With the process group there, or another machine would not notice that this fails.
    aside = prompts_aside(arguments) if program.rank() == 0 else NONE
    rows = training_rows(arguments, aside, tokenizer, config)
    held_out = held_out_rows(arguments, aside, tokenizer, config)
    warn_of_trained_on(arguments)
    warning = template_warning(rows.counted, tokenizer)
    if warning:
        log.warning("%s", warning)
    place_reports(settings, metrics_path)
    with loading(arguments.model_name_or_path):
        trainer = make_trainer(arguments, config, tokenizer, rows.data, held_out and held_out.data)
    log_training(trainer)
    counts = {"in": rows.count, "out": rows.kept, "dropped": dict(rows.drops.counts)}
    metrics = train(trainer, stage, arguments.export_dtype, metrics_path, counts, arguments.early_stopping)
    if program.rank() != 0:
        return
    conversations = ((each.messages, each.where) for each in demonstrations(arguments) if not isinstance(each.messages, str))
    metrics |= finish_policy(trainer, arguments, stage.partial_folder, next(conversations, None))
    facts = {"held_out": held_out_facts(trainer, held_out)} if held_out else {}
    counts = {"records_in": rows.count, "records_out": rows.kept, "drops": rows.drops}
    stage.finish(**counts, metrics=metrics, **facts, scratch=SCRATCH)
    if warning:
        log.warning("%s", warning)


if __name__ == "__main__":
    program.run(main)
