"""Annotate sampled responses with rewards.

    # one GPU, or the CPU
    python annotate_data/get_rewards.py --dataset_name_or_path data/gen_data.jsonl \\
        --output_dir data/data_with_rewards.jsonl --reward_name_or_path sfairXC/FsfairX-LLaMA3-RM-v0.1
    # eight GPUs
    accelerate launch --num_processes 8 annotate_data/get_rewards.py --dataset_name_or_path …
    # two CPU processes (accelerate launch --cpu would start one)
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 annotate_data/get_rewards.py …

Each record of the output is the input's, with `id` and `rewards`, in the order of the input; beside it <output>.summary.json
says what the rewards look like.
"""

from pathlib import Path
from typing import Literal

import models
from baton.arguments import StageArguments, option, parse
from baton.jsonl import Record
from baton.program import check_processes, log_what_runs, run
from baton.stage import Stage
from work import Responses, check_output


class Arguments(StageArguments):
    dataset_name_or_path: str = option(
        ..., "responses to score: a file or a Hugging Face dataset", changes_result=False
    )
    output_dir: Path = option(
        ..., "the output FILE, such as data/data_with_rewards.jsonl", changes_result=False
    )
    dataset_key: str | None = option(None, "key of the prompt (else `prompt` or `context_messages`)")
    K: int | None = option(None, "responses of each prompt, checked when given", ge=1)
    reward_name_or_path: str = option(
        "sfairXC/FsfairX-LLaMA3-RM-v0.1", "Bradley-Terry reward model", changes_result=False
    )
    chat_template: Path | None = option(None, "Jinja file, for a reward model that has no chat template")
    max_length: int | None = option(
        None, "tokens of a conversation; longer ones lose their beginning (default: the model's)", ge=8
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "of the model; auto: the checkpoint's own"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to run", changes_result=False)
    tokens_per_batch: int | None = option(
        None, "tokens in a batch (default: 65536 on a GPU, 2048 on CPU)", ge=1, changes_result=False
    )


def main() -> None:
    arguments = parse(Arguments, __doc__)
    check_processes()
    check(arguments)
    inputs = {"dataset": arguments.dataset_name_or_path, "reward_model": arguments.reward_name_or_path}
    stage = Stage.begin("annotate", arguments, arguments.output_dir, inputs)
    if stage is None:
        return
    responses = Responses(arguments.dataset_name_or_path, arguments.dataset_key, arguments.K)

    import processes
    from annotate import annotate
    from bradley_terry import BradleyTerry

    device = processes.choose_device(arguments.device)

    def scorer() -> BradleyTerry:
        options = (arguments.dtype, arguments.max_length, arguments.tokens_per_batch, arguments.chat_template)
        model = BradleyTerry(arguments.reward_name_or_path, device, *options)
        log_what_runs(**processes.described(device), **models.described(model.model))
        return model

    annotate(stage, responses, {"reward": scorer}, add_rewards)


def check(arguments: Arguments) -> None:
    """Raise InputError for whatever can be refused without heavy imports."""
    models.check_reward_model(arguments.reward_name_or_path)
    check_output(arguments.output_dir)


def add_rewards(record: Record, scores: dict[str, list[float]]) -> tuple[Record, dict[str, list[float]]]:
    """An annotated record, and its rewards for the summary."""
    return {**record, "rewards": scores["reward"]}, {"rewards": scores["reward"]}


if __name__ == "__main__":
    run(main)
