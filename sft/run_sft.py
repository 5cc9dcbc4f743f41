"""Supervised fine-tuning: demonstrations in, a policy out, on TRL's SFTTrainer.

    python sft/run_sft.py configs/sft.yaml                                                            # one process
    accelerate launch --config_file configs/zero2.yaml sft/run_sft.py configs/sft.yaml                # eight GPUs

A demonstration is {"prompt", "response"}, or {"messages"} ending with the assistant, or of another common shape
(baton/demonstrations.py); every assistant message is learnt, up to its end-of-turn token, and nothing else is. Of {"text"}, for
continued pretraining, all is learnt. Where the last one was sampled, `response_token_ids` are learnt as they are if
this tokenizer sampled them, and no end-of-turn token after a `finish_reason` other than `stop`. The finished policy's
generation_config.json names the end-of-turn token. Every field of TRL's SFTConfig is accepted in the YAML file and as a flag.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from baton import program
from baton.arguments import option
from baton.demonstrations import demonstration_of
from baton.drops import Drops
from baton.keys import with_usual_keys
from baton.launch.check import check_processes
from baton.mixing import parse_probs
from baton.models.templates import load_tokenizer, template_warning
from baton.prompts import mixed_records, source_inputs, split_sources
from baton.records import check_token_ids
from baton.sources import check_start, loading, refuse_input, template_input
from baton.stage import Stage
from baton.training.arguments import TrainingProgramArguments, metrics_file, parse_training
from baton.training.reports import check_outside, place_reports
from sft.rows import Demonstration, rows_of_demonstrations

log = logging.getLogger("baton")

IMPORTS = ("trl.trainer.sft_trainer", "baton.training.checkpoints", "baton.training.rows")


class Arguments(TrainingProgramArguments):
    """What this program adds to SFTConfig."""

    model_name_or_path: str = option(..., "the model to start from: a folder or a Hugging Face name", changes_result=False)
    dataset_name_or_path: str = option(
        ...,
        "demonstrations: .jsonl, .jsonl.gz, .json, .parquet or a Hugging Face dataset; several with commas between",
        changes_result=False,
    )
    dataset_probs: str | None = option(None, "draw from several datasets at these rates, such as 0.7,0.3, until one is used up")
    dataset_split: str = option("train", "split of a Hugging Face dataset")
    dataset_key: str | None = option(None, "key of the prompt or the conversation, if it is an unusual one (docs/data.md)")
    output_key: str | None = option(
        None, "key of the demonstrated response, or of a whole conversation such as `chosen`, if it is an unusual one"
    )
    response_key: str = option("response", "an older name of `output_key`")
    max_samples: int | None = option(None, "use only the first N demonstrations", ge=1)
    output_dir: str = option(
        ..., "folder of the finished policy (in generation/ and annotate_data/ this flag names a file)", changes_result=False
    )
    max_length: int = option(2048, "longest conversation, in tokens; longer ones are dropped and counted", ge=2)
    chat_template: str | None = option(None, "Jinja file that replaces the tokenizer's chat template", changes_result=False)


def dataset_probs(arguments: Arguments) -> tuple[float, ...] | None:
    """The rate of each dataset, or None. Raises InputError where there are not as many rates as datasets."""
    return parse_probs(arguments.dataset_probs, len(split_sources(arguments.dataset_name_or_path)))


def demonstrations(arguments: Arguments) -> Iterator[Demonstration]:
    """Yield each demonstration. Raises InputError on the first bad one."""
    split, probs, most = arguments.dataset_split, dataset_probs(arguments), arguments.max_samples
    records = mixed_records(arguments.dataset_name_or_path, split, probs, max_samples=most)
    keys = {"prompt": arguments.dataset_key, "response": arguments.output_key or arguments.response_key}
    for where, record in with_usual_keys(records, keys):
        sampled = record.get("response_token_ids")
        if sampled is not None:
            check_token_ids(sampled, where, "response_token_ids")
        said = demonstration_of(record, where)
        yield Demonstration(where, said, sampled, record.get("finish_reason"), record.get("chat_template_hash"))


def rows_of(arguments: Arguments, count: int, tokenizer: Any, config: Any) -> tuple[Any, Drops, Counter[str]]:
    """The token ids of the `count` demonstrations, a dataset; what was dropped, and what was counted of the others.

    The latter two are those of process 0, which alone tokenises.
    """
    from baton.training.rows import rows_on_disk
    from baton.training.tokenising import tokenised

    drops, counted = Drops(), Counter()
    make = partial(rows_of_demonstrations, tokenizer, arguments.max_length)

    def token_ids():
        return tokenised(make, demonstrations(arguments), drops, counted, count)

    rows = rows_on_disk(token_ids, config, "demonstrations")
    log.info("last turns: %s", ", ".join(f"{number} {source}" for source, number in counted.items()))
    return rows, drops, counted


def config_class() -> type:
    from trl import SFTConfig

    return SFTConfig


def checked_config(arguments: Arguments, settings: dict[str, Any], stage: Stage) -> Any:
    """TRL's SFTConfig. Raises InputError for settings that cannot train."""
    check_outside(settings, [arguments.model_name_or_path], ahead=arguments.check)
    from baton.training.checks import check_settings
    from baton.training.config import trainer_config
    from baton.training.memory import sharding_of

    # TRL prepares texts; these rows are token ids already.
    settings = settings | {"max_length": arguments.max_length, "dataset_kwargs": {"skip_prepare_dataset": True}}
    config = trainer_config(config_class(), settings, Arguments.model_fields, stage)
    check_settings(config, sharding_of(config))
    return config


