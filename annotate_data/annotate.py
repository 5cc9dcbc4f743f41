"""A whole run of annotation: score what is missing, keep each score at once, write the output, and account."""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson

from annotate_data.summary import Summary
from annotate_data.work import Responses, Scorer, Scores, write_records
from baton.drops import Drops
from baton.errors import InputError
from baton.jsonl import Record
from baton.models.devices import barrier
from baton.program import rank, world_size
from baton.progress import Progress
from baton.stage import Stage

log = logging.getLogger("baton")

Merge = Callable[[Record, dict[str, list[float]]], tuple[Record, dict[str, list[float]]]]

NAMED = 20  # how many prompts a warning names; the summary names NAMED_KEPT
NAMED_KEPT = 1000


def annotate(
    stage: Stage,
    responses: Responses,
    scorers: dict[str, Callable[[], Scorer]],
    merge: Merge,
) -> Drops:
    """Score `responses` with each of `scorers`, one after the other, and finish `stage`; returns the records left out.

    A scorer is made only when there is work for it. `merge(record, {scorer: scores})` gives the output's record, and columns of
    K numbers to summarise. Raises InputError, naming the record, for a score that is not finite.
    """
    barrier()  # process 0 has cleared what an earlier run with other arguments left
    scores = Scores(stage.output, responses, list(scorers))
    barrier()  # all have seen what is done
    progress = Progress(scores.partial.count // world_size(), "scores", scores.partial.done // world_size())
    if scores.partial.done:
        log.info("%d of %d scores are done already", scores.partial.done, scores.partial.count)
    for name, make in scorers.items():
        if not scores.missing(name):
            continue
        scorer = make()
        for score in scorer(scores.tasks(name)):
            if score.value is not None and not math.isfinite(score.value):
                raise InputError(
                    f"{score.task.where}: response {score.index + 1} of prompt {score.task.record['id']}: "
                    f"{name} gave {score.value}; of a model, try --dtype float32"
                )
            scores.keep(name, score)
            progress.update()
        del scorer  # before the next one takes the memory
    progress.close()
    barrier()  # all scores are on disk
    return finish(stage, scores, merge) if rank() == 0 else Drops()


def finish(stage: Stage, scores: Scores, merge: Merge) -> Drops:
    """Write the output, its summary and its manifest; a record with a response that has no score is dropped, and named."""
    drops = Drops()
    summaries: defaultdict[str, Summary] = defaultdict(Summary)
    noted: defaultdict[str, list[str]] = defaultdict(list)

    def records() -> Iterator[Record]:
        for where, record, by_scorer, notes in scores.all():
            if failures := [note for failed, note in notes if failed]:
                drops.add(failures[0], f"{record['id']} ({where})")
                continue
            for _, note in notes:
                noted[note].append(record["id"])
            merged, columns = merge(record, by_scorer)
            for name, values in columns.items():
                summaries[name].add(record["responses"], values)
            yield merged

    written = write_records(stage.output, records())
    numbers = {name: summary.numbers() for name, summary in summaries.items()}
    for name, values in numbers.items():
        log.info("%s: %s", name, " ".join(f"{key} {_short(value)}" for key, value in values.items()))
    noted_facts = {}
    for note, ids in noted.items():
        prompts = list(dict.fromkeys(ids))
        noted_facts[note] = {"responses": len(ids), "prompts": prompts[:NAMED_KEPT]}
        more = ", …" if len(prompts) > NAMED else ""
        log.warning("%d responses %s; prompts %s%s", len(ids), note, ", ".join(prompts[:NAMED]), more)
    account = {"in": len(scores.responses.counts), "out": written, "dropped": dict(drops.counts)}
    summary_path(stage.output).write_bytes(
        orjson.dumps({**numbers, "records": account, "noted": noted_facts}, option=orjson.OPT_INDENT_2)
    )
    stage.finish(
        records_in=len(scores.responses.counts),
        records_out=written,
        drops=drops,
        summary=numbers,
        noted=noted_facts,
        scored_by_this_run=scores.partial.count - scores.partial.done,
    )
    return drops


def summary_path(output: Path) -> Path:
    """Where the summary of an output stands."""
    return output.with_name(output.name + ".summary.json")


def _short(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4g}"
