"""Merging speed and memory: `merge_data.py` on 8 shards of prompts with 8 responses of 200 words each.

    python benchmarks/merge.py                        100,000 prompts, about 1 GB
    python benchmarks/merge.py --prompts 1000000      about 11 GB, twice that on disk

Prints MB/s of the merge as a whole (hashing its input, copying, fsync), beside a bare `cat` of the same files with
`sync`, and the peak memory of the merging process.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARDS, K, WORDS = 8, 8, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--folder", help="where to work; needs room for the data twice")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        shards = [write_shard(folder / f"gen_data{i}.jsonl", args.prompts // SHARDS, i) for i in range(SHARDS)]
        megabytes = sum(shard.stat().st_size for shard in shards) / 1e6
        cat = timed(["bash", "-c", 'cat "${@:2}" >"$1" && sync "$1"', "bash", folder / "cat.jsonl", *shards])[0]
        (folder / "cat.jsonl").unlink()
        command = [sys.executable, ROOT / "generation/merge_data.py", "--base_path", folder / "gen_data"]
        merge, peak = timed([*command, "--output_dir", folder / "gen_data.jsonl", "--num_datasets", SHARDS])
    print(
        f"{args.prompts} prompts, {megabytes:.0f} MB: merge {megabytes / merge:.0f} MB/s, peak {peak:.0f} MB; "
        f"cat {megabytes / cat:.0f} MB/s; ratio {cat / merge:.2f}"
    )


def write_shard(path: Path, prompts: int, index: int) -> Path:
    """A shard as another toolkit writes it: without manifest, so that its content is nobody's promise."""
    generator = random.Random(index)
    words = [f"word{n}" for n in range(1000)]
    with path.open("w") as file:
        for n in range(prompts):
            text = " ".join(generator.choices(words, k=WORDS))
            record = {"id": f"{index}-{n}", "prompt": f"prompt {n}", "responses": [text] * K}
            file.write(json.dumps(record) + "\n")
    return path


def timed(command: list[object]) -> tuple[float, float]:
    """Run a command; returns its seconds and its peak resident memory in MB."""
    start = time.monotonic()
    process = subprocess.Popen([str(word) for word in command])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed")
    return time.monotonic() - start, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
