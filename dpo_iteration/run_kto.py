"""KTO: responses labelled desirable or undesirable in, the next policy out, on TRL's KTOTrainer.

    python dpo_iteration/run_kto.py configs/kto.yaml                                                  # one process
    accelerate launch --config_file configs/zero2.yaml dpo_iteration/run_kto.py configs/kto.yaml      # eight GPUs

Responses need no partner: {"prompt", "completion", "label"} with label true or false, as texts or messages. Annotated
responses ({"prompt", "responses", "rewards"}) are desirable above one threshold of the reward and undesirable below
another, by default above and below the mean of their prompt; preference pairs are one of each. KTO is of Ethayarajh et al.,
2024, arXiv 2402.01306. Every field of TRL's KTOConfig is accepted in the YAML file and as a flag (`beta`,
`desirable_weight`, `undesirable_weight`, …). The reference policy's log-probabilities are computed once, before the policy
is loaded, and kept beside the output.
"""

import copy
import logging
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from baton import jsonl, program
from baton.arguments import option
from baton.errors import InputError
from baton.jsonl import Record
from baton.keys import with_usual_keys
from baton.labels import LabelSettings, check_both_kinds, labelled_examples
from baton.launch.check import check_processes
from baton.mixing import parse_probs
from baton.models.templates import load_tokenizer, template_warning
from baton.prompts import mixed_records, source_inputs, split_sources
from baton.sources import check_start, loading, refuse_input, template_input
from baton.stage import Stage
from baton.task import batch_together
from baton.training.arguments import TrainingProgramArguments, metrics_file, parse_training
from baton.training.reports import check_outside, place_reports
from dpo_iteration.account import IN, Account
from dpo_iteration.rows import log_rows, rows_of_examples

log = logging.getLogger("baton")


class Arguments(TrainingProgramArguments):
    """What this program adds to KTOConfig."""

    model_name_or_path: str = option(..., "the policy to start from", changes_result=False)
    ref_model: str | None = option(None, "the reference policy; default: the starting policy", changes_result=False)
    dataset_name_or_path: str = option(
        ...,
        "labelled (`completion`, `label`), annotated (`responses`, `rewards`) or paired (`chosen`, `rejected`) responses; "
        "several files or datasets with commas between",
        changes_result=False,
    )
    dataset_probs: str | None = option(None, "draw from several datasets at these rates, such as 0.7,0.3, until one is used up")
    dataset_split: str = option("train", "split of a Hugging Face dataset")
    dataset_key: str | None = option(None, "key of the prompt, if it is an unusual one (docs/data.md)")
    output_key: str | None = option(None, "key of the labelled response, if it is not `completion`")
    label_key: str | None = option(None, "key of the label, if it is not `label`")
    chosen_key: str | None = option(None, "key of a pair's better response, if it is not `chosen`")
    rejected_key: str | None = option(None, "key of a pair's worse response, if it is not `rejected`")
    score_key: str | None = option(None, "key of the score of a response in data sets such as UltraFeedback (docs/data.md)")
    max_samples: int | None = option(None, "use only the first N records", ge=1)
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
    chat_template: str | None = option(None, "Jinja file that replaces the tokenizer's chat template", changes_result=False)
    seed: int = option(42, "seed of the training and of the order of the examples")
    tokens_per_row: int = option(
        4096,
        "most tokens of a packed row; a step runs as many rows as its examples fill. It acts in one process alone: each of "
        "several packs its whole batch into one row",
        ge=1,
        changes_result=False,
    )


def config_class() -> type:
    from trl import KTOConfig

    return KTOConfig


def label_settings(arguments: Arguments) -> LabelSettings:
    """How responses are labelled, checked. Raises InputError on a combination that makes no sense."""
    return LabelSettings(arguments.desirable_above, arguments.undesirable_below, arguments.drop_truncated)


def check(arguments: Arguments) -> None:
    """Raise InputError for what can be refused before anything is read or imported."""
    label_settings(arguments)
    dataset_probs(arguments)
    if arguments.max_prompt_length >= arguments.max_length:
        raise InputError("`max_prompt_length` must be smaller than `max_length`: no token would be left for the response")
    for model in models_of(arguments):
        check_start(model)


def models_of(arguments: Arguments) -> tuple[str, str]:
    """The starting policy and the reference."""
    return arguments.model_name_or_path, arguments.ref_model or arguments.model_name_or_path


def dataset_probs(arguments: Arguments) -> tuple[float, ...] | None:
    """The rate of each dataset, or None. Raises InputError where there are not as many rates as datasets."""
    return parse_probs(arguments.dataset_probs, len(split_sources(arguments.dataset_name_or_path)))


