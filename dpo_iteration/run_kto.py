"""KTO: responses labelled desirable or undesirable in, the next policy out, on TRL's KTOTrainer.

    python dpo_iteration/run_kto.py configs/kto.yaml                                                  # one process
    accelerate launch --config_file configs/zero2.yaml dpo_iteration/run_kto.py configs/kto.yaml      # eight GPUs

Responses need no partner: {"prompt", "completion", "label"} with label true or false, as texts or messages. Annotated
responses ({"prompt", "responses", "rewards"}) are desirable above one threshold of the reward and undesirable below
another, by default above and below the mean of their prompt; preference pairs are one of each. KTO is of Ethayarajh et al.,
2024, arXiv 2402.01306. Every field of TRL's KTOConfig is accepted in the YAML file and as a flag (`beta`,
`desirable_weight`, `undesirable_weight`, …). The reference policy's log-probabilities are computed once, before the policy
is loaded, and kept beside the output. With `--use_peft` an adapter is trained; `--merge_adapter` writes it merged into the
policy, as the next round needs it.
"""

import copy
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from baton import jsonl, program
from baton.ahead import note_adapter
from baton.arguments import option
from baton.errors import InputError
from baton.jsonl import Record
from baton.keys import with_usual_keys
from baton.labels import LabelSettings, check_both_kinds, labelled_examples
from baton.launch.check import check_processes
from baton.models.templates import load_tokenizer, template_warning
from baton.prompts import mixed_records, source_inputs, split_sources
from baton.sources import check_start, loading, refuse_input, template_input
from baton.stage import Stage
from baton.task import batch_together
from baton.training.adapters import LoraArguments, adapter_config, check_lora, merge_adapter, quantization_config
from baton.training.arguments import early_stopping_option, keep_checkpoints_option, metrics_file, parse_training
from baton.training.data import DataArguments, dataset_probs
from baton.training.reports import check_outside, place_reports
from dpo_iteration.account import IN, Account
from dpo_iteration.choose import at_least_one
from dpo_iteration.rows import log_rows, rows_of_examples

log = logging.getLogger("baton")


class Arguments(DataArguments, LoraArguments):
    """What this program adds to KTOConfig."""

    model_name_or_path: str = option(..., "the policy to start from", changes_result=False)
    ref_model: str | None = option(None, "the reference policy; default: the starting policy", changes_result=False)
    dataset_name_or_path: str = option(
        ...,
        "labelled (`completion`, `label`), annotated (`responses`, `rewards`) or paired (`chosen`, `rejected`) responses; "
        "several files or datasets with commas between",
        changes_result=False,
    )
    output_key: str | None = option(None, "key of the labelled response, if it is not `completion`")
    label_key: str | None = option(None, "key of the label, if it is not `label`")
    chosen_key: str | None = option(None, "key of a pair's better response, if it is not `chosen`")
    rejected_key: str | None = option(None, "key of a pair's worse response, if it is not `rejected`")
    score_key: str | None = option(None, "key of the score of a response in data sets such as UltraFeedback (docs/data.md)")
    max_samples: int | None = option(None, "use only the first N records", ge=1)
    eval_dataset_name_or_path: str | None = option(
        None,
        "held-out responses of the same kinds, of which the loss is computed at `eval_steps` and at the end",
        changes_result=False,
    )
    eval_dataset_split: str = option("test", "split of a held-out Hugging Face dataset")
    output_dir: str = option(
        ..., "folder of the finished policy (in generation/ and annotate_data/ this flag names a file)", changes_result=False
    )
    examples_path: str | None = option(
        None, "file for the labelled examples; default: <output_dir>.examples.jsonl", changes_result=False
    )
    desirable_above: float | None = option(
        None, "annotated responses with a reward above this are desirable; default: the mean of the prompt's rewards"
    )
    undesirable_below: float | None = option(
        None, "annotated responses with a reward below this are undesirable; default: the mean of the prompt's rewards"
    )
    drop_truncated: bool = option(False, "leave out responses that were cut off by length")
    max_length: int = option(2048, "longest prompt and response together, in tokens; responses are cut to fit", ge=2)
    max_prompt_length: int = option(1024, "longest prompt, in tokens; longer ones are dropped and counted", ge=1)
    seed: int = option(42, "seed of the training and of the order of the examples")
    tokens_per_row: int = option(
        4096,
        "most tokens of a packed row; a step runs as many rows as its examples fill. It acts in one process alone: each of "
        "several packs its whole batch into one row",
        ge=1,
        changes_result=False,
    )
    keep_checkpoints: int = keep_checkpoints_option()
    early_stopping: int | None = early_stopping_option()


def config_class() -> type:
    from trl import KTOConfig

    return KTOConfig


def label_settings(arguments: Arguments) -> LabelSettings:
    """How responses are labelled, checked. Raises InputError on a combination that makes no sense."""
    return LabelSettings(arguments.desirable_above, arguments.undesirable_below, arguments.drop_truncated)


