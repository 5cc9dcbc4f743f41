"""Which scorers there are, and how one is requested: `[NAME=]KIND:TARGET`.

| kind | target | score |
| --- | --- | --- |
| `bt`       | reward model            | Bradley-Terry reward, with transformers |
| `vllm`     | reward model            | the same, through vLLM's pooling runner |
| `pair`     | causal LM               | mean probability to win against the prompt's other responses, 0 to 1 |
| `process`  | process reward model    | of the probabilities that its steps are right, 0 to 1 |
| `custom`   | reward model            | of a model with its own code (needs --trust_remote_code) |
| `function` | file.py:name            | of `name(prompts, responses, records) -> list[float]` |
| `http`     | URL[,URL…]              | of a reward service, OpenRLHF's `remote_rm_url` shape |
| `judge`    | URL[,URL…] ending in /v1 | 1 to 10, by a judge model behind an OpenAI-compatible API |
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from annotate_data.work import Scorer
from baton.errors import InputError
from baton.models import loading
from baton.program import log_what_runs, world_size
from baton.scorers import DEFAULT_RUBRIC, Wanted, check_function, imported_beside
from baton.servers.addresses import check_url
from baton.sources import check_model_path, check_process_model, check_reward_model
from baton.steps import separator_of


def check(scorer: Wanted, arguments: Any) -> dict[str, str | Path]:
    """Raise InputError for whatever can be refused without heavy imports; return the scorer's inputs, by name.

    A service's address is no input: it may change between a run and its resume.
    """
    label = f"scorer {scorer.name}"
    if scorer.kind in ("bt", "vllm"):
        check_reward_model(scorer.target, arguments.heads, several=scorer.kind == "bt")
        return {label: scorer.target}
    if scorer.kind == "process":
        separator_of(arguments.step_separator)
        check_process_model(scorer.target)
        return {label: scorer.target}
    if scorer.kind == "pair":
        check_model_path(scorer.target)
        return {label: scorer.target}
    if scorer.kind == "custom":
        if not arguments.trust_remote_code:
            raise InputError(f"--scorer custom:{scorer.target} runs the code in that folder: allow it with --trust_remote_code")
        check_model_path(scorer.target)
        return {label: scorer.target}
    if scorer.kind == "function":
        file = check_function(scorer.target)[0]
        return {label: file} | {f"{label}: {path.name}": path for path in imported_beside(file)}
    for url in scorer.target.split(","):
        check_url(url, "--scorer")
    if scorer.kind == "http":
        return {}
    if arguments.judge_model is None:
        raise InputError("--scorer judge needs --judge_model, the name of the model on the server")
    if not (arguments.rubric or DEFAULT_RUBRIC).is_file():
        raise InputError(f"--rubric {arguments.rubric or DEFAULT_RUBRIC}: no such file")
    return {f"{label}: rubric": arguments.rubric or DEFAULT_RUBRIC}


def maker(scorer: Wanted, arguments: Any) -> Callable[[], Scorer]:
    """A function that makes the scorer: loads its model, or prepares its calls."""
    return lambda: MAKERS[scorer.kind](scorer.target, arguments, arguments.model_settings())


def _transformers(module: str, name: str) -> Callable[..., Scorer]:
    """A maker of a scorer that runs a transformers model on this process's device: the class `name` of a module here."""

    def make(target: str, arguments: Any, settings: loading.Settings) -> Scorer:
        import importlib

        from baton.models import devices

        device = devices.choose_device(arguments.device)
        scorer = getattr(importlib.import_module(f"annotate_data.{module}"), name)(target, device, settings)
        log_what_runs(**devices.described(device), **loading.described(scorer.model))
        return scorer

    return make


def _vllm(target: str, arguments: Any, settings: loading.Settings) -> Scorer:
    from annotate_data.vllm_reward import VLLMReward

    return VLLMReward(target, settings)


def _function(target: str, arguments: Any, settings: loading.Settings) -> Scorer:
    from annotate_data.function_reward import FunctionReward

    workers = arguments.workers or max(1, len(os.sched_getaffinity(0)) // world_size())
    log_what_runs(function=target, processes=world_size(), workers=workers)
    return FunctionReward(target, workers, arguments.timeout)


def _http(target: str, arguments: Any, settings: loading.Settings) -> Scorer:
    from annotate_data.http_reward import HTTPReward

    workers = arguments.workers or 32
    log_what_runs(service=target, processes=world_size(), requests_at_once=workers)
    return HTTPReward(target.split(","), arguments.key(), workers, arguments.timeout, arguments.tries)


def _judge(target: str, arguments: Any, settings: loading.Settings) -> Scorer:
    from annotate_data.judge import Judge

    workers = arguments.workers or 32
    rubric = (arguments.rubric or DEFAULT_RUBRIC).read_text(encoding="utf-8")
    log_what_runs(judge=arguments.judge_model, service=target, processes=world_size(), requests_at_once=workers)
    return Judge(
        target.split(","),
        arguments.judge_model,
        rubric,
        arguments.key(),
        workers,
        arguments.timeout,
        arguments.tries,
    )


# Those that load a model into this process, which a later stage of the process may use again (`kept.py`).
IN_PROCESS: dict[str, Callable[[str, Any, loading.Settings], Scorer]] = {
    "bt": _transformers("bradley_terry", "BradleyTerry"),
    "pair": _transformers("pair_preference", "PairPreference"),
    "process": _transformers("process_reward", "ProcessReward"),
    "custom": _transformers("custom_model", "CustomModel"),
}
MAKERS: dict[str, Callable[[str, Any, loading.Settings], Scorer]] = {
    **IN_PROCESS,
    "vllm": _vllm,
    "function": _function,
    "http": _http,
    "judge": _judge,
}
