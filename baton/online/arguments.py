"""The arguments of every program that trains online. Nothing heavy is imported with this file."""

import itertools
import math
import shlex
from pathlib import Path
from typing import Literal

from pydantic import SecretStr, model_validator

from baton.arguments import option
from baton.errors import InputError
from baton.launch.words import new_parser, parse_known
from baton.prompts import source_inputs
from baton.scorers import DEFAULT_RUBRIC, check_function, identity, imported_beside, wanted_scorers
from baton.secrets import secret_among
from baton.sources import check_model_path, check_process_model, check_reward_model, check_start, template_input
from baton.training.adapters import LoraArguments, check_lora
from baton.training.reports import check_reports

HERE = "their own are started on this machine, and end with the program"


class OnlineArguments(LoraArguments):
    """What programs that sample from servers and train in between have in common."""

    model_name_or_path: str = option(..., "the policy that the training starts from", changes_result=False)
    ref_model: str | None = option(None, "the reference policy; default: the starting policy", changes_result=False)
    dataset_name_or_path: str = option(
        ..., "prompts: a .jsonl, .jsonl.gz, .json or .parquet file, or a Hugging Face dataset; several with commas between",
        changes_result=False,
    )  # fmt: skip
    dataset_key: str | None = option(None, "key of the prompt; default: `prompt` or `context_messages`")
    dataset_split: str = option("train", "split of a Hugging Face dataset")
    max_samples: int | None = option(None, "take the first so many prompts", ge=1)
    system_prompt: str | None = option(None, "system message for every conversation that has none")
    chat_template: str | None = option(None, "Jinja file that replaces the tokenizer's chat template", changes_result=False)
    output_dir: str = option(..., "folder of the finished policy", changes_result=False)

    # Rollouts
    total_steps: int | None = option(None, "steps; default: as many as `num_episodes` passes over the prompts take", ge=1)
    num_episodes: float = option(1.0, "passes over the prompts", gt=0)
    rollout_batch_size: int = option(128, "prompts of a step", ge=1)
    K: int = option(8, "samples of each prompt", ge=1)
    temperature: float = option(1.0, "of the sampling; PPO and its kin take log-probabilities at the same, DPO at 1", gt=0)
    top_p: float = option(1.0, "sample from the smallest set of tokens of this probability", gt=0, le=1)
    top_k: int = option(-1, "sample from so many tokens; -1: from all")
    min_p: float = option(0.0, "leave out tokens less likely than this share of the likeliest", ge=0, lt=1)
    max_new_tokens: int = option(1024, "longest response, in tokens", ge=1)
    min_new_tokens: int = option(0, "shortest response, in tokens", ge=0)
    max_prompt_length: int = option(1024, "longest prompt, in tokens; longer ones are dropped and counted", ge=1)
    dynamic_sampling: float = option(
        0.0,
        "replace prompts whose samples all have one reward, drawing at most this many times `rollout_batch_size` prompts a "
        "step (DAPO, arXiv 2503.14476); 0: off",
        ge=0,
    )
    staleness: int = option(
        0, "1: a step's rollouts are sampled while the step before it trains, from older weights", ge=0, le=1
    )

    # Rewards
    scorer: list[str] = option(
        [],
        "[NAME=]KIND:TARGET of what scores responses, as in annotate_data/get_rewards.py; a server of it is started",
        changes_result=False,
    )
    weights: list[float] = option([], "weight of each scorer in the reward; default: 1")
    reward_url: list[str] = option([], "address of a reward service that runs already; several are equal", changes_result=False)
    reward_api_key: SecretStr | None = option(None, "what the reward service asks for", changes_result=False)
    reward_args: str = option("", "more words for annotate_data/serve_rm.py, as one text: '--dtype float32 --max_length 2048'")
    reward_timeout: float = option(300.0, "seconds for an answer of the reward service", gt=0, changes_result=False)

    # Servers
    vllm_url: list[str] = option([], f"addresses of vLLM servers that run already; default: {HERE}", changes_result=False)
    vllm_api_key: SecretStr | None = option(None, "what those servers ask for", changes_result=False)
    num_servers: int = option(1, "vLLM servers to start", ge=1, changes_result=False)
    server_gpus: str | None = option(
        None, "ids of the GPUs of the servers, such as 4,5,6,7; default: the training's own, shared", changes_result=False
    )
    reward_gpus: str | None = option(
        None, "ids of the reward server's GPUs; default: the last one that is not in `server_gpus`", changes_result=False
    )
    tensor_parallel_size: int = option(1, "GPUs of a server", ge=1, changes_result=False)
    gpu_memory_utilization: float = option(0.9, "share of a GPU's memory that a server takes", gt=0, le=1, changes_result=False)
    max_num_seqs: int | None = option(None, "responses that a server samples at once", ge=1, changes_result=False)
    server_dtype: Literal["auto", "bfloat16", "float16", "float32"] = option("auto", "of the servers' weights and arithmetic")
    enforce_eager: bool = option(False, "the servers compile nothing", changes_result=False)
    reproducible: bool = option(
        False,
        "the servers sample one response at a time, so that a run samples the same whatever happens in between; slow",
    )
    server_timeout: float = option(600.0, "seconds for an answer of a server", gt=0, changes_result=False)
    sync_timeout: float = option(120.0, "seconds for one transfer of the weights", gt=0, changes_result=False)
    sync_megabytes: float = option(
        256.0, "weights that are held at once on their way to the servers, half of it in a transfer", gt=0, changes_result=False
    )

    # Optimization
    learning_rate: float = option(1e-6, "of the policy", gt=0)
    lr_scheduler_type: str = option("constant", "one of Transformers' schedules: constant, linear, cosine, …")
    warmup_steps: int = option(0, "optimizer steps over which the learning rate rises", ge=0)
    weight_decay: float = option(0.0, "AdamW's", ge=0)
    adam_beta1: float = option(0.9, "AdamW's", ge=0, lt=1)
    adam_beta2: float = option(0.95, "AdamW's", ge=0, lt=1)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: not", ge=0)
    prompts_per_update: int | None = option(None, "prompts of an optimizer step, with all their samples; default: all", ge=1)
    bf16: bool = option(False, "compute in bfloat16; the weights that are trained are float32")
    gradient_checkpointing: bool = option(True, "compute activations again in the backward pass", changes_result=False)
    tokens_per_row: int = option(8192, "most tokens of a packed row, which bounds the memory of activations", ge=1,
                                 changes_result=False)  # fmt: skip
    seed: int = option(42, "seed of prompts, samples and mini-batches")

    @model_validator(mode="after")
    def _keep_what_is_merged(self) -> "OnlineArguments":
        if self.export_dtype is None:  # an adapter is always merged here
            self.export_dtype = "float32" if self.use_peft else "checkpoint"
        return self

    # Long runs
    save_steps: int = option(20, "steps between checkpoints", ge=1, changes_result=False)
    eval_dataset: str | None = option(None, "held-out prompts, sampled and scored every `eval_steps`", changes_result=False)
    eval_steps: int = option(20, "steps between evaluations", ge=1, changes_result=False)
    eval_K: int = option(1, "samples of each held-out prompt", ge=1, changes_result=False)
    report_to: Literal["none", "wandb", "tensorboard", "all"] = option("none", "where metrics go too", changes_result=False)


