"""OpenRLHF's names of PPO's settings that mean the same here, and those that something else decides here."""

from typing import Any

from baton import openrlhf
from baton.errors import InputError
from baton.task import spelling

NAMES = openrlhf.NAMES | {
    "critic_pretrain": "critic_model",
    "prompt_data": "dataset_name_or_path",
    "actor_learning_rate": "learning_rate",
    "n_samples_per_prompt": "K",
    "generate_max_len": "max_new_tokens",
    "init_kl_coef": "kl_coef",
    "lambd": "lam",
    "max_epochs": "num_ppo_epochs",
    "eps_clip": "clip_low",
    "vllm_num_engines": "num_servers",
    "vllm_tensor_parallel_size": "tensor_parallel_size",
    "remote_rm_url": "reward_url",
    "prompt_split": "dataset_split",
    "pretrain_data": "ptx_dataset",
}
DONE_ANYWAY = openrlhf.DONE_ANYWAY | {"vllm_sync_backend": "nccl"}
ELSEWHERE = openrlhf.ELSEWHERE | {
    "micro_train_batch_size": "`tokens_per_row` bounds the memory of a pass, in tokens",
    "micro_rollout_batch_size": "`tokens_per_row` bounds the memory of a pass, in tokens",
    "reward_pretrain": "`scorer: bt:MODEL`; several models are several words, and `weights` says what each counts",
    "head_prefix": "a reward model is a sequence classifier of Transformers, whose head is called `score`",
}


def own_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of one source (a YAML file, or flags) by the names of run_ppo.py.

    `train_batch_size` counts samples, so it is `prompts_per_update` times the samples of a prompt. Raises InputError as
    `openrlhf.renamed`.
    """
    settings = openrlhf.renamed(settings, NAMES, DONE_ANYWAY, ELSEWHERE)
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
