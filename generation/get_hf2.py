"""Sample K responses to each prompt of one shard, with an engine of its own.

    python generation/get_hf2.py --model_name_or_path MODEL --dataset_name_or_path prompts.jsonl \\
        --output_dir data/gen_data --K 8                              on 1 GPU, or on the CPU
    bash scripts/test_gen.sh …                                        the same flags, on all GPUs, merged

Shard i of --my_world_size is written to <output_dir>i.jsonl: the prompt's record with `responses`,
`response_token_ids` (what was sampled, end-of-turn token included) and `finish_reasons`, K of each, in input
order; with --response_logps also `response_logps`, K lists. After a death any number of shards goes on: what one has
sampled is not sampled again by another.
"""

import sys
from pathlib import Path
from typing import Literal

from baton import program, shards
from baton.arguments import option, parse
from baton.drops import Drops
from baton.errors import InputError
from baton.launch import gpus
from baton.launch.words import new_parser, parse_known
from baton.models.templates import load_tokenizer
from baton.openrlhf import own_names
from baton.partial import PartialRecords, shard_range
from baton.prompts import PromptSet
from baton.sources import check_hub, check_hub_ahead, check_model_path
from generation import engine, sampling
from generation.arguments import (
    QUANTIZATION,
    TRUST_REMOTE_CODE,
    GenerationArguments,
    SpeculativeConfig,
    check,
    check_prompts_ahead,
    prompt_inputs,
    read_prompts,
)


class Arguments(GenerationArguments):
    model_name_or_path: str = option(..., "the policy: a model's folder or hub name", changes_result=False)
    output_dir: str = option(..., "the shard goes to <output_dir><local_index>.jsonl", changes_result=False)
    local_index: int = option(0, "which shard, from 0", ge=0, changes_result=False)
    my_world_size: int = option(1, "how many shards; may change between a run and its resume", ge=1, changes_result=False)
    backend: Literal["vllm", "hf"] = option("vllm", "the engine; hf is transformers, slow, where vLLM cannot run")
    max_model_len: int | None = option(None, "tokens of prompt and response; the model's context if not given", ge=2)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option("auto", "of weights and arithmetic")
    quantization: str | None = option(None, QUANTIZATION)
    trust_remote_code: bool = option(False, TRUST_REMOTE_CODE, changes_result=False)
    tensor_parallel_size: int = option(1, "GPUs that share one copy of the model", ge=1, changes_result=False)
    gpu_memory_utilization: float = option(0.9, "share of a GPU's memory", gt=0, le=1, changes_result=False)
    max_num_seqs: int | None = option(
        None, "responses sampled at once; the engine's own choice if not given", ge=1, changes_result=False
    )
    max_num_batched_tokens: int | None = option(
        None, "tokens, of prompts and responses, in one step; the engine's own choice for the device if not given",
        ge=1, changes_result=False,
    )  # fmt: skip
    speculative_config: SpeculativeConfig = option(
        None,
        "vLLM's settings of speculative decoding, as JSON: its `method`, `num_speculative_tokens`, …",
        changes_result=False,
    )
    enforce_eager: bool | None = option(
        None, "do not compile the model; if not given, compile on GPUs alone", changes_result=False
    )


def main() -> None:
    engine.prepare_environment()
    with shards.noting_refusal(*named_shard(sys.argv[1:])):
        arguments = parse(Arguments, __doc__ or "", accept=lambda settings: own_names(settings, Arguments.model_fields))
        inputs = checked_inputs(arguments)
    prefix, shard = Path(arguments.output_dir), (arguments.local_index, arguments.my_world_size)
    check_device = gpus.check_vllm if arguments.backend == "vllm" else lambda: None
    stage = shards.begin("generate", arguments, prefix, *shard, inputs, check_device)
    if stage is None:
        output = shards.shard_path(prefix, arguments.local_index)
        check_hub_ahead(arguments.model_name_or_path, output)
        check_prompts_ahead(arguments, output)
        return
    prompts = read_prompts(arguments)
    span = shard_range(len(prompts), *shard)
    partial, drops = PartialRecords(prefix, len(prompts), span, stage.part), Drops()
    tokens = sum(sampling.count_tokens(record) for _, record in partial.records())
    if partial.done < len(span):
        tokens += generate(arguments, prompts, partial, drops)
    written = partial.assemble(stage.assembled)
    stage.finish(records_in=len(span), records_out=written, drops=drops, prompts=len(prompts), tokens=tokens)


def named_shard(words: list[str]) -> tuple[Path, int]:
    """Prefix and index of the shard that a command line would make, even if its other words are refused; none for `--check`."""
    if "--check" in words:
        return Path(), 0
    parser = new_parser("get_hf2.py", "")
    parser.add_argument("--output_dir", default="")
    parser.add_argument("--local_index", default="0")
    named, _ = parse_known(parser, [word for word in words if word not in ("-h", "--help")])
    return Path(named.output_dir), int(named.local_index) if named.local_index.isdigit() else 0


def checked_inputs(arguments: Arguments) -> dict[str, str | Path]:
    """What the shard is made from, by name. Raises InputError for arguments that cannot be."""
    shard_range(0, arguments.local_index, arguments.my_world_size)
    if not Path(arguments.output_dir).name or arguments.output_dir.endswith("/"):
        raise InputError(f"--output_dir {arguments.output_dir}: give the beginning of file names, such as data/gen_data")
    check_model_path(arguments.model_name_or_path)
    check(arguments)
    return {**prompt_inputs(arguments), "model": arguments.model_name_or_path}


def generate(arguments: Arguments, prompts: PromptSet, partial: PartialRecords, drops: Drops) -> int:
    """Sample responses to the unfinished prompts, each on disk once it is finished; returns the tokens."""
    shard = arguments.local_index, arguments.my_world_size
    model, trusts = arguments.model_name_or_path, arguments.trust_remote_code
    check_hub(model)
    tokenizer = load_tokenizer(model, arguments.chat_template, trust_remote_code=trusts)
    sampling.check_tokenizer(tokenizer, arguments, prompts, shard)
    if arguments.backend == "hf":
        from generation import transformers_engine

        sample = transformers_engine.start(arguments, tokenizer, already_done=partial.done)
    else:
        sample = engine.start(arguments, already_done=partial.done)
    tasks = sampling.unfinished(tokenizer, prompts, shard, partial, drops, sample.context)
    return sampling.write(sample, tasks, partial)


if __name__ == "__mp_main__":  # an engine process, started by spawn
    engine.die_with_parent()

if __name__ == "__main__":
    program.run(main)
