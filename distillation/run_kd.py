"""Knowledge distillation: a teacher's distributions over the next token in, a student that follows them out.

    python distillation/run_kd.py configs/kd.yaml                                                     # one process
    accelerate launch --config_file configs/zero2.yaml distillation/run_kd.py configs/kd.yaml         # eight GPUs

The data are demonstrations of any common shape (baton/demonstrations.py), or what the student itself has sampled
({"prompt", "responses", "response_token_ids"}, GKD's on-policy distillation, arXiv 2306.13649), whose token ids are used as
they are. The teacher, of the same tokenizer, reads them first and alone; its likeliest tokens at each position are kept in
files beside the output, which may be deleted afterwards. Then the student is trained on kd_coef * divergence +
(1 - kd_coef) * NLL, as in OpenRLHF. Every field of TRL's SFTConfig is accepted in the YAML file and as a flag.
"""

import logging
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
    early_stopping_option,
    keep_checkpoints_option,
    metrics_file,
    parse_training,
    tokens_per_row_option,
)
from baton.training.data import DataArguments, dataset_probs
from baton.training.demonstrations import Rows, rows_of
from baton.training.reports import check_outside, place_reports
from distillation.losses import LossName
from distillation.rows import examples

log = logging.getLogger("baton")

IMPORTS = ("distillation.trainer", "baton.training.checkpoints", "baton.training.rows")

# Settings of SFTConfig that choose a loss or prepare texts, of which this program has its own ways. NEFTune's noise would be
# that of a packed row as one long text.
OTHERS = (
    *("loss_type", "label_smoothing_factor", "packing", "packing_strategy", "eval_packing", "padding_free", "dataset_kwargs"),
    *("assistant_only_loss", "completion_only_loss", "router_aux_loss_coef", "neftune_noise_alpha", "truncation_mode"),
    *("dataset_text_field", "shuffle_dataset"),
)
BYTES_OF_KEPT = 4 * 12  # float32 copies of a token's numbers in the loss and its gradient, of student and teacher


class Arguments(DataArguments, LoraArguments):
    """What this program adds to SFTConfig."""

    model_name_or_path: str = option(..., "the student: a folder or a Hugging Face name", changes_result=False)
    teacher_model: str = option(..., "the teacher, with the student's tokenizer", changes_result=False)
    dataset_name_or_path: str = option(
        ..., "demonstrations or sampled responses: .jsonl, .jsonl.gz, .json, .parquet or a Hugging Face dataset; several with "
        "commas between",
        changes_result=False,
    )  # fmt: skip
    output_key: str | None = option(
        None, "key of the demonstrated response, or of a whole conversation such as `chosen`, if it is an unusual one"
    )
    max_samples: int | None = option(None, "use only the first N records", ge=1)
    eval_dataset: str | None = option(
        None, "held-out data, of which the loss is computed at `eval_steps` and at the end", changes_result=False
    )
    output_dir: str = option(
        ..., "folder of the finished student (in generation/ and annotate_data/ this flag names a file)", changes_result=False
    )
    kd_coef: float = option(0.4, "weight of the divergence from the teacher; that of the NLL is 1 - kd_coef", ge=0, le=1)
    kd_loss: LossName = option("forward_kl", "the divergence: of the student from the teacher, the reverse, or between both")
    beta: float | None = option(
        None, "with kd_loss jensen_shannon: the teacher's weight in the mixture; default: 0.5", gt=0, lt=1
    )
    teacher_top_k: int = option(
        64,
        "tokens of a position whose log-probabilities are kept, 8 bytes each: the teacher's likeliest, and the learnt one; all "
        "others count as one",
        ge=2,
    )
    teacher_offload: bool = option(
        False, "accepted for OpenRLHF's sake: the teacher is never in memory with the student", changes_result=False
    )
    max_length: int = option(2048, "longest conversation, in tokens; longer ones are dropped and counted, texts cut", ge=2)
    tokens_per_row: int = tokens_per_row_option("conversation")
    keep_checkpoints: int = keep_checkpoints_option()
    early_stopping: int | None = early_stopping_option()


