"""The configuration of a Hugging Face trainer: made from a program's settings, and said in the log as it really runs."""

import logging
from collections.abc import Iterable
from typing import Any

import datasets
from torch import nn
from transformers import set_seed
from transformers.utils import is_torch_cuda_available
from transformers.utils import logging as transformers_logging

from baton import program
from baton.arguments import build_config
from baton.errors import InputError
from baton.parallel import data_parallel
from baton.stage import Stage

log = logging.getLogger("baton")


def trainer_config(
    config_class: type, settings: dict[str, Any], own_names: Iterable[str], stage: Stage, adapter: bool = False, kept: int = 0
) -> Any:
    """The trainer's configuration, working in `<output>.partial`. Raises InputError on a bad setting.

    Unless set: no reports to outside services, no GPU where there is none, the last checkpoint kept, and the best one with
    `load_best_model_at_end`. The dtype in its `model_init_kwargs` is that of `loaded_dtype`, whatever the settings say.

    Args:
        adapter: whether an adapter is trained, and the model itself frozen.
        kept: checkpoints that shall stay after the training.
    """
    settings = dict(settings)
    if settings.get("chat_template_path"):
        raise InputError("`chat_template_path`: give the file with --chat_template instead, which compares it by content")
    for name in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):  # the names that Transformers deprecates
        if name in settings:
            settings[name.replace("gradient", "activation")] = settings.pop(name)
    defaults = {
        "report_to": "none",
        "use_cpu": not is_torch_cuda_available(),
        "activation_checkpointing": True,
        "save_total_limit": max(1, kept),
    }
    config = build_config(config_class, defaults | settings | {"output_dir": str(stage.partial_folder)}, own_names)
    if config.load_best_model_at_end and "save_total_limit" not in settings:
        # With 1 Transformers deletes the last checkpoint at the end, and a death before the export would cost its training.
        config.save_total_limit = max(2, kept)
    asked = (config.model_init_kwargs or {}).get("dtype")
    dtype = loaded_dtype(config, adapter)
    if dtype == "float32" and asked not in (None, "float32"):
        log.info(
            "`model_init_kwargs: {dtype: %s}`: the weights are trained in float32 all the same; `bf16` says what computes with "
            "them, and --export_dtype what is written", asked,
        )  # fmt: skip
    config.model_init_kwargs = {**(config.model_init_kwargs or {}), "dtype": dtype}
    config.disable_tqdm = True
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    set_seed(config.seed)
    return config


def loaded_dtype(config: Any, adapter: bool) -> str:
    """The name of the dtype in which the policy, and so the reference, is loaded.

    Weights that are trained are float32, for a step at the learning rates of fine-tuning is smaller than half the distance of
    two bfloat16 numbers and would be rounded away; autocast computes in bf16. Memory is no reason for anything else: float32
    weights, gradients and Adam's two states are 4 + 4 + 8 = 16 bytes a weight, and bfloat16 weights and gradients beside a
    float32 copy and the states are 2 + 2 + 4 + 8. (Autocast's own bfloat16 copies, 2 bytes, last for the forward pass.)
    DeepSpeed does the latter: it casts what it gets to the dtype that computes.
    Frozen weights under an adapter are as asked, or of the dtype that computes: autocast rounds them to it in each product
    anyway, and a merged adapter makes a float32 checkpoint, whose next round would take twice the memory.
    """
    computes = computing_dtype(config)
    if adapter:
        asked = (config.model_init_kwargs or {}).get("dtype")
        return str(asked or computes).removeprefix("torch.")
    return "float32" if config.deepspeed_plugin is None else computes


def computing_dtype(config: Any) -> str:
    """The name of the dtype in which a TrainingArguments computes."""
    return "bfloat16" if config.bf16 else "float16" if config.fp16 else "float32"


def train_in_float32(model: nn.Module) -> None:
    """Make the trained weights of a model float32, the frozen ones stay."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def precision_of(trainer: Any) -> str:
    """The dtypes of a trainer's weights, and in what it computes, for the log."""
    trained, frozen = (
        {str(p.dtype).removeprefix("torch.") for p in trainer.model.parameters() if p.requires_grad is trains}
        for trains in (True, False)
    )
    weights = f"{', '.join(sorted(trained))} weights"
    if trainer.is_deepspeed_enabled and trained != {"float32"}:
        weights += " and DeepSpeed's float32 copy"
    if frozen:
        weights += f", frozen {', '.join(sorted(frozen))} ones"
    return f"{weights}, {trainer.accelerator.mixed_precision} mixed precision"


def log_training(trainer: Any) -> None:
    """Say what the training really runs on."""
    accelerator, args = trainer.accelerator, trainer.args
    program.log_what_runs(
        device=accelerator.device,
        processes=accelerator.num_processes,
        distributed=accelerator.distributed_type.value,
        dtype=precision_of(trainer),
        attention=trainer.model.config._attn_implementation,
        parameters=f"{sum(p.numel() for p in trainer.model.parameters()):,}",
        global_batch=args.per_device_train_batch_size * args.gradient_accumulation_steps * data_parallel().size,
    )
