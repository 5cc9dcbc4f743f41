"""Sample K responses to each prompt of one shard, with vLLM in this process.

    python generation/get_hf2.py --model_name_or_path MODEL --dataset_name_or_path prompts.jsonl \\
        --output_dir data/gen_data --K 8                              on 1 GPU, or on the CPU
    bash scripts/test_gen.sh …                                        the same flags, on all GPUs, merged

Shard i of --my_world_size is written to <output_dir>i.jsonl: the prompt's record with `responses`,
`response_token_ids` (what was sampled, end-of-turn token included) and `finish_reasons`, K of each, in input
order.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from baton import program
from baton.arguments import StageArguments, option, parse
from baton.partial import PartialRecords
from baton.progress import Progress
from baton.prompts import PromptSet, shard_range
from baton.stage import Drops, Stage
from baton.templates import check_model_path, load_tokenizer
from generation import engine
from generation.sampling import (
    check_templates,
    count_tokens,
    generated,
    sampling_parameters,
    seed_from,
    unfinished,
)


class Arguments(StageArguments):
    model_name_or_path: str = option(..., "the policy: a model's folder or hub name", changes_result=False)
    dataset_name_or_path: str = option(
        ..., "the prompts: a .jsonl, .jsonl.gz, .json or .parquet file, or a hub name", changes_result=False
    )
    output_dir: str = option(..., "the shard goes to <output_dir><local_index>.jsonl", changes_result=False)
    dataset_key: str | None = option(
        None, "the records' key that holds the prompt; `prompt` or `context_messages` when not given"
    )
    dataset_split: str = option("train", "the split of a hub dataset")
    chat_template: str | None = option(
        None, "a Jinja file that replaces the tokenizer's chat template", changes_result=False
    )
    K: int = option(8, "responses per prompt", ge=1)
    temperature: float = option(1.0, "sampling temperature; 0 is greedy", ge=0)
    top_p: float = option(1.0, "sample from the most likely tokens of this total probability", gt=0, le=1)
    top_k: int = option(-1, "sample from this many most likely tokens; -1 for all", ge=-1)
    max_new_tokens: int = option(1024, "tokens of a response at most", ge=1)
    max_model_len: int | None = option(
        None, "tokens of prompt and response at most; the model's context when not given", ge=2
    )
    stop: list[str] = option([], "strings that end a response")
    eos_ids: list[int] = option([], "token ids that end a response, beside the model's own")
    seed: int = option(42, "seed of the sampling", ge=0)
    local_index: int = option(0, "which shard, from 0", ge=0)
    my_world_size: int = option(1, "how many shards", ge=1)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto", "dtype of the weights and the arithmetic"
    )
    tensor_parallel_size: int = option(1, "GPUs that share one copy of the model", ge=1, changes_result=False)
    gpu_memory_utilization: float = option(
        0.9, "share of a GPU's memory to use", gt=0, le=1, changes_result=False
    )
    max_num_seqs: int | None = option(
        None, "responses in the making at once; vLLM's own choice if not given", ge=1, changes_result=False
    )
    enforce_eager: bool | None = option(
        None, "do not compile the model; when not given, compile on GPUs alone", changes_result=False
    )


def main() -> None:
    engine.prepare_environment()
    arguments = parse(Arguments, __doc__ or "")
    shard = arguments.local_index, arguments.my_world_size
    shard_range(0, *shard)
    check_model_path(arguments.model_name_or_path)
    output = Path(f"{arguments.output_dir}{arguments.local_index}.jsonl")
    inputs = {"prompts": arguments.dataset_name_or_path, "model": arguments.model_name_or_path}
    if arguments.chat_template:
        inputs["chat_template"] = arguments.chat_template

    stage = Stage.begin("generate", arguments, output, inputs)
    if stage is None:
        return
    prompts = PromptSet(arguments.dataset_name_or_path, arguments.dataset_key, arguments.dataset_split)
    count = len(shard_range(len(prompts), *shard))
    partial, drops = PartialRecords(output, count), Drops()
    tokens = sum(count_tokens(record) for _, record in partial.records())
    if partial.done < count:
        tokens += generate(arguments, prompts, partial, drops)
    written = partial.assemble()
    stage.finish(records_in=count, records_out=written, drops=drops, prompts=len(prompts), tokens=tokens)
    engine.leave()


def generate(arguments: Arguments, prompts: PromptSet, partial: PartialRecords, drops: Drops) -> int:
    """Sample responses to the unfinished prompts, each on disk once it is finished; returns the tokens."""
    shard = arguments.local_index, arguments.my_world_size
    tokenizer = load_tokenizer(arguments.model_name_or_path, arguments.chat_template)
    check_templates(tokenizer, prompts, shard)
    llm = engine.start(
        model=arguments.model_name_or_path,
        # Shards, and a run that goes on after a death, draw other random numbers.
        seed=seed_from(arguments.seed, arguments.local_index, partial.done),
        dtype=arguments.dtype,
        max_model_len=arguments.max_model_len,
        max_num_seqs=arguments.max_num_seqs,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        tensor_parallel_size=arguments.tensor_parallel_size,
        enforce_eager=arguments.enforce_eager,
    )
    parameters, records = sampling_parameters(arguments), {}

    def requests() -> Iterator[tuple[str, list[int], Any]]:
        context = llm.model_config.max_model_len
        for position, record, token_ids in unfinished(tokenizer, prompts, shard, partial, drops, context):
            records[str(position)] = record
            yield str(position), token_ids, parameters

    progress, tokens, start = Progress(partial.count, "prompts", partial.done), 0, time.monotonic()
    for key, output in engine.stream(llm, requests(), engine.window(llm, arguments.K)):
        record = generated(records.pop(key), output.outputs)
        partial.append(int(key), record)
        tokens += count_tokens(record)
        progress.update(note=f"{tokens / (time.monotonic() - start):.0f} tokens/s")
    progress.close()
    return tokens


if __name__ == "__mp_main__":  # an engine process, started by spawn
    engine.die_with_parent()

if __name__ == "__main__":
    program.run(main)