def config_class() -> type:
    from trl import SFTConfig

    return SFTConfig


def check(arguments: Arguments, settings: dict[str, Any]) -> None:
    """Raise InputError for what can be refused before anything is read or imported."""
    check_lora(arguments)
    for model in (arguments.model_name_or_path, arguments.teacher_model):
        check_start(model)
    dataset_probs(arguments)
    if arguments.beta is not None and arguments.kd_loss != "jensen_shannon":
        raise InputError("`beta` acts with `kd_loss` jensen_shannon only: leave it out")
    for name in OTHERS:
        if name in settings:
            raise InputError(
                f"`{name}` is not for distillation: the loss is that of `kd_loss` and `kd_coef` on the assistant's tokens, and "
                "rows are packed in any case; leave it out"
            )
    asked = [name for name in ("do_eval", "eval_strategy") if spelling(settings.get(name)) not in (None, False, "no")]
    if asked and not arguments.eval_dataset:
        raise InputError(f"`{asked[0]}` needs data to evaluate on: name it with --eval_dataset, or leave it out")


def checked_config(arguments: Arguments, settings: dict[str, Any], stage: Stage) -> Any:
    """TRL's SFTConfig. Raises InputError for settings that cannot train."""
    check_outside(settings, [arguments.model_name_or_path, arguments.teacher_model], ahead=arguments.check)
    from baton.training.checks import check_kept, check_order, check_settings
    from baton.training.config import trainer_config
    from baton.training.memory import sharding_of

    # TRL prepares texts; these rows are token ids already.
    settings = settings | {"max_length": arguments.max_length, "dataset_kwargs": {"skip_prepare_dataset": True}}
    adapter, kept = arguments.use_peft, arguments.keep_checkpoints
    config = trainer_config(config_class(), settings, Arguments.model_fields, stage, adapter, kept)
    check_settings(config, sharding_of(config), arguments, evaluates=bool(arguments.eval_dataset))
    check_order(config)
    check_kept(arguments, config, sharding_of(config))
    return config


def make_trainer(arguments: Arguments, config: Any, tokenizer: Any, rows: Any, held_out: Any | None, folder: Path) -> Any:
    """The trainer: the teacher is loaded first, and alone, and what it says of the rows is kept in `folder`.

    Logs the memory that this takes, before anything is loaded. `held_out` are rows to evaluate on.
    """
    from baton.training.learnt import outline as outline_rows
    from baton.training.memory import check_memory, estimate, estimate_reference, largest_row, outline, sharding_of
    from distillation.teacher import check_packable, kept_teacher, teacher_config
    from distillation.trainer import PackedKDTrainer

    adapter, quantization = adapter_config(arguments), quantization_config(arguments, config)
    student, teacher = outline(arguments.model_name_or_path, adapter), outline(arguments.teacher_model)
    for model in (student.get_base_model() if adapter else student, teacher):
        check_packable(model)
    sizes = [model.get_output_embeddings().weight.shape[0] for model in (student, teacher)]
    outlined = outline_rows(rows)
    tokens = largest_row(int((outlined.prompts + outlined.responses).max()), config, arguments.tokens_per_row)
    sharding, top = sharding_of(config), min(arguments.teacher_top_k, *sizes)
    needs = estimate(student, config, sharding, tokens, in_4_bit=quantization is not None)
    needs["the teacher's tokens"] = tokens * top * BYTES_OF_KEPT
    check_memory(needs, config, estimate_reference(teacher, teacher_config(config), sharding))
    keep = {"teacher": arguments.teacher_model, "config": config, "folder": folder, "top": top, "vocabulary": min(sizes)}
    more = {}
    if held_out is not None:
        of_held_out = outline_rows(held_out)
        kept = kept_teacher(held_out, of_held_out, **keep)
        more = {"eval_dataset": held_out, "eval_outline": of_held_out, "eval_teacher": kept}
    return PackedKDTrainer(
        arguments.model_name_or_path,
        args=config,
        train_dataset=rows,
        outline=outlined,
        teacher=kept_teacher(rows, outlined, **keep),
        whole=top == max(sizes),
        loss=arguments.kd_loss,
        beta=0.5 if arguments.beta is None else arguments.beta,
        kd_coef=arguments.kd_coef,
        tokens_per_row=arguments.tokens_per_row,
        processing_class=tokenizer,
        peft_config=adapter,
        quantization_config=quantization,
        **more,
    )


