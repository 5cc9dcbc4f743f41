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
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from baton import program
from baton.ahead import note_adapter
from baton.arguments import option
from baton.drops import Drops
from baton.errors import InputError
from baton.jsonl import Record
from baton.keys import with_usual_keys
from baton.launch.check import check_processes
from baton.models.templates import load_tokenizer, template_warning
from baton.prompts import mixed_records, source_inputs
from baton.sources import check_start, loading, refuse_input, template_input
from baton.stage import Stage
from baton.task import spelling
from baton.training.adapters import LoraArguments, adapter_config, check_lora, merge_adapter, quantization_config
from baton.training.arguments import (
    Compile,
    compile_option,
    early_stopping_option,
    keep_checkpoints_option,
    metrics_file,
    parse_training,
    tokens_per_row_option,
)
from baton.training.data import DataArguments, dataset_probs
from baton.training.demonstrations import Demonstration, demonstration_in, rows_of_demonstrations
from baton.training.reports import check_outside, place_reports

log = logging.getLogger("baton")

IMPORTS = ("sft.trainer", "baton.training.checkpoints", "baton.training.rows")


# Settings of SFTConfig that say what is learnt: here the assistant's turns, or a whole `text`.
LEARNT = ("assistant_only_loss", "completion_only_loss")
# Settings that ask for what is done in any case, and those of TRL's own preparation of texts.
DONE_ANYWAY = ("packing", "packing_strategy", "eval_packing", "padding_free", *LEARNT)
OF_TEXTS = ("truncation_mode", "dataset_text_field", "dataset_kwargs")


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
    eval_every: int | None = option(None, "hold out one demonstration in so many where no held-out file is given", ge=2)
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


def training_demonstrations(arguments: Arguments) -> Iterator[Demonstration]:
    """Yield each demonstration that is trained on. Raises InputError on the first bad one."""
    for number, demonstration in enumerate(demonstrations(arguments)):
        if not _is_held_out(number, arguments):
            yield demonstration


def held_out_demonstrations(arguments: Arguments) -> Iterator[Demonstration]:
    """Yield each held-out demonstration: all of the held-out file, else some of the training file."""
    if arguments.eval_dataset_name_or_path:
        records = mixed_records(arguments.eval_dataset_name_or_path, arguments.eval_dataset_split, None)
        yield from _read(records, arguments)
        return
    for number, demonstration in enumerate(demonstrations(arguments)):
        if _is_held_out(number, arguments):
            yield demonstration


def demonstrations(arguments: Arguments) -> Iterator[Demonstration]:
    """Yield each demonstration of the training files. Raises InputError on the first bad one."""
    split, probs, most = arguments.dataset_split, dataset_probs(arguments), arguments.max_samples
    return _read(mixed_records(arguments.dataset_name_or_path, split, probs, max_samples=most), arguments)


def _read(records: Iterable[tuple[str, Record]], arguments: Arguments) -> Iterator[Demonstration]:
    keys = {"prompt": arguments.dataset_key, "response": arguments.output_key or arguments.response_key}
    if arguments.pretrain_mode:
        keys = {"text": arguments.dataset_key}
    for where, record in with_usual_keys(records, keys):
        if not arguments.pretrain_mode:
            yield demonstration_in(record, where)
        elif isinstance(record.get("text"), str):
            yield demonstration_in({"text": record["text"]}, where)
        else:
            raise InputError(f"{where}: `text` must be a text; another key of it is named by --dataset_key")


def _is_held_out(number: int, arguments: Arguments) -> bool:
    """Whether a demonstration of the training file is held out: the last of every `eval_every`."""
    every = arguments.eval_every
    return not arguments.eval_dataset_name_or_path and every is not None and number % every == every - 1


def rows_of(
    every: Iterable[Demonstration], name: str, arguments: Arguments, count: int, tokenizer: Any, config: Any
) -> tuple[Any, Drops, Counter[str]]:
    """The token ids of `count` demonstrations, a dataset called `name`; what was dropped, and what was counted of the others.

    The latter two are those of process 0, which alone tokenises. Raises InputError if no row is left.
    """
    from baton.training.rows import rows_on_disk
    from baton.training.tokenising import tokenised

    drops, counted = Drops(), Counter()
    make = partial(rows_of_demonstrations, tokenizer, arguments.max_length)

    def token_ids():
        yield from tokenised(make, every, drops, counted, count)
        if drops.counts.total() == count:
            raise InputError(f"{arguments.dataset_name_or_path}: no demonstration is left of {name}; dropped: {drops}")

    rows = rows_on_disk(token_ids, config, name)
    log.info("%s: last turns: %s", name, ", ".join(f"{number} {source}" for source, number in counted.items()))
    return rows, drops, counted


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
    check_kept(arguments, config, sharding_of(config))
    return config