def check(arguments: Arguments) -> None:
    """Raise InputError for what can be refused before anything is read or imported."""
    label_settings(arguments)
    check_lora(arguments)
    dataset_probs(arguments)
    if arguments.max_prompt_length >= arguments.max_length:
        raise InputError("`max_prompt_length` must be smaller than `max_length`: no token would be left for the response")
    for model in models_of(arguments):
        check_start(model)


def models_of(arguments: Arguments) -> tuple[str, str]:
    """The starting policy and the reference."""
    return arguments.model_name_or_path, arguments.ref_model or arguments.model_name_or_path


def records_of(arguments: Arguments) -> Iterator[tuple[str, Record]]:
    """("file:line", record) of every dataset, mixed at their rates, the fields under their usual names."""
    split, probs, most = arguments.dataset_split, dataset_probs(arguments), arguments.max_samples
    return usual_records(arguments, mixed_records(arguments.dataset_name_or_path, split, probs, arguments.seed, most))


def usual_records(arguments: Arguments, records: Iterable[tuple[str, Record]]) -> Iterator[tuple[str, Record]]:
    """Records with their fields under the usual names."""
    names = ("dataset_key", "output_key", "label_key", "chosen_key", "rejected_key")
    usual = ("prompt", "completion", "label", "chosen", "rejected")
    return with_usual_keys(records, {key: getattr(arguments, name) for key, name in zip(usual, names, strict=True)})


def write_examples(path: Path, arguments: Arguments) -> Account:
    """Write the labelled examples to `path`; returns what became of the records. Raises InputError without both kinds."""
    account, source = Account(), arguments.dataset_name_or_path
    settings, score = label_settings(arguments), arguments.score_key
    jsonl.write(path, labelled_examples(records_of(arguments), settings, account.drops, account.counted, score))
    # Taken out of the account, since some are dropped below for their length: the rows are counted by kind instead.
    check_both_kinds(account.counted.pop("desirable", 0), account.counted.pop("undesirable", 0), source, account.drops)
    return account


def rows_of(arguments: Arguments, path: Path, labelled: Account, tokenizer: Any, config: Any) -> tuple[Any, Account]:
    """The token ids of the examples in `path`, a dataset, and the account of `labelled` continued by them.

    Raises InputError if not both kinds are left.
    """
    from baton.training.rows import rows_on_disk
    from baton.training.tokenising import tokenised

    account = copy.deepcopy(labelled)
    make = partial(rows_of_examples, tokenizer, arguments.max_length, arguments.max_prompt_length)

    def token_ids():
        labels: Counter[bool] = Counter()
        total = account.counted[IN] - account.drops.counts.total()
        for row in tokenised(make, jsonl.read(path), account.drops, account.counted, total):
            labels[row["label"]] += 1
            yield row
        check_both_kinds(labels[True], labels[False], path, account.drops)

    return rows_on_disk(token_ids, config, "examples"), account


def held_out_rows(arguments: Arguments, tokenizer: Any, config: Any) -> tuple[Any, Account]:
    """The token ids of the held-out examples, a dataset, and their account. Raises InputError if there is none."""
    from baton.training.rows import rows_on_disk

    account, source = Account(), arguments.eval_dataset_name_or_path
    make = partial(rows_of_examples, tokenizer, arguments.max_length, arguments.max_prompt_length)

    def token_ids():
        records = usual_records(arguments, mixed_records(source, arguments.eval_dataset_split, None))
        settings, score = label_settings(arguments), arguments.score_key
        examples = labelled_examples(records, settings, account.drops, account.counted, score)
        made = make(((source, each) for each in examples), account.drops, account.counted)
        return at_least_one(made, source, account.drops, "example")

    rows = rows_on_disk(token_ids, config, "held_out")
    if program.rank() == 0 and source in split_sources(arguments.dataset_name_or_path):
        log.warning("`eval_dataset_name_or_path` is data that is trained on, so what is evaluated is not held out")
    log.info("evaluating on %d examples, dropped: %s", len(rows), account.drops)
    return rows, account


def checked_config(arguments: Arguments, settings: dict[str, Any], stage: Stage) -> Any:
    """TRL's KTOConfig. Raises InputError for settings that cannot train."""
    check_outside(settings, models_of(arguments), ahead=arguments.check)
    from baton.training.checks import check_kept, check_settings
    from baton.training.config import trainer_config
    from baton.training.memory import sharding_of
    from dpo_iteration import kto

    # `precompute_ref_log_probs`, TRL's name for: the reference's log-probabilities stand in the rows, no reference is loaded.
    fixed = {"max_length": arguments.max_length, "seed": arguments.seed, "precompute_ref_log_probs": True}
    adapter, kept = arguments.use_peft, arguments.keep_checkpoints
    config = trainer_config(config_class(), settings | fixed, Arguments.model_fields, stage, adapter, kept)
    config.per_device_eval_batch_size = config.per_device_train_batch_size  # the KL term is one of a batch
    check_settings(config, sharding_of(config), arguments, evaluates=bool(arguments.eval_dataset_name_or_path))
    check_kept(arguments, config, sharding_of(config))
    kto.check_config(config)
    return config


