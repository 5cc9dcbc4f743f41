"""The arguments that every generation program has: which prompts, and how to sample."""

from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Json

from baton.ahead import is_local, later, will_be_made
from baton.arguments import StageArguments, option
from baton.errors import InputError
from baton.mixing import Selection, parse_probs
from baton.prompts import PromptSet, read_records, source_inputs, split_sources
from baton.records import prompt_of
from baton.sampling import changes
from baton.sources import check_hub_ahead, template_input

SpeculativeConfig = Json[dict[str, Any]] | dict[str, Any] | None  # a flag's text, or a mapping in a YAML file
QUANTIZATION = "weights in fewer bits, as vLLM names it: fp8, awq, gptq, bitsandbytes, …; the checkpoint's own if not given"
TRUST_REMOTE_CODE = "let a model run the Python code in its folder or repository: code that you have read"
CHECKED = 1000  # records of a prompt set that `--check` reads


class SamplingArguments(StageArguments):
    """How one response is sampled; generation/chat.py shares them."""

    system_prompt: str | None = option(None, "a system message for conversations that have none")
    chat_template: str | None = option(None, "a Jinja file that replaces the tokenizer's chat template", changes_result=False)
    temperature: float = option(1.0, "sampling temperature; 0 is greedy", ge=0)
    top_p: float = option(1.0, "sample from the most likely tokens of this total probability", gt=0, le=1)
    top_k: int = option(-1, "sample from this many most likely tokens; -1 for all", ge=-1)
    max_new_tokens: int = option(1024, "tokens of a response at most", ge=1)
    min_new_tokens: int | None = option(None, "tokens of a response at least: none before them ends it", ge=1)
    stop: list[str] = option([], "strings that end a response")
    eos_ids: list[int] = option([], "token ids that end a response, beside the model's own")
    seed: int = option(42, "seed of the sampling", ge=0)


class GenerationArguments(SamplingArguments):
    dataset_name_or_path: str = option(
        ...,
        "the prompts: a .jsonl, .jsonl.gz, .json or .parquet file, or a hub name; several with commas between",
        changes_result=False,
    )
    dataset_key: str | None = option(None, "the key of the prompt; `prompt` or `context_messages` if not given")
    dataset_split: str = option("train", "the split of a hub dataset")
    prompt_prefix: str | None = option(
        None,
        "text that the policy reads before the last user turn, such as '<reward_5> ' after conditional SFT; the record keeps "
        "the prompt without it",
    )
    dataset_probs: str | None = option(None, "draw from several datasets at these rates, such as 0.7,0.3, until one is used up")
    max_samples: int | None = option(None, "take at most N prompts", ge=1)
    rollout_batch_size: int | None = option(None, "prompts per round, of a seeded shuffle; all if not given", ge=1)
    iter: int = option(0, "which round, from 0: takes prompts iter*rollout_batch_size onwards, wrapping around", ge=0)
    K: int = option(8, "responses per prompt", ge=1)
    data_seed: int | None = option(
        None, "seed of the prompts' shuffle and draws; --seed if not given. Rounds that take windows of one set need the same",
        ge=0,
    )  # fmt: skip
    response_logps: bool = option(
        False, "keep the log-probability, in nats, of each sampled token under the distribution that was sampled"
    )
    reproducible: bool = option(
        False,
        "seed every prompt by itself: the same responses whatever the shards, resumes or neighbours in the batch",
    )


def prompt_inputs(arguments: GenerationArguments) -> dict[str, str]:
    """The files or hub names that the prompts come from, by name, for the manifest."""
    return source_inputs("prompts", arguments.dataset_name_or_path) | template_input(arguments.chat_template)


def check(arguments: GenerationArguments) -> None:
    """Raise InputError for settings that contradict each other."""
    selection(arguments)
    if arguments.temperature == 0 and arguments.K > 1:
        raise InputError(f"--temperature 0 is greedy: {arguments.K} responses would be one; give --K 1")
    check_sampling(arguments)


def check_sampling(arguments: SamplingArguments) -> None:
    """Raise InputError for sampling settings that contradict each other."""
    if not all(arguments.stop):
        raise InputError("--stop: an empty string would end every response at once")
    if (arguments.min_new_tokens or 0) > arguments.max_new_tokens:
        raise InputError(f"--min_new_tokens {arguments.min_new_tokens} is above --max_new_tokens {arguments.max_new_tokens}")


def changed(arguments: SamplingArguments) -> list[str]:
    """The settings with which the sampled distribution is not the model's own, such as `temperature 0.7`."""
    return changes(arguments.model_dump())


def selection(arguments: GenerationArguments) -> Selection:
    """Which of the prompts to take. Raises InputError for weights that do not fit the datasets."""
    sources = len(split_sources(arguments.dataset_name_or_path))
    if arguments.iter and arguments.rollout_batch_size is None:
        raise InputError(f"--iter {arguments.iter} needs --rollout_batch_size, the number of prompts per round")
    return Selection(
        probs=parse_probs(arguments.dataset_probs, sources),
        max_samples=arguments.max_samples,
        iteration=arguments.iter,
        batch_size=arguments.rollout_batch_size,
        seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
    )


def check_prompts_ahead(arguments: GenerationArguments, output: Path) -> None:
    """For `--check`: have the prompt sets looked at, each once, that the work on `output` would read."""
    for source in split_sources(arguments.dataset_name_or_path):
        if not is_local(source):
            check_hub_ahead(source, output, kind="dataset")
        elif will_be_made(output) and Path(source).is_file():
            later(f"prompts {source} {arguments.dataset_key}", partial(check_first_prompts, source, arguments.dataset_key))


def check_first_prompts(source: str, key: str | None) -> None:
    """Raise InputError where one of the first records of a file holds no prompt."""
    for where, record in islice(read_records(source), CHECKED):
        prompt_of(record, where, key)


def read_prompts(arguments: GenerationArguments) -> PromptSet:
    """The prompts of all shards. Raises InputError, naming file:line, for a record without a valid prompt."""
    return PromptSet(
        arguments.dataset_name_or_path,
        arguments.dataset_key,
        arguments.dataset_split,
        selection(arguments),
        arguments.system_prompt,
        arguments.prompt_prefix,
    )
