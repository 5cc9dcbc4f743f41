"""Report on a run: summary.json, progress.png, training.png, and on the terminal the rounds, the stages and some samples.

    python report/summarize.py --run_dir runs/NAME

Reads runs/NAME/heldout/round0/evaluated.jsonl, round1/…: the same held-out prompts answered by each round's
policy, with `responses` and `rewards` and, where measured, `response_token_ids`, `rewards_by: {"gold": [K], …}`
and `logps_by: {"initial": [K]}` with `response_logps` or `logps_by: {"policy": [K]}`; what the trainers logged,
runs/NAME/round1/metrics.jsonl, …; and the manifests that the stages left in the run's folder. Rounds are compared on
the prompts that all of them have. A run without held-out prompts has its trainings and stages reported alone.
Run it at any time: rounds that are not evaluated yet are left out, and the picture is drawn again only when a
number has changed.
"""

import logging
import sys
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console

from baton import program
from baton.arguments import StageArguments, option, parse
from baton.errors import InputError, looked_in
from baton.manifest import read_manifest
from report.kl import checked, history, notes
from report.metrics import MANY, in_all, read_round, summarize
from report.rounds import rounds_in
from report.table import left_out_words, print_rounds, print_samples, print_stages
from report.training import account, draw_trainings, read_trainings

log = logging.getLogger("baton")

MANIFEST = ".manifest.json"


class Arguments(StageArguments):
    run_dir: Path = option(..., "a run's folder, runs/NAME", changes_result=False)
    samples: int = option(3, "prompts whose responses are printed", ge=0, changes_result=False)


def main() -> None:
    arguments = parse(Arguments, __doc__)
    run_dir = arguments.run_dir
    if not run_dir.is_dir():
        raise InputError(f"--run_dir {run_dir}: no such folder{looked_in(run_dir)}")
    trainings = read_trainings(run_dir)
    stages = stage_accounts(run_dir)
    paths = evaluated_files(run_dir, required=not (trainings or stages))
    rounds, sentences, left_out, numbers = [], [], None, []
    if paths:
        rounds, sentences = zip(*(checked(path, read_round(path)) for path in paths), strict=True)
        rounds, left_out = in_all(rounds)
        numbers = summarize(rounds, frozenset().union(*map(trained_scorers, paths)))
    summary = {
        "rounds": numbers,
        "kl_notes": notes(sentences, numbers) if numbers else [],
        "left_out": left_out,
        "training": account(trainings),
        "stages": stages,
    }
    pictures = _write(run_dir, summary, trainings, arguments.overwrite)
    if left_out and left_out["prompts"] > MANY * left_out["of"]:
        log.warning("%s", left_out_words(left_out))
    console = Console() if sys.stdout.isatty() else Console(width=120)
    if numbers:
        print_rounds(console, numbers, summary["kl_notes"], left_out)
    if stages:
        print_stages(console, stages)
    if arguments.samples and numbers:
        print_samples(console, rounds, arguments.samples)
    log.info("%s", ", ".join(map(str, [run_dir / "summary.json", *pictures])))


def evaluated_files(run_dir: Path, required: bool = True) -> list[Path]:
    """The evaluated files of rounds 0, 1, …. Raises InputError where one is missing, or all of them though `required`."""
    found = {
        number: folder / "evaluated.jsonl"
        for number, folder in rounds_in(run_dir / "heldout").items()
        if (folder / "evaluated.jsonl").exists()
    }
    for number in range(max(found, default=0 if required else -1) + 1):
        if number not in found:
            path = run_dir / "heldout" / f"round{number}" / "evaluated.jsonl"
            raise InputError(f"{path}: no such file; evaluate round {number} on the held-out prompts first")
    return [found[number] for number in sorted(found)]


def trained_scorers(path: Path) -> set[str]:
    """The names in `rewards_by` that the reward of an evaluated file is made of: by the manifests, scorers with a weight."""
    names = set()
    for manifest in history(path):
        if manifest["stage"] == "annotate":
            scorers = [word.partition("=")[0] for word in manifest.get("settings", {}).get("scorers", [])]
            weights = manifest["arguments"].get("weights") or [1.0] * len(scorers)
            names |= {name for name, weight in zip(scorers, weights, strict=True) if weight}
    return names


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


def _write(run_dir: Path, summary: dict[str, Any], trainings: dict[int, list[Any]], anew: bool) -> list[Path]:
    """Pictures first, numbers last, each atomically: where the numbers are, the pictures are theirs. Returns the pictures."""
    path, name = run_dir / "summary.json", run_dir.resolve().name
    progress = [run_dir / "progress.png"] if summary["rounds"] else []
    training = [run_dir / "training.png"] if trainings else []
    text = orjson.dumps(summary, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    pictures = progress + training
    if not anew and all(picture.exists() for picture in pictures) and path.exists() and path.read_bytes() == text:
        return pictures
    from report.plot import draw  # matplotlib takes longer to import than all the rest

    for picture in progress:
        draw(summary["rounds"], f"{name}: held-out prompts, round by round", picture)
    for picture in training:
        draw_trainings(trainings, f"{name}: training, round after round", picture)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(text)
    partial.replace(path)
    return pictures


if __name__ == "__main__":
    program.run(main)