def holds_out(arguments: Arguments) -> bool:
    """Whether there are held-out demonstrations."""
    return bool(arguments.eval_dataset_name_or_path or arguments.eval_every)


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


def held_out_facts(trainer: Any, count: int, drops: Drops) -> dict[str, Any]:
    """What the last evaluation says of `count` held-out demonstrations, for the log and the manifest.

    Without the perplexity on padded batches, whose loss may hold more than the log-likelihood.
    """
    from baton.training.checkpoints import last_evaluation

    numbers = {name.removeprefix("eval_"): value for name, value in last_evaluation(trainer).items()}
    names = {"loss": "loss", "accuracy": "mean_token_accuracy"}
    found = {name: numbers[logged] for name, logged in names.items() if logged in numbers}
    if trainer.held_out is not None and found:
        found["perplexity"] = math.exp(min(numbers.get("nll", numbers["loss"]), 700))
    log.info("held out: %s", ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
    return found | {"demonstrations": count, "dropped": dict(drops.counts)}


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
    if arguments.pretrain_mode and (arguments.output_key or arguments.response_key != "response"):
        raise InputError("`pretrain_mode` reads one text of a record, so there is no response: leave out its key")


def main() -> None:
    arguments, settings = parse_training("sft/run_sft.py", Arguments, __doc__, config_class)
    check(arguments, settings)
    if asked := [name for name in DONE_ANYWAY if name in settings]:
        log.info("%s: rows are packed, and the assistant's turns learnt, in any case", ", ".join(f"`{name}`" for name in asked))
        settings = {name: value for name, value in settings.items() if name not in DONE_ANYWAY}
    output, held_out = Path(arguments.output_dir), arguments.eval_dataset_name_or_path
    inputs = {"model": arguments.model_name_or_path, **source_inputs("demonstrations", arguments.dataset_name_or_path)}
    inputs |= source_inputs("held-out demonstrations", held_out) if held_out else {}
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
    # With the process group there, or another machine would not notice that a record is bad.
    count = sum(1 for _ in training_demonstrations(arguments)) if program.rank() == 0 else 0

    from baton.training.checkpoints import SCRATCH, keep_checkpoints, stop_at_end_of_turn, train
    from baton.training.config import log_training

    tokenizer = load_tokenizer(arguments.model_name_or_path, arguments.chat_template, of_texts=arguments.pretrain_mode)
    every = training_demonstrations(arguments)
    rows, drops, counted = rows_of(every, "demonstrations", arguments, count, tokenizer, config)
    aside, held_out_rows, held_out_drops = 0, None, Drops()
    if holds_out(arguments):
        aside = sum(1 for _ in held_out_demonstrations(arguments)) if program.rank() == 0 else 0
        if not aside and program.rank() == 0:
            reason = held_out or f"`eval_every` {arguments.eval_every} of {count} demonstrations"
            raise InputError(f"no demonstration is held out: {reason}")
        every = held_out_demonstrations(arguments)
        held_out_rows, held_out_drops, _ = rows_of(every, "held out", arguments, aside, tokenizer, config)
    warning = template_warning(counted, tokenizer)
    if warning:
        log.warning("%s", warning)
    place_reports(settings, metrics_path)
    with loading(arguments.model_name_or_path):
        trainer = make_trainer(arguments, config, tokenizer, rows, held_out_rows)
    log_training(trainer)
    out = count - drops.counts.total()  # a long text gives several rows
    counts = {"in": count, "out": out, "dropped": dict(drops.counts)}
    metrics = train(trainer, stage, arguments.export_dtype, metrics_path, counts, arguments.early_stopping)
    if program.rank() == 0:
        if arguments.merge_adapter:
            metrics |= merge_adapter(arguments.model_name_or_path, stage.partial_folder, config, arguments.export_dtype)
        first = next((each for each in demonstrations(arguments) if not isinstance(each.messages, str)), None)

        def finish(folder: Path) -> None:
            if first:
                stop_at_end_of_turn(folder, tokenizer, first.messages, first.where)

        finish(stage.partial_folder)
        keep_checkpoints(trainer, arguments, stage.partial_folder, finish)
        facts = {"metrics": metrics}
        if held_out_rows is not None:
            of_held_out = aside - held_out_drops.counts.total()
            facts["held_out"] = held_out_facts(trainer, of_held_out, held_out_drops)
        counts = {"records_in": count, "records_out": out, "drops": drops}
        stage.finish(**counts, **facts, scratch=SCRATCH)
        if warning:
            log.warning("%s", warning)


if __name__ == "__main__":
    program.run(main)
