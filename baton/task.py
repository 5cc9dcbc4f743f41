"""What a task is: what decides a stage's result, as a manifest keeps it, and how two tasks differ.

A task is the stage's name, its deciding arguments, the deciding settings of a trainer underneath, and the content of its
inputs. How it is executed (paths, processes, memory, logs, reports, secrets, a value's spelling) is no part of it, so that the
same task goes on with another number of shards, processes or GPUs.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from baton.arguments import StageArguments
from baton.fingerprint import difference, fingerprint
from baton.parallel import data_parallel
from baton.secrets import is_secret

# Settings of TrainingArguments and of TRL's configurations that do not decide the result. Every other one does.
EXECUTION_SETTINGS = frozenset(
    """
    output_dir local_rank use_cpu parallelism_config fsdp fsdp_config deepspeed resume_from_checkpoint
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    activation_offloading torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps use_cache
    use_liger_kernel liger_kernel_config padding_free pad_to_multiple_of precompute_ref_log_probs precompute_ref_batch_size
    per_device_eval_batch_size eval_accumulation_steps eval_do_concat_batches eval_use_gather_object prediction_loss_only
    dataset_num_proc dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen
    log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id debug skip_memory_metrics include_for_metrics batch_eval_metrics
    save_strategy save_steps save_total_limit save_only_model save_on_each_node enable_jit_checkpoint
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    do_train do_eval do_predict
    """.split()
)
# The best checkpoint can only be one that was saved.
SAVING = {"save_strategy", "save_steps"}
VERSION = 4  # of the manifest: those of another version say other things of a task
# Their product with the number of data-parallel processes decides the result, and not how it is split.
BATCH_SPLIT = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}  # with the trainers' defaults
# Of `model_init_kwargs`: where and how a model is loaded.
EXECUTION_MODEL_SETTINGS = set("attn_implementation device_map max_memory low_cpu_mem_usage cache_dir local_files_only".split())


def task_of(stage: str, arguments: StageArguments, settings: dict[str, Any]) -> dict[str, Any]:
    """A task but for its inputs, as plain JSON values: `stage`, `arguments`, `settings`; beside them how it is executed."""
    values = {name: value for name, value in arguments.model_dump(mode="json").items() if not _hides(arguments, name)}
    decides = {name: field.json_schema_extra["changes_result"] for name, field in type(arguments).model_fields.items()}
    return {
        "version": VERSION,
        "stage": stage,
        "arguments": {name: value for name, value in values.items() if decides[name]},
        "settings": settings,
        "execution": {name: value for name, value in values.items() if not decides[name]},
    }


def trainer_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of a trainer's settings that decide the result, in one spelling, with `global_batch` instead of its factors."""
    spelled = {name: spelling(value) for name, value in settings.items()}
    kept = SAVING if spelled.get("load_best_model_at_end") else set()
    left_out = (EXECUTION_SETTINGS - kept) | BATCH_SPLIT.keys()
    decides = {name: value for name, value in spelled.items() if name not in left_out and not is_secret(name)}
    model = decides.pop("model_init_kwargs", None)
    if isinstance(model, dict):
        model = {name: value for name, value in model.items() if name not in EXECUTION_MODEL_SETTINGS and not is_secret(name)}
    if model:
        decides["model_init_kwargs"] = model
    # Where the last, incomplete batch is left out, its size decides how many steps there are.
    split = batch_split(spelled) if spelled.get("dataloader_drop_last") else {}
    return decides | split | {"global_batch": global_batch(spelled)}


def batch_split(settings: dict[str, Any]) -> dict[str, str]:
    """How a batch is split, as a setting that decides: for losses that depend on what else is in a process's batch."""
    name = "per_device_train_batch_size"
    return {"batch_split": f"{spelling(settings.get(name, BATCH_SPLIT[name]))} on each of {data_parallel().size} processes"}


