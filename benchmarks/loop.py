"""Where the time of a loop's rounds goes: each round's wall time beside the work of its engines, and what is outside.

    python benchmarks/loop.py runs/quickstart [runs/another ...]

Reads the manifests and logs of finished runs, of whatever version of Baton, and runs nothing. A round begins with the
evaluation of its starting policy, where there is one, and ends where the next round begins. The work of a stage is the time
from the line of its log that says what it runs on, when its model or engine is there, to the one with its account; of a
training from the first line that says anything after the start, so that the reference's log-probabilities count. All else is
outside: starting processes, imports, loading, the launcher. Times are those of a log, in whole seconds. A run that was
interrupted shows its latest attempts.
"""

import argparse
import json
import re
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

LINE = re.compile(r"(\d\d):(\d\d):(\d\d) (?:INFO|WARNING) (.*)")
KINDS = ("sampling", "scoring", "training")


class Stage(NamedTuple):
    """A finished stage: when it began and ended, and the seconds of its work."""

    kind: str
    began: datetime
    ended: datetime
    work: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run_dir", nargs="+", type=Path, help="folders of finished runs")
    for run_dir in parser.parse_args().run_dir:
        print(f"{run_dir}: seconds of each round")
        print(f"{'round':>5} {'wall':>6} " + " ".join(f"{kind:>9}" for kind in KINDS) + f" {'outside':>9} {'share':>6}")
        for number, stages, end in rounds(run_dir.resolve()):  # the logs have whole paths
            wall = (end - stages[0].began).total_seconds()
            work = [sum(stage.work for stage in stages if stage.kind == kind) for kind in KINDS]
            outside = wall - sum(work)
            print(f"{number:5} {wall:6.0f} " + " ".join(f"{s:9.1f}" for s in work) + f" {outside:9.1f} {outside / wall:6.0%}")


def rounds(run_dir: Path) -> list[tuple[int, list[Stage], datetime]]:
    """Of each round its number, its stages in the order in which they began, and its end."""
    found = []
    for number in range(1, 1 + len(list(run_dir.glob("round*")))):
        stages = stages_in(run_dir, run_dir / f"heldout/round{number - 1}", f"evaluate{number - 1}")
        stages += stages_in(run_dir, run_dir / f"round{number}", f"round{number}")
        found.append((number, sorted(stages, key=lambda stage: stage.began)))
    last = sorted(stages_in(run_dir, run_dir / f"heldout/round{len(found)}", f"evaluate{len(found)}"), key=lambda s: s.began)
    begins = [stages[0].began for _, stages in found[1:]] + [last[0].began if last else max(s.ended for s in found[-1][1])]
    return [(number, stages, end) for (number, stages), end in zip(found, begins, strict=True)]


def stages_in(run_dir: Path, folder: Path, name: str) -> list[Stage]:
    """The finished stages of one folder of a run."""
    logs = run_dir / "logs"
    shards = [(path, path.with_name(path.name.removesuffix(".jsonl") + ".log")) for path in folder.glob("gen_data[0-9]*.jsonl")]
    if not shards:  # through servers
        shards = [(folder / "gen_data.jsonl", logs / f"{name}-generate.log")]
    sampled = [stage_of("sampling", output, log) for output, log in shards]
    longest = max(filter(None, sampled), key=lambda stage: stage.work, default=None)  # shards run side by side
    rest = [
        stage_of("scoring", folder / "data_with_rewards.jsonl", logs / f"{name}-rewards.log"),
        stage_of("scoring", folder / "data_with_logps.jsonl", logs / f"{name}-logps.log"),
        stage_of("scoring", folder / "data_with_gold.jsonl", logs / f"{name}-gold.log"),
        stage_of("training", folder / "policy", logs / f"{name}-train.log"),
    ]
    return [stage for stage in (longest, *rest) if stage]


def stage_of(kind: str, output: Path, log: Path) -> Stage | None:
    """The stage that made `output`, by its manifest and its log; None where it is not finished."""
    manifest = output.with_name(output.name + ".manifest.json")
    if not manifest.exists() or not log.exists():
        return None
    known = json.loads(manifest.read_text(encoding="utf-8"))
    began = datetime.fromisoformat(known["started"])
    lines = times(log.read_text(encoding="utf-8", errors="replace"))
    ends = [place for place, (_, text) in enumerate(lines) if text.startswith(f"{output}: ") and " out, dropped: " in text]
    if not ends:  # it was sampled by the servers of the stage before, whose log has its lines
        return Stage(kind, began, began + timedelta(seconds=known["seconds"]), known["seconds"])
    end = ends[-1]
    attempt = max((place for place in range(end) if lines[place][1].endswith((": starting", "stopped"))), default=0)
    working = [place for place in range(attempt, end) if lines[place][1].startswith("runs on: ")]
    if kind == "training":
        working = list(range(attempt + 1, end))
    work = (lines[end][0] - lines[working[0]][0]).total_seconds() if working else known["seconds"]
    return Stage(kind, began, began + timedelta(seconds=known["seconds"]), work)


def times(text: str) -> list[tuple[timedelta, str]]:
    """The lines of a log with their times, which go on over midnight."""
    found = [LINE.fullmatch(line) for line in re.split(r"[\r\n]+", text)]
    said = [(timedelta(hours=int(m[1]), minutes=int(m[2]), seconds=int(m[3])), m[4].rstrip()) for m in found if m]
    days, lines = timedelta(), said[:1]
    for (before, _), (now, line) in pairwise(said):
        days += timedelta(days=1) if now < before else timedelta()
        lines.append((days + now, line))
    return lines


if __name__ == "__main__":
    main()
