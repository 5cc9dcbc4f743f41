"""What the KL of evaluation costs: sampling without and with log-probabilities, then get_logps.py of two models and of one.

    python benchmarks/evaluation.py --data alpaca_eval_k8.jsonl.gz --model SmolLM2-135M-Instruct

The sides are the programs as the loop starts them, one after the other in every turn, their start included. Two models are what
evaluation has to score where sampling keeps no log-probabilities. The last line compares sampler and scorer on the same tokens
of the same model: what a KL of 0 is measured as.
"""

import argparse
import gzip
import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="records with a `prompt`, .jsonl.gz")
    parser.add_argument("--model", required=True, help="a model's folder or hub name")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--K", type=int, default=4)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--max_model_len", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=1, help="how often each side runs; medians are shown")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with gzip.open(args.data, "rt") as lines:
            records = [json.loads(line) for line in itertools.islice(lines, args.prompts)]
        prompts, generated = folder / "prompts.jsonl", folder / "gen0.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": record["prompt"]}) + "\n" for record in records))
        sample = ["generation/get_hf2.py", "--model_name_or_path", args.model, "--dataset_name_or_path", prompts]
        sample += ["--K", args.K, "--max_new_tokens", args.max_new_tokens, "--max_model_len", args.max_model_len]
        sample += ["--output_dir", folder / "gen"]
        score = ["annotate_data/get_logps.py", "--dataset_name_or_path", generated, "--output_dir", folder / "logps.jsonl"]
        sides = {
            "sampling": sample,
            "sampling with log-probabilities": [*sample, "--response_logps"],
            "get_logps.py of two models": [*score, "--models", f"policy={args.model}", f"initial={args.model}"],
            "get_logps.py of one model": [*score, "--models", f"initial={args.model}"],
        }
        spent: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for _ in range(args.turns):
            for side, words in sides.items():
                spent[side].append(seconds([*words, "--overwrite"]))
        for side, times in spent.items():
            wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
            print(f"{side:32s} {wall:8.1f} s {cpu:8.1f} CPU s")
        compare(folder / "logps.jsonl")


def seconds(words: list[object]) -> tuple[float, float]:
    """Run a program to its end; returns its wall-clock and CPU seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=environment, check=True, stderr=subprocess.DEVNULL)
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare(path: Path) -> None:
    """Print how sampler and scorer differ on each response's tokens."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    tokens = sum(len(ids) for record in records for ids in record["response_token_ids"])
    differences = [
        math.fsum(logps) - scored
        for record in records
        for logps, scored in zip(record["response_logps"], record["logps_by"]["initial"], strict=True)
    ]
    print(
        f"{len(differences)} responses, {tokens} tokens; sampler - scorer, nats a response: mean "
        f"{statistics.fmean(differences):.3f}, standard deviation {statistics.stdev(differences):.3f}"
    )


if __name__ == "__main__":
    main()
