"""Generation speed: Baton's offline and server modes against bare `vllm.LLM.generate`, on the same prompts.

    python benchmarks/generate.py                                      a random Llama of 5 M parameters
    python benchmarks/generate.py --model_path SMOLLM2 --prompts 32 --K 4
    python benchmarks/generate.py --model MODEL --prompts 2000 --max_new_tokens 512
    python benchmarks/generate.py --no_servers                         the offline mode alone

Bare vLLM gets token ids and returns objects in memory; Baton renders the chat template, tokenises, writes every
record to disk as it finishes, sorts the output and writes the manifest. The offline sides use one engine in turn,
after a warm-up; engine start and server start count on no side. Server mode: one server, its client on the same
machine. The unit is sampled tokens a second.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from baton import arguments as settings
from baton import shards
from baton.drops import Drops
from baton.models.templates import load_tokenizer
from baton.partial import PartialRecords
from baton.servers.pool import Servers
from baton.stage import Stage
from generation import engine, gen_hf, get_hf2, sampling
from generation.arguments import read_prompts

ROOT = Path(__file__).resolve().parents[1]
REGISTER = ["bash", str(ROOT / "generation/register_server.sh")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", "--model_path", help="a model's folder or hub name; made on the spot if not given")
    parser.add_argument("--prompts", type=int, default=64, help="prompts, of 10 to 250 tokens")
    parser.add_argument("--K", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--dtype", default="auto", help="as in generation/; float32 on a CPU without bfloat16")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side")
    parser.add_argument("--no_servers", action="store_true")
    parser.add_argument("--offline_side", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.offline_side:
        run_offline(args, args.offline_side)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        args.model = args.model or make_model(folder / "model")
        write_prompts(folder / "prompts.jsonl", args.prompts)
        # In a process of its own, so that its memory and cores are free for the server afterwards.
        command = [sys.executable, __file__, "--offline_side", folder, *sys.argv[1:], "--model", args.model]
        subprocess.run([str(word) for word in command], check=True)
        sides = json.loads((folder / "speeds.json").read_text())
        if not args.no_servers:
            sides["servers"] = run_servers(args, folder)
    bare = statistics.median(sides["bare"])
    for side, speeds in sides.items():
        ratios = [speed / other for speed, other in zip(speeds, sides["bare"], strict=True)]
        runs = " ".join(f"{speed:.0f}" for speed in speeds)
        median = statistics.median(speeds)
        print(
            f"{side:8}  {median:9.0f} tokens/s  {median / bare:.3f} of bare   (runs: {runs}; by turn: "
            f"{' '.join(f'{ratio:.3f}' for ratio in ratios)})"
        )


def make_model(folder: Path) -> str:
    """A Llama of random weights with 5 M parameters, 6 layers of width 256, and a tokenizer."""
    from tests.inference.tiny_policy import make_tiny_policy

    return str(make_tiny_policy(folder, context=1024, hidden=256, layers=6))


def write_prompts(path: Path, count: int) -> None:
    generator = random.Random(0)
    words = "the film was a quiet joy from start to finish and its story moved me".split()
    with path.open("w") as file:
        for _ in range(count):
            text = " ".join(generator.choices(words, k=generator.randint(8, 160)))
            file.write(json.dumps({"prompt": text}) + "\n")


def flags(args: argparse.Namespace, folder: Path) -> list[str]:
    words = ["--dataset_name_or_path", folder / "prompts.jsonl", "--K", args.K]
    return [str(word) for word in [*words, "--max_new_tokens", args.max_new_tokens, "--overwrite"]]


def run_offline(args: argparse.Namespace, folder: Path) -> None:
    """Bare vLLM and Baton in turn on one engine; writes their speeds to `speeds.json`."""
    engine.prepare_environment()
    words = [*flags(args, folder), "--model_name_or_path", args.model, "--output_dir", str(folder / "gen")]
    words += ["--dtype", args.dtype]
    arguments = settings.parse(get_hf2.Arguments, "", words)
    sample = engine.start(arguments, already_done=0)
    speeds: dict[str, list[float]] = {"bare": [], "offline": []}
    sides = [("bare", bare_turn), ("offline", offline_turn)]
    for turn in range(args.repeats + 1):
        for side, run in reversed(sides) if turn % 2 else sides:  # so that a machine that slows down slows both
            speed = run(sample, arguments, folder)
            if turn:  # the first is the warm-up
                speeds[side].append(speed)
    (folder / "speeds.json").write_text(json.dumps(speeds))


def bare_turn(sample: engine.Sampler, arguments: get_hf2.Arguments, folder: Path) -> float:
    """Tokens a second of `LLM.generate` on the token ids of all prompts."""
    tokenizer = load_tokenizer(arguments.model_name_or_path)
    prompts, output = read_prompts(arguments), folder / "none.jsonl"
    partial = PartialRecords(output, len(prompts))
    tasks = sampling.unfinished(tokenizer, prompts, (0, 1), partial, Drops(), sample.context)
    inputs = [{"prompt_token_ids": task.token_ids} for task in tasks]
    start = time.monotonic()
    outputs = sample.llm.generate(inputs, engine.sampling_parameters(arguments, None), use_tqdm=False)
    seconds = time.monotonic() - start
    return sum(len(completion.token_ids) for output in outputs for completion in output.outputs) / seconds


def offline_turn(sample: engine.Sampler, arguments: get_hf2.Arguments, folder: Path) -> float:
    """Tokens a second of the offline mode, from reading the prompts to the manifest."""
    tokenizer = load_tokenizer(arguments.model_name_or_path)
    start = time.monotonic()
    prefix, inputs = folder / "gen", {"prompts": arguments.dataset_name_or_path}
    stage = shards.begin("generate", arguments, prefix, 0, 1, inputs)
    prompts = read_prompts(arguments)
    partial, drops = PartialRecords(prefix, len(prompts), part=stage.part), Drops()
    tasks = sampling.unfinished(tokenizer, prompts, (0, 1), partial, drops, sample.context)
    tokens = sampling.write(sample, tasks, partial)
    stage.finish(records_in=len(prompts), records_out=partial.assemble(stage.assembled), drops=drops, tokens=tokens)
    return tokens / (time.monotonic() - start)


def run_servers(args: argparse.Namespace, folder: Path) -> list[float]:
    """Tokens a second of gen_hf.py through one server, turn by turn."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ["BATON_SERVERS"] = str(folder / "servers")
    try:
        start = [*REGISTER, args.model, "--num_servers", "1", "--port", str(port), "--max_num_seqs", "256"]
        start += ["--dtype", args.dtype]
        subprocess.run(start, check=True, stdout=sys.stderr)
        turns = [server_turn(args, folder, port) for _ in range(args.repeats + 1)]
    finally:
        subprocess.run([*REGISTER, "--stop"], check=True, stdout=sys.stderr)
    return turns[1:]


def server_turn(args: argparse.Namespace, folder: Path, port: int) -> float:
    """Tokens a second through the server, from reading the prompts to the manifest."""
    words = [*flags(args, folder), "--tokenizer", args.model, "--ports", str(port)]
    arguments = settings.parse(gen_hf.Arguments, "", [*words, "--output_dir", str(folder / "api.jsonl")])
    tokenizer: Any = load_tokenizer(args.model)
    start = time.monotonic()
    output, inputs = Path(arguments.output_dir), {"prompts": arguments.dataset_name_or_path}
    stage = Stage.begin("generate through servers", arguments, output, inputs)
    prompts = read_prompts(arguments)
    partial, drops = PartialRecords(output, len(prompts)), Drops()
    servers = Servers([f"http://127.0.0.1:{port}/v1"], None, arguments.timeout, arguments.max_retries, arguments.patience)
    facts = asyncio.run(gen_hf.generate(arguments, servers, None, tokenizer, prompts, partial, drops))
    stage.finish(records_in=len(prompts), records_out=partial.assemble(), drops=drops, **facts)
    return facts["tokens"] / (time.monotonic() - start)


if __name__ == "__main__":
    main()