def main() -> None:
    arguments, settings = parse_training("sft/run_sft.py", Arguments, __doc__, config_class)
    check_start(arguments.model_name_or_path)
    dataset_probs(arguments)
    inputs = {"model": arguments.model_name_or_path, **source_inputs("demonstrations", arguments.dataset_name_or_path)}
    inputs |= template_input(arguments.chat_template)
    metrics_path = metrics_file(arguments.output_dir, arguments.metrics_path)
    refuse_input(metrics_path, inputs, "--metrics_path", arguments.output_dir)
    checked = partial(checked_config, arguments, settings)
    stage = Stage.begin("sft", arguments, Path(arguments.output_dir), inputs, settings, config_class, checked)
    if stage is None:
        return
    check_processes(settings.get("use_cpu"))
    count = sum(1 for _ in demonstrations(arguments))
    config = checked(stage)

    from trl import SFTTrainer

    from baton.training.checkpoints import SCRATCH, stop_at_end_of_turn, train
    from baton.training.config import log_training

    tokenizer = load_tokenizer(arguments.model_name_or_path, arguments.chat_template)
    rows, drops, counted = rows_of(arguments, count, tokenizer, config)
    warning = template_warning(counted, tokenizer)
    if warning:
        log.warning("%s", warning)
    place_reports(settings, metrics_path)
    with loading(arguments.model_name_or_path):
        trainer = SFTTrainer(model=arguments.model_name_or_path, args=config, train_dataset=rows, processing_class=tokenizer)
    log_training(trainer)
    counts = {"in": count, "out": len(rows), "dropped": dict(drops.counts)}
    metrics = train(trainer, stage, arguments.export_dtype, metrics_path, counts)
    if program.rank() == 0:
        if first := next((each for each in demonstrations(arguments) if not isinstance(each.messages, str)), None):
            stop_at_end_of_turn(stage.partial_folder, tokenizer, first.messages, first.where)
        stage.finish(records_in=count, records_out=len(rows), drops=drops, metrics=metrics, scratch=SCRATCH)
        if warning:
            log.warning("%s", warning)


if __name__ == "__main__":
    program.run(main)