def main() -> None:
    arguments, settings = parse_training("distillation/run_kd.py", Arguments, __doc__, config_class)
    check(arguments, settings)
    output, student, teacher = Path(arguments.output_dir), arguments.model_name_or_path, arguments.teacher_model
    inputs = {"model": student, "teacher": teacher, **source_inputs("data", arguments.dataset_name_or_path)}
    inputs |= template_input(arguments.chat_template)
    inputs |= source_inputs("held-out data", arguments.eval_dataset) if arguments.eval_dataset else {}
    metrics_path = metrics_file(output, arguments.metrics_path)
    refuse_input(metrics_path, inputs, "--metrics_path", output)
    checked = partial(checked_config, arguments, settings)
    if arguments.use_peft and not arguments.merge_adapter:
        note_adapter(output)
    stage = Stage.begin("kd", arguments, output, inputs, settings, config_class, checked)
    if stage is None:
        return
    check_processes(settings.get("use_cpu"))
    config = checked(stage)

    from baton.training.checkpoints import SCRATCH, finish_policy, last_evaluation, train
    from baton.training.checks import check_tokens
    from baton.training.config import log_training
    from distillation.teacher import check_tokenizers, teacher_tokenizer

    if arguments.teacher_offload:
        log.info("`teacher_offload`: the teacher runs first and alone, so there is nothing to offload")
    tokenizer = load_tokenizer(student, arguments.chat_template)
    check_tokens(config, tokenizer)
    check_tokenizers(tokenizer, teacher_tokenizer(teacher), (student, teacher))

    def rows_in(source: str, name: str) -> Rows:
        return rows_of(partial(examples, arguments, source), source, name, arguments.max_length, tokenizer, config)

    rows = rows_in(arguments.dataset_name_or_path, "examples")
    held_out = rows_in(arguments.eval_dataset, "held_out") if arguments.eval_dataset else None
    if held_out and arguments.eval_dataset == arguments.dataset_name_or_path:
        log.warning("`eval_dataset` is the data that is trained on, so what is evaluated is not held out")
    warning = template_warning(rows.counted, tokenizer)
    if warning:
        log.warning("%s", warning)
    place_reports(settings, metrics_path)
    with loading(student, teacher):
        trainer = make_trainer(arguments, config, tokenizer, rows.data, held_out and held_out.data, output.parent)
    log_training(trainer)
    counts = {"in": rows.count, "out": rows.kept, "dropped": dict(rows.drops.counts)}
    metrics = train(trainer, stage, arguments.export_dtype, metrics_path, counts, arguments.early_stopping)
    if program.rank() != 0:
        return
    every = examples(arguments, arguments.dataset_name_or_path)
    conversations = ((each.messages, each.where) for each in every if not isinstance(each.messages, str))
    metrics |= finish_policy(trainer, arguments, stage.partial_folder, next(conversations, None))
    if held_out:
        metrics |= last_evaluation(trainer)
    stage.finish(records_in=rows.count, records_out=rows.kept, drops=rows.drops, metrics=metrics, scratch=SCRATCH)
    if warning:
        log.warning("%s", warning)


if __name__ == "__main__":
    program.run(main)