def check_online(arguments: OnlineArguments) -> None:
    """Raise InputError for what can be refused before anything is read or imported."""
    check_lora(arguments)
    if arguments.load_in_4bit:
        raise InputError("`load_in_4bit`: the servers would sample from other weights than the 4-bit ones: leave it out")
    if arguments.lora_dropout:
        raise InputError("`lora_dropout`: what is trained online is what samples, which has no dropout: leave it out")
    for model in {arguments.model_name_or_path, arguments.ref_model or arguments.model_name_or_path}:
        check_start(model)
        check_model_path(model)
    check_addresses(arguments)
    if bool(arguments.scorer) == bool(arguments.reward_url):
        raise InputError(
            "what scores the responses? Give --scorer KIND:TARGET, whose server is then started, or --reward_url of a service "
            "that runs" + (", not both" if arguments.scorer else "")
        )
    for scorer in wanted_scorers(arguments.scorer):
        if scorer.kind in ("bt", "vllm"):
            check_reward_model(scorer.target, heads_of(arguments), several=scorer.kind == "bt")
        elif scorer.kind == "process":
            check_process_model(scorer.target)
        elif scorer.kind == "function":
            check_function(scorer.target)
    check_reports({"report_to": arguments.report_to})
    if arguments.weights and len(arguments.weights) != len(arguments.scorer):
        raise InputError(f"`weights`: {len(arguments.weights)} numbers for {len(arguments.scorer)} scorers")
    if arguments.min_new_tokens > arguments.max_new_tokens:
        raise InputError(f"`min_new_tokens`: {arguments.min_new_tokens} is above `max_new_tokens`, {arguments.max_new_tokens}")
    if arguments.staleness and arguments.reproducible:
        raise InputError("`reproducible` needs `staleness: 0`: what is sampled while a step trains depends on when it dies")
    if arguments.dynamic_sampling and arguments.dynamic_sampling < 1:
        raise InputError("`dynamic_sampling`: at least 1, that is `rollout_batch_size` prompts, or 0 for off")
    size = arguments.prompts_per_update
    if size and arguments.rollout_batch_size % size:
        raise InputError(f"`prompts_per_update`: {size} does not divide the {arguments.rollout_batch_size} prompts of a step")