def batch_together(settings: dict[str, Any]) -> dict[str, int]:
    """How many rows all processes compute at a time, as a setting that decides: for losses that average over those."""
    name = "per_device_train_batch_size"
    size = spelling(settings.get(name, BATCH_SPLIT[name]))
    return {"batch_together": size * data_parallel().size if isinstance(size, int) else size}


def global_batch(settings: dict[str, Any]) -> int:
    """Rows of one optimizer step over all processes. What is no number is left for the trainer's configuration to refuse."""
    size = data_parallel().size
    for name, default in BATCH_SPLIT.items():
        value = spelling(settings.get(name, default))
        size *= value if isinstance(value, int) else default
    return size


def spelling(value: Any) -> Any:
    """A setting in the one form in which it is compared: `"1e-6"`, `0.000001` and `["1e-6"]` are the same."""
    if isinstance(value, dict):
        return {str(name): spelling(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return spelling(value[0]) if len(value) == 1 else [spelling(inner) for inner in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if not isinstance(value, str):
        return value
    if value.strip().lower() in ("true", "false", "null", "none", ""):
        return {"true": True, "false": False}.get(value.strip().lower())
    try:
        return spelling(json.loads(value) if value.lstrip()[0] in "[{" else float(value))
    except (ValueError, OverflowError):
        return value


def fingerprints(inputs: dict[str, str | Path]) -> dict[str, Any]:
    """The inputs of a task that starts, by name, each by its content."""
    return {name: fingerprint(source) for name, source in inputs.items()}


def differences(
    manifest: dict[str, Any],
    task: dict[str, Any],
    inputs: dict[str, str | Path],
    config_class: Callable[[], type] | None = None,
    argument_defaults: dict[str, Any] | None = None,
) -> list[str]:
    """In what a manifest describes another task than `task` on `inputs`; empty where it is the same.

    `argument_defaults` stand for arguments that one side leaves out: those that there were not when the manifest was written.
    `config_class` gives the trainer's configuration, whose defaults stand for settings that one side leaves out; it is called
    only where that is so.
    """
    if manifest.get("version") != task["version"]:
        return ["it was made by another version of Baton, whose tasks cannot be compared with this one's"]
    if manifest["stage"] != task["stage"]:
        return [f"stage ({manifest['stage']}, now {task['stage']})"]
    found = _changed(manifest["arguments"], task["arguments"], argument_defaults or {})
    old, new = manifest.get("settings", {}), task["settings"]
    defaults = _defaults(config_class()) if config_class and old.keys() != new.keys() else {}
    found += _changed(old, new, defaults)
    if old.get("global_batch") != new.get("global_batch"):
        found.append(f"set gradient_accumulation_steps so that global_batch is {old.get('global_batch')} again")
    for name, source in inputs.items():
        known = manifest["inputs"].get(name)
        if known is None:
            found.append(f"{name} ({source}, before none)")
        elif changed := difference(known, source):
            found.append(f"{name}: {changed}")
    gone = sorted(manifest["inputs"].keys() - inputs.keys())
    return found + [f"{name} ({manifest['inputs'][name]['path']}, now none)" for name in gone]


def _hides(arguments: StageArguments, name: str) -> bool:
    return is_secret(name) or isinstance(getattr(arguments, name), SecretStr)


def _changed(old: dict[str, Any], new: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    """«name (old, now new)» of each value that differs; one that a side leaves out has its default."""
    values = {name: [side.get(name, defaults.get(name)) for side in (old, new)] for name in sorted(old.keys() | new.keys())}
    return [f"{name} ({before!r}, now {now!r})" for name, (before, now) in values.items() if before != now]


def _defaults(config_class: type) -> dict[str, Any]:
    """The defaults of a configuration dataclass, in the spelling that is compared."""
    fields = [field for field in dataclasses.fields(config_class) if field.init]
    made = {f.name: f.default_factory() for f in fields if f.default_factory is not dataclasses.MISSING}
    plain = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    return {name: spelling(getattr(value, "value", value)) for name, value in (made | plain).items()}
