"""Rewards of a Bradley-Terry model through vLLM's pooling runner: the raw score, no activation."""

import os
from collections.abc import Iterable, Iterator
from typing import Any

from annotate_data.conversations import token_ids
from annotate_data.work import Score, Task
from baton.errors import InputError
from baton.models import loading
from baton.models.batching import windows
from baton.models.templates import load_tokenizer
from baton.program import log_what_runs, world_size
from baton.sources import check_reward_model


class VLLMReward:
    """A reward model in an engine of its own. Call it with tasks: it yields the score of each missing response."""

    def __init__(self, path: str, settings: loading.Settings):
        prepare_environment()
        self.tokenizer = load_tokenizer(path, settings.chat_template)
        self.llm = pooling_engine(path, settings)
        config = self.llm.llm_engine.vllm_config.model_config
        # Of a model of the hub, or of a stage that had not run yet, nothing was known before.
        check_reward_model(path, config=config.hf_config.to_dict())
        self.max_length = config.max_model_len
        from vllm.platforms import current_platform

        log_what_runs(
            device=current_platform.get_device_name(),
            processes=world_size(),
            model=", ".join(config.architectures),
            engine="vLLM pooling",
            dtype=str(config.dtype).removeprefix("torch."),
        )

    def __call__(self, tasks: Iterable[Task]) -> Iterator[Score]:
        for window in windows((task, index) for task in tasks for index in task.missing):
            sequences, notes = token_ids(self.tokenizer, window, self.max_length)
            prompts = [{"prompt_token_ids": ids} for ids in sequences]
            for (task, index), output, note in zip(window, self.llm.classify(prompts, use_tqdm=False), notes, strict=True):
                yield Score(task, index, output.outputs.probs[0], note)


def prepare_environment() -> None:
    """Set what vLLM reads from the environment, before it is imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; nothing is cached for long here
    if world_size() > 1:  # each process has an engine of its own, which may see one GPU only
        gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[local_rank] if gpus else str(local_rank)


def pooling_engine(path: str, settings: loading.Settings) -> Any:
    """vLLM's engine with a reward model. Raises InputError if vLLM refuses the model."""
    from vllm import LLM
    from vllm.config import PoolerConfig
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    if world_size() == 1 and on_cpu:  # within this process it starts several times as fast
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        return LLM(
            path,
            runner="pooling",
            convert="classify",
            pooler_config=PoolerConfig(use_activation=False),
            dtype=settings.dtype,
            max_model_len=settings.max_length,
            enforce_eager=on_cpu,
        )
    except ValueError as error:
        raise InputError(f"{path}: vLLM refuses it as a reward model: {error}") from None
