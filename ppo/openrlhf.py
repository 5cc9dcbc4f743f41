"""OpenRLHF's names of settings that mean the same here, and those that something else decides here."""

from typing import Any

from baton.errors import InputError
from baton.task import spelling

NAMES = {
    "pretrain": "model_name_or_path",
    "critic_pretrain": "critic_model",
    "prompt_data": "dataset_name_or_path",
    "input_key": "dataset_key",
    "save_path": "output_dir",
    "actor_learning_rate": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "l2": "weight_decay",
    "max_norm": "max_grad_norm",
    "n_samples_per_prompt": "K",
    "generate_max_len": "max_new_tokens",
    "prompt_max_len": "max_prompt_length",
    "init_kl_coef": "kl_coef",
    "lambd": "lam",
    "max_epochs": "num_ppo_epochs",
    "eps_clip": "clip_low",
    "vllm_num_engines": "num_servers",
    "vllm_tensor_parallel_size": "tensor_parallel_size",
    "remote_rm_url": "reward_url",
    "lora_rank": "lora_r",
    "prompt_split": "dataset_split",
    "pretrain_data": "ptx_dataset",
}
# Settings that say what is done here anyway, where they have these values.
DONE_ANYWAY = {
    "apply_chat_template": True, "flash_attn": True, "enable_prefix_caching": True, "packing_samples": True,
    "vllm_sync_backend": "nccl",
}  # fmt: skip
ELSEWHERE = {
    "zero_stage": "`accelerate launch --config_file configs/zero2.yaml` decides how models are spread",
    "adam_offload": "`accelerate launch --config_file configs/zero2_offload.yaml` keeps the optimizer in RAM",
    "micro_train_batch_size": "`tokens_per_row` bounds the memory of a pass, in tokens",
    "micro_rollout_batch_size": "`tokens_per_row` bounds the memory of a pass, in tokens",
    "use_wandb": "`report_to: wandb`, with the key in WANDB_API_KEY",
    "reward_pretrain": "`scorer: bt:MODEL`; several models are several words, and `weights` says what each counts",
    "head_prefix": "a reward model is a sequence classifier of Transformers, whose head is called `score`",
}  # fmt: skip


def own_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of one source (a YAML file, or flags) by the names of run_ppo.py.

    `train_batch_size` counts samples, so it is `prompts_per_update` times the samples of a prompt. Raises InputError for what
    is decided elsewhere, and for two names of one thing.
    """
    settings = dict(settings)
    for name, own in NAMES.items():
        if name in settings:
            if own in settings:
                raise InputError(f"`{name}` and `{own}` are two names of one setting: leave one out")
            settings[own] = settings.pop(name)
    for name, value in DONE_ANYWAY.items():
        if name in settings and spelling(settings.pop(name)) != value:
            raise InputError(f"`{name}` is always {value} here: leave it out")
    for name, advice in ELSEWHERE.items():
        if name in settings:
            raise InputError(f"`{name}` of OpenRLHF: here {advice}")
    if spelling(settings.get("normalize_reward")) in (True, False):
        settings["normalize_reward"] = "running" if spelling(settings["normalize_reward"]) else "none"
    if "train_batch_size" in settings:
        settings["prompts_per_update"] = prompts_of(settings)
    if "lora_r" in settings and "use_peft" not in settings:
        settings["use_peft"] = spelling(settings["lora_r"]) > 0
    return settings


def prompts_of(settings: dict[str, Any]) -> int:
    """The prompts of an optimizer step by OpenRLHF's `train_batch_size`, in samples; it is taken out of `settings`."""
    if "prompts_per_update" in settings:
        raise InputError("`train_batch_size` and `prompts_per_update` are two names of one setting: leave one out")
    if "K" not in settings:
        raise InputError(
            "`train_batch_size` counts samples: give `n_samples_per_prompt` beside it, in the same place (file or flags), or "
            "`prompts_per_update` instead"
        )
    samples, K = spelling(settings.pop("train_batch_size")), spelling(settings["K"])
    if not isinstance(samples, int) or not isinstance(K, int) or K < 1 or samples < K or samples % K:
        raise InputError(
            f"`train_batch_size`: {samples} samples of an optimizer step are no multiple of the {K} samples of a prompt "
            "(`n_samples_per_prompt`)"
        )
    return samples // K