def check_addresses(arguments: OnlineArguments) -> None:
    """Raise InputError for what is no address, or for a secret where logs, manifests and process lists would show it."""
    from baton.servers.addresses import check_url

    for name in ("vllm_url", "reward_url"):
        for url in getattr(arguments, name):
            check_url(url, f"`{name}`")
    for scorer in wanted_scorers(arguments.scorer):
        for url in scorer.target.split(",") if scorer.kind in ("http", "judge") else ():
            check_url(url, "`scorer`")
    if secret := secret_among(shlex.split(arguments.reward_args)):
        raise InputError(
            f"`reward_args`: {secret} would be shown in process lists and the manifest: $OPENAI_API_KEY is the key of the "
            "services that scorers ask"
        )


def heads_of(arguments: OnlineArguments) -> list[str] | None:
    """The outputs that `reward_args` names of a reward model that has several; None where it names none.

    Raises InputError for --heads without a word.
    """
    parser = new_parser("`reward_args`", "")
    parser.add_argument("--heads", nargs="+")
    return parse_known(parser, shlex.split(arguments.reward_args))[0].heads


def scorer_settings(arguments: OnlineArguments) -> dict[str, list[str]]:
    """What of the scorers decides the result beside the content of their models and files."""
    return {"scorers": [identity(scorer) for scorer in wanted_scorers(arguments.scorer)]}


def scorer_inputs(arguments: OnlineArguments) -> dict[str, str | Path]:
    """The scorers' models and files, by name; a service's address is none: it may change between a run and its resume.

    The files that `reward_args` names are among them. Raises InputError where one is not there.
    """
    found: dict[str, str | Path] = {}
    given = shlex.split(arguments.reward_args)
    words = [part for word in given for part in (word.split("=", 1) if word.startswith("--") else [word])]
    files = {flag: Path(value) for flag, value in itertools.pairwise(words) if flag in ("--rubric", "--chat_template")}
    for scorer in wanted_scorers(arguments.scorer):
        if scorer.kind == "judge":
            found[f"scorer {scorer.name}: rubric"] = files.get("--rubric", DEFAULT_RUBRIC)
        elif scorer.kind == "function":
            file, _ = check_function(scorer.target)
            found[f"scorer {scorer.name}"] = file
            found |= {f"scorer {scorer.name}: {path.name}": path for path in imported_beside(file)}
        elif scorer.kind != "http":
            found[f"scorer {scorer.name}"] = scorer.target
    if "--chat_template" in files:
        found["chat template of the rewards"] = files["--chat_template"]
    for flag, file in files.items():
        if not file.is_file():
            raise InputError(f"`reward_args`: {flag} {file}: no such file")
    return found


def inputs_of(arguments: OnlineArguments) -> dict[str, str | Path]:
    """What the run reads, by name, for the manifest."""
    inputs: dict[str, str | Path] = {"model": arguments.model_name_or_path}
    inputs["reference"] = arguments.ref_model or arguments.model_name_or_path
    inputs |= source_inputs("prompts", arguments.dataset_name_or_path) | template_input(arguments.chat_template)
    inputs |= scorer_inputs(arguments)
    return inputs | ({"held-out prompts": arguments.eval_dataset} if arguments.eval_dataset else {})


def steps_of(arguments: OnlineArguments, prompts: int) -> int:
    """How many steps the training has, of so many prompts."""
    return arguments.total_steps or max(1, math.ceil(arguments.num_episodes * prompts / arguments.rollout_batch_size))