def records_of(arguments: Arguments) -> Iterator[tuple[str, Record]]:
    """("file:line", record) of every dataset, mixed at their rates, the fields under their usual names."""
    split, probs, most = arguments.dataset_split, dataset_probs(arguments), arguments.max_samples
    records = mixed_records(arguments.dataset_name_or_path, split, probs, arguments.seed, most)
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


def checked_config(arguments: Arguments, settings: dict[str, Any], stage: Stage) -> Any:
    """TRL's KTOConfig. Raises InputError for settings that cannot train."""
    check_outside(settings, models_of(arguments), ahead=arguments.check)
    from baton.training.checks import check_settings
    from baton.training.config import trainer_config
    from baton.training.memory import sharding_of
    from dpo_iteration import kto

    # `precompute_ref_log_probs`, TRL's name for: the reference's log-probabilities stand in the rows, no reference is loaded.
    fixed = {"max_length": arguments.max_length, "seed": arguments.seed, "precompute_ref_log_probs": True}
    config = trainer_config(config_class(), settings | fixed, Arguments.model_fields, stage)
    check_settings(config, sharding_of(config))
    kto.check_config(config)
    return config


def make_trainer(arguments: Arguments, config: Any, tokenizer: Any, dataset: Any, folder: Path) -> Any:
    """The trainer on a dataset of examples, in random order; the reference's log-probabilities are kept in `folder`."""
    from baton.training.rows import rows_on_disk
    from dpo_iteration import kto

    _, reference = models_of(arguments)
    dataset = rows_on_disk(partial(kto.in_training_order, dataset, config, arguments.max_length), config, "in_order")
    return kto.PackedKTOTrainer(
        arguments.model_name_or_path,
        args=config,
        train_dataset=kto.with_reference_logps(dataset, reference, config, folder),
        processing_class=tokenizer,
        tokens_per_row=arguments.tokens_per_row,
    )


def main() -> None:
    arguments, settings = parse_training("dpo_iteration/run_kto.py", Arguments, __doc__, config_class)
    check(arguments)
    model, reference = models_of(arguments)
    inputs = {"model": model, "reference": reference, **source_inputs("data", arguments.dataset_name_or_path)}
    inputs |= template_input(arguments.chat_template)
    output = Path(arguments.output_dir)
    examples_path = Path(arguments.examples_path or f"{output}.examples.jsonl")
    metrics_path = metrics_file(output, arguments.metrics_path)
    refuse_input(examples_path, inputs, "--examples_path", output)
    refuse_input(metrics_path, inputs | {"examples_path": examples_path}, "--metrics_path", output)
    checked = partial(checked_config, arguments, settings)
    # KTO's KL term is a mean over the examples that all processes compute at a time.
    stage = Stage.begin("kto", arguments, output, inputs, settings | batch_together(settings), config_class, checked)
    if stage is None:
        return
    check_processes(settings.get("use_cpu"))
    config = checked(stage)

    from baton.training.checkpoints import SCRATCH, stop_at_end_of_turn, train
    from baton.training.config import log_training
    from dpo_iteration.kto import balance_advice

    # With the process group there, or another machine would not notice that this fails.
    labelled = write_examples(examples_path, arguments) if program.rank() == 0 else Account()
    tokenizer = load_tokenizer(arguments.model_name_or_path, arguments.chat_template)
    dataset, account = rows_of(arguments, examples_path, labelled, tokenizer, config)
    desirable = sum(dataset["label"])
    undesirable = len(dataset) - desirable
    if program.rank() == 0:
        log_rows(dataset, tokenizer, account.drops, account.counted)
        log.info("%d desirable and %d undesirable examples", desirable, undesirable)
        if advice := balance_advice(desirable, undesirable, config):
            log.warning("%s", advice)
    place_reports(settings, metrics_path)
    with loading(model, reference):
        trainer = make_trainer(arguments, config, tokenizer, dataset, examples_path.parent)
    log_training(trainer)
    counts = {"in": account.counted[IN], "out": len(dataset), "dropped": dict(account.drops.counts)}
    metrics = train(trainer, stage, arguments.export_dtype, metrics_path, counts)
    if program.rank() == 0:
        where, first = next(jsonl.read(examples_path))
        conversation = [*first["prompt"], {"role": "assistant", "content": first["completion"]}]
        stop_at_end_of_turn(stage.partial_folder, tokenizer, conversation, where)
        counts = {"records_in": account.counted[IN], "records_out": len(dataset), "drops": account.drops}
        examples = {"desirable": desirable, "undesirable": undesirable, **account.facts}
        stage.finish(**counts, examples=examples, metrics=metrics, scratch=SCRATCH)
        if warning := template_warning(account.counted, tokenizer):
            log.warning("%s", warning)


if __name__ == "__main__":
    program.run(main)
