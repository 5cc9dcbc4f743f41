"""Report on a run: summary.json, progress.png, and on the terminal the rounds, the stages and some samples.

    python report/summarize.py --run_dir runs/NAME

Reads runs/NAME/heldout/round0/evaluated.jsonl, round1/…: the same held-out prompts answered by each round's
policy, with `responses` and `rewards` and, where measured, `response_token_ids`, `rewards_by: {"gold": [K]}`
and `logps_by: {"initial": [K]}` with `response_logps` or `logps_by: {"policy": [K]}`; and the manifests that the
stages left in the run's folder.
Run it at any time: rounds that are not evaluated yet are left out, and the picture is drawn again only when a
number has changed.
"""

import logging
import re
import sys
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console

from baton import program
from baton.arguments import StageArguments, option, parse
from baton.errors import InputError
from baton.manifest import read_manifest
from report.kl import checked, notes
from report.metrics import read_round, summarize
from report.table import print_rounds, print_samples, print_stages

log = logging.getLogger("baton")

MANIFEST = ".manifest.json"


class Arguments(StageArguments):
    run_dir: Path = option(..., "a run's folder, runs/NAME", changes_result=False)
    samples: int = option(3, "prompts whose responses are printed", ge=0, changes_result=False)


def main() -> None:
    arguments = parse(Arguments, __doc__)
    run_dir = arguments.run_dir
    rounds, sentences = zip(*(checked(path, read_round(path)) for path in evaluated_files(run_dir)), strict=True)
    numbers = summarize(rounds)
    summary = {"rounds": numbers, "kl_notes": notes(sentences, numbers), "stages": stage_accounts(run_dir)}
    _write(run_dir, summary, arguments.overwrite)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    print_rounds(console, summary["rounds"], summary["kl_notes"])
    if summary["stages"]:
        print_stages(console, summary["stages"])
    if arguments.samples:
        print_samples(console, rounds, arguments.samples)
    log.info("%s and %s", run_dir / "summary.json", run_dir / "progress.png")


def evaluated_files(run_dir: Path) -> list[Path]:
    """The evaluated files of rounds 0, 1, …. Raises InputError where one, or all of them, are missing."""
    folder = run_dir / "heldout"
    names = [path.parent.name for path in folder.glob("round*/evaluated.jsonl")]
    found = {int(match[1]) for name in names if (match := re.fullmatch(r"round(\d+)", name))}
    for number in range(max(found, default=0) + 1):
        path = folder / f"round{number}" / "evaluated.jsonl"
        if number not in found:
            raise InputError(f"{path}: no such file; evaluate round {number} on the held-out prompts first")
    return [folder / f"round{number}" / "evaluated.jsonl" for number in sorted(found)]


def stage_accounts(run_dir: Path) -> list[dict[str, Any]]:
    """Counts, seconds and tokens of each finished stage in each folder, in the order in which they began.

    They come from the manifests; shards of one stage are added up.
    """
    outputs = [path.with_name(path.name.removesuffix(MANIFEST)) for path in run_dir.rglob(f"*{MANIFEST}")]
    manifests = {output: manifest for output in outputs if (manifest := read_manifest(output))}
    finished = {output: manifest for output, manifest in manifests.items() if "counts" in manifest}
    accounts: dict[tuple[str, str], dict[str, Any]] = {}
    for output, manifest in sorted(finished.items(), key=lambda item: (item[1]["started"], item[0])):
        folder, stage, counts = str(output.parent.relative_to(run_dir)), manifest["stage"], manifest["counts"]
        empty = {"in": 0, "out": 0, "dropped": 0, "seconds": 0.0, "tokens": None}
        account = accounts.setdefault((folder, stage), {"folder": folder, "stage": stage, **empty})
        account["in"] += counts["in"]
        account["out"] += counts["out"]
        account["dropped"] += sum(counts["dropped"].values())
        account["seconds"] = round(account["seconds"] + manifest["seconds"], 2)
        if isinstance(tokens := manifest.get("tokens"), int):
            account["tokens"] = tokens + (account["tokens"] or 0)
    return list(accounts.values())


def _write(run_dir: Path, summary: dict[str, Any], anew: bool) -> None:
    """Picture first, numbers last, each atomically: where the numbers are, the picture is theirs."""
    path, picture = run_dir / "summary.json", run_dir / "progress.png"
    text = orjson.dumps(summary, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    if not anew and picture.exists() and path.exists() and path.read_bytes() == text:
        return
    from report.plot import draw  # matplotlib takes longer to import than all the rest

    draw(summary["rounds"], f"{run_dir.resolve().name}: held-out prompts, round by round", picture)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(text)
    partial.replace(path)


if __name__ == "__main__":
    program.run(main)
