"""The configuration of a Hugging Face trainer: made from a program's settings, and said in the log as it really runs."""

from collections.abc import Iterable
from typing import Any

import datasets
from transformers import set_seed
from transformers.utils import is_torch_cuda_available
from transformers.utils import logging as transformers_logging

from baton import program
from baton.arguments import build_config
from baton.errors import InputError
from baton.parallel import data_parallel
from baton.stage import Stage


def trainer_config(config_class: type, settings: dict[str, Any], own_names: Iterable[str], stage: Stage) -> Any:
    """The trainer's configuration, working in `<output>.partial`. Raises InputError on a bad setting.

    Unless set: no reports to outside services, no GPU where there is none, the last checkpoint kept.
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
        "save_total_limit": 1,
    }
    config = build_config(config_class, defaults | settings | {"output_dir": str(stage.partial_folder)}, own_names)
    config.disable_tqdm = True
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    set_seed(config.seed)
    return config


def log_training(trainer: Any) -> None:
    """Say what the training really runs on."""
    accelerator, args = trainer.accelerator, trainer.args
    program.log_what_runs(
        device=accelerator.device,
        processes=accelerator.num_processes,
        distributed=accelerator.distributed_type.value,
        dtype=f"{trainer.model.dtype} weights, {accelerator.mixed_precision} mixed precision",
        attention=trainer.model.config._attn_implementation,
        parameters=f"{sum(p.numel() for p in trainer.model.parameters()):,}",
        global_batch=args.per_device_train_batch_size * args.gradient_accumulation_steps * data_parallel().size,
    )
