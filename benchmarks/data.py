"""Speed and memory of `python -m baton.data check`, without tokens, on generated records.

    python benchmarks/data.py                          one million preference pairs, about 0.8 GB
    python benchmarks/data.py --records 100000 --near  and of `convert --dedup near`, which compares texts

Prints records a second, and the bytes that each record adds to the peak memory: that of all records less that of a tenth.
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
WORDS = 40  # of each of the three texts of a pair


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--near", action="store_true", help="run `convert --dedup near` too")
    parser.add_argument("--folder", help="where to work")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        part, whole = (write_pairs(Path(name) / f"{count}.jsonl", count) for count in (args.records // 10, args.records))
        commands = {"check": ["check", "--show", "0"]}
        if args.near:
            commands["convert --dedup near"] = ["convert", "--dedup", "near"]
        for title, (command, *flags) in commands.items():
            outputs = [[f"{path}.out.jsonl"] if command == "convert" else [] for path in (part, whole)]
            *_, before = timed([command, part, *outputs[0], *flags])
            seconds, on_cpu, peak = timed([command, whole, *outputs[1], *flags])
            added = (peak - before) / (args.records - args.records // 10)
            print(
                f"{title}: {args.records:,} records, {whole.stat().st_size / 1e6:.0f} MB: {seconds:.1f} s, "
                f"{on_cpu:.1f} s of one CPU core, "
                f"{args.records / seconds:,.0f} records/s, {added:.0f} bytes of memory a record, peak {peak / 1e6:.0f} MB"
            )


def write_pairs(path: Path, count: int) -> Path:
    """Pairs of random words, one in a hundred of them twice."""
    generator = random.Random(0)
    words = [f"word{n}" for n in range(1000)]
    line = ""
    with path.open("w") as file:
        for number in range(count):
            if number % 100 != 99:
                texts = (" ".join(generator.choices(words, k=WORDS)) for _ in range(3))
                line = json.dumps(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)))
            file.write(line + "\n")
    return path


def timed(words: list[object]) -> tuple[float, float, int]:
    """Run `python -m baton.data WORDS …`; returns its seconds, those on a CPU core, and its peak memory in bytes."""
    start = time.monotonic()
    command = [sys.executable, "-m", "baton.data", *map(str, words)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": python_path()}, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            log.seek(0)
            raise SystemExit(log.read().decode())
    return time.monotonic() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def python_path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


if __name__ == "__main__":
    main()