def make_trainer(arguments: Arguments, config: Any, tokenizer: Any, dataset: Any, held_out: Any | None, folder: Path) -> Any:
    """The trainer on a dataset of examples, in random order; the reference's log-probabilities are kept in `folder`.

    `held_out` are examples to evaluate on. With an adapter the reference is the model without it.
    """
    from datasets import concatenate_datasets

    from baton.training.memory import outline
    from baton.training.rows import rows_on_disk
    from dpo_iteration import kto

    _, reference = models_of(arguments)
    adapter, quantization = adapter_config(arguments), quantization_config(arguments, config)
    if adapter:
        outline(arguments.model_name_or_path, adapter)  # refuses modules that the model does not have

    def in_order(rows: Any, name: str) -> Any:
        return rows_on_disk(partial(kto.in_training_order, rows, config, arguments.max_length), config, name)

    every = dataset = in_order(dataset, "in_order")
    if held_out is not None:
        every = concatenate_datasets([dataset, in_order(held_out, "held_out_in_order")])
    every = kto.with_reference_logps(every, reference, config, folder, quantization)
    return kto.PackedKTOTrainer(
        arguments.model_name_or_path,
        args=config,
        train_dataset=every.select(range(len(dataset))),
        eval_dataset=None if held_out is None else every.select(range(len(dataset), len(every))),
        processing_class=tokenizer,
        peft_config=adapter,
        quantization_config=quantization,
        tokens_per_row=arguments.tokens_per_row,
    )


def main() -> None:
    arguments, settings = parse_training("dpo_iteration/run_kto.py", Arguments, __doc__, config_class)
    check(arguments)
    model, reference = models_of(arguments)
    inputs = {"model": model, "reference": reference, **source_inputs("data", arguments.dataset_name_or_path)}
    held_out = arguments.eval_dataset_name_or_path
    inputs |= source_inputs("held-out data", held_out) if held_out else {}
    inputs |= template_input(arguments.chat_template)
    output = Path(arguments.output_dir)
    examples_path = Path(arguments.examples_path or f"{output}.examples.jsonl")
    metrics_path = metrics_file(output, arguments.metrics_path)
    refuse_input(examples_path, inputs, "--examples_path", output)
    refuse_input(metrics_path, inputs | {"examples_path": examples_path}, "--metrics_path", output)
    checked = partial(checked_config, arguments, settings)
    if arguments.use_peft and not arguments.merge_adapter:
        note_adapter(output)
    # KTO's KL term is a mean over the examples that all processes compute at a time.
    stage = Stage.begin("kto", arguments, output, inputs, settings | batch_together(settings), config_class, checked)
    if stage is None:
        return
    check_processes(settings.get("use_cpu"))
    config = checked(stage)

    from baton.training.checkpoints import SCRATCH, keep_checkpoints, last_evaluation, stop_at_end_of_turn, train
    from baton.training.config import log_training
    from dpo_iteration.kto import balance_advice

    # With the process group there, or another machine would not notice that this fails.
    labelled = write_examples(examples_path, arguments) if program.rank() == 0 else Account()
    tokenizer = load_tokenizer(arguments.model_name_or_path, arguments.chat_template)
    dataset, account = rows_of(arguments, examples_path, labelled, tokenizer, config)
    aside = held_out_rows(arguments, tokenizer, config)[0] if held_out else None
    desirable = sum(dataset["label"])
    undesirable = len(dataset) - desirable
    if program.rank() == 0:
        log_rows(dataset, tokenizer, account.drops, account.counted)
        log.info("%d desirable and %d undesirable examples", desirable, undesirable)
        if advice := balance_advice(desirable, undesirable, config):
            log.warning("%s", advice)
    place_reports(settings, metrics_path)
    with loading(model, reference):
        trainer = make_trainer(arguments, config, tokenizer, dataset, aside, examples_path.parent)
    log_training(trainer)
    counts = {"in": account.counted[IN], "out": len(dataset), "dropped": dict(account.drops.counts)}
    metrics = train(trainer, stage, arguments.export_dtype, metrics_path, counts, arguments.early_stopping)
    if program.rank() == 0:
        if arguments.merge_adapter:
            metrics |= merge_adapter(model, stage.partial_folder, config, arguments.export_dtype)
        where, first = next(jsonl.read(examples_path))
        conversation = [*first["prompt"], {"role": "assistant", "content": first["completion"]}]
        finish = partial(stop_at_end_of_turn, tokenizer=tokenizer, messages=conversation, where=where)
        finish(stage.partial_folder)
        keep_checkpoints(trainer, arguments, stage.partial_folder, finish)
        if aside is not None:
            metrics |= last_evaluation(trainer)
        counts = {"records_in": account.counted[IN], "records_out": len(dataset), "drops": account.drops}
        examples = {"desirable": desirable, "undesirable": undesirable, **account.facts}
        stage.finish(**counts, examples=examples, metrics=metrics, scratch=SCRATCH)
        if warning := template_warning(account.counted, tokenizer):
            log.warning("%s", warning)


if __name__ == "__main__":
    program.run(main)
