"""From arguments to models on their devices: configuration, memory, learner and reference."""

import logging
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from transformers import TrainingArguments, get_scheduler, set_seed
from transformers.utils import is_torch_cuda_available
from transformers.utils import logging as transformers_logging

from baton import program
from baton.errors import InputError
from baton.models import forward
from baton.models.attention import NAME
from baton.models.trees import Row
from baton.online.arguments import OnlineArguments
from baton.online.learner import Learner, optimizer_of
from baton.online.models import Models, load_actor, load_critic, plain
from baton.stage import Stage
from baton.training.adapters import adapter_config
from baton.training.config import loaded_dtype
from baton.training.memory import check_memory, estimate, outline, sharding_of, with_critic
from baton.training.reference import load_as_policy
from baton.training.sharding import unsharded

log = logging.getLogger("baton")

# Processes wait for each other: the others, while process 0 starts servers (`own.START_SECONDS`) or samples held-out prompts.
# Where one dies, the launcher ends the others at once.
WAIT_SECONDS = 4 * 3600


def configuration(arguments: OnlineArguments, stage: Stage) -> TrainingArguments:
    """Transformers' configuration, by which models are loaded, spread and computed as in every training. Raises InputError."""
    on_gpu, on_deepspeed = is_torch_cuda_available(), parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    try:
        config = TrainingArguments(
            output_dir=str(stage.partial_folder),
            bf16=arguments.bf16,
            use_cpu=not on_gpu and not on_deepspeed,  # with it, Accelerate would take DDP instead
            ddp_timeout=WAIT_SECONDS,
            ddp_backend=None if on_gpu or program.world_size() == 1 else "gloo",
            activation_checkpointing=arguments.gradient_checkpointing,
            per_device_train_batch_size=1,
            seed=arguments.seed,
            report_to="none",
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    config.model_init_kwargs = {}
    config.model_init_kwargs["dtype"] = loaded_dtype(config, arguments.use_peft)
    if sharding_of(config).stage == 3 and arguments.use_peft:
        raise InputError("`use_peft`: an adapter is not trained online under ZeRO-3 or FSDP: take ZeRO-2 or DDP")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # what is missing in a critic's checkpoint is said here
    datasets.disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # each file of a checkpoint
    set_seed(arguments.seed)
    return config


def accelerator_of(arguments: OnlineArguments, config: TrainingArguments, metrics_folder: str) -> Accelerator:
    """The accelerator that the launcher's variables and the configuration describe."""
    trackers = None if arguments.report_to == "none" else arguments.report_to
    plugin = config.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
        plugin.deepspeed_config["gradient_accumulation_steps"] = 1
        plugin.deepspeed_config["gradient_clipping"] = arguments.max_grad_norm
    accelerator = Accelerator(
        mixed_precision="bf16" if arguments.bf16 else "no",
        cpu=config.use_cpu or None,
        deepspeed_plugin=plugin,
        log_with=trackers,
        project_dir=metrics_folder,
    )
    if trackers:
        accelerator.init_trackers("baton")
    return accelerator


def learner_of(
    arguments: OnlineArguments, config: TrainingArguments, accelerator: Accelerator, critic: str | None = None, **more: float
) -> Learner:
    """The learner of a training, its models loaded; `critic` is the model that a critic starts from.

    `more`: `total_updates`, the optimizer steps of the training; with a critic also `critic_learning_rate`, and
    `frozen_updates`, the first ones that leave the actor as it is: its warm-up begins after them, and its schedule spans the
    others. Logs the memory that this takes before anything is loaded.
    """
    size = outline(arguments.model_name_or_path, adapter_config(arguments))
    needs = estimate(size, config, sharding_of(config), arguments.tokens_per_row, reference=reference_in_memory(arguments))
    if critic is not None:
        with unsharded(config):
            outlined = outline(critic)
        needs = with_critic(needs, estimate(outlined, config, sharding_of(config), 1))
    check_memory(needs, config)
    dtype = getattr(torch, config.model_init_kwargs["dtype"])
    actor: nn.Module = load_actor(arguments.model_name_or_path, dtype)
    of_critic = None if critic is None else load_critic(critic, dtype, arguments.seed)
    for model in (actor, of_critic):
        if model is not None and arguments.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    if adapter := adapter_config(arguments):
        from peft import get_peft_model

        actor = get_peft_model(actor, adapter)
    models = Models(actor, of_critic, arguments.temperature)
    settings = {"betas": (arguments.adam_beta1, arguments.adam_beta2), "weight_decay": arguments.weight_decay}
    optimizer = optimizer_of(models, arguments.learning_rate, more.get("critic_learning_rate", 0.0), **settings)
    total, frozen = int(more["total_updates"]), int(more.get("frozen_updates", 0))
    schedules = [factor_of(arguments.lr_scheduler_type, arguments.warmup_steps, max(n, 1)) for n in (total - frozen, total)]

    def factor(update: int, group: int) -> float:
        return schedules[group](update)

    learner = Learner(models, optimizer, accelerator, factor, arguments.tokens_per_row, arguments.max_grad_norm)
    log_models(learner, accelerator)
    return learner


def factor_of(name: str, warmup: int, total: int) -> Any:
    """The learning rate by optimizer step, as a share of the highest. Raises InputError for a schedule that there is not."""
    nothing = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    try:
        (schedule,) = get_scheduler(name, nothing, warmup, total).lr_lambdas
    except (ValueError, AttributeError):
        raise InputError(f"`lr_scheduler_type`: {name} cannot be used here; constant, linear and cosine can") from None
    # A warm-up of the constant schedule is another one's name in Transformers.
    return (lambda step: min(1.0, (step + 1) / warmup)) if name == "constant" and warmup else schedule


def reference_in_memory(arguments: OnlineArguments) -> bool:
    """Whether the reference is a model of its own: an adapter's is the model without it."""
    return not arguments.use_peft or arguments.ref_model not in (None, arguments.model_name_or_path)


def reference_of(arguments: OnlineArguments, config: TrainingArguments) -> Any:
    """The frozen reference for packed rows, or None where it is the actor without its adapter."""
    if not reference_in_memory(arguments):
        return None
    reference = load_as_policy(arguments.ref_model or arguments.model_name_or_path, config)
    inner = getattr(reference, "module", reference)  # in DeepSpeed's engine
    inner.eval().requires_grad_(False)
    if reason := forward.obstacle(inner):
        raise InputError(f"`ref_model`: it cannot take packed rows: {reason}")
    inner.config._attn_implementation = NAME
    return inner


def reference_logps(learner: Learner, reference: Any | None, row: Row, temperature: float) -> Tensor:
    """ln p of a row's scored tokens (N,) under `reference_of`, in the precision in which the policy computes."""
    learner.count(row, passes=1)
    with learner.accelerator.autocast():
        if reference is not None:
            return forward.logps(reference, row, temperature)
        actor = learner.models.actor
        with actor.disable_adapter():
            return forward.logps(plain(actor), row, temperature)


def log_models(learner: Learner, accelerator: Accelerator) -> None:
    """Say what the training really runs on."""
    models = learner.models
    trained = {str(p.dtype).removeprefix("torch.") for p in models.parameters() if p.requires_grad}
    program.log_what_runs(
        device=accelerator.device,
        processes=accelerator.num_processes,
        distributed=accelerator.distributed_type.value,
        dtype=f"{', '.join(sorted(trained))} weights, {accelerator.mixed_precision} mixed precision",
        attention=plain(models.actor).config._attn_implementation,
        parameters=f"{parameters_of(models.actor):,}",
        critic=f"{parameters_of(models.critic):,}" if models.critic is not None else "none",
    )


def parameters_of(model: nn.Module) -> int:
    """How many parameters a model has, those that ZeRO-3 has spread over processes in full."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
