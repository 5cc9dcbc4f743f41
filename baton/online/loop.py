"""The steps of an online training: rollouts, training, weights to the servers; checkpoints, evaluation, metrics.

With a staleness of 1 the rollouts of the next step are sampled, from the weights of the step before, while a step trains.
"""

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerState

from baton import program
from baton.errors import FailuresListed
from baton.jsonl import Record
from baton.online import checkpoints
from baton.online.collect import TAKEN, Collector, rollouts_of
from baton.online.engines import Engines
from baton.online.learner import Learner
from baton.online.models import weights_for_servers
from baton.online.samples import Samples
from baton.progress import Progress
from baton.training.metrics import peak_flops
from baton.training.metrics_file import MetricsFile
from baton.training.sharding import is_sharded

log = logging.getLogger("baton")

MOST_DEATHS = 3  # of servers in a step, after which they do not start anew
LARGE = ("responses", "prompt_token_ids", "response_token_ids", "response_logps")  # what takes the memory of a record
SHOWN = ("reward", "eval/reward", "kl", "kl_coef", "entropy", "loss", "clipped", "explained_variance", "length", "seconds")


class Algorithm(Protocol):
    """What trains on a step's samples, and its state for checkpoints. `records` are read from disk, if they are."""

    def step(self, records: Iterable[Record], samples: Samples, step: int) -> dict[str, float]: ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: dict[str, Any]) -> None: ...


@dataclass
class Loop:
    """An online training. `engines` and `collector` are those of process 0, None in the others.

    `folder` holds checkpoints and rollouts. `evaluate(step)` gives the metrics of held-out prompts; None: there are none.
    `warn` is given the metrics of each step.
    """

    learner: Learner
    algorithm: Algorithm
    folder: Path
    metrics_path: Path
    engines: Engines | None
    collector: Collector | None
    total_steps: int
    save_steps: int
    eval_steps: int
    staleness: int
    shares_gpus: bool
    evaluate: Callable[[int], dict[str, float]] | None
    warn: Callable[[int, dict[str, float]], None]

    def run(self) -> dict[str, float]:
        """Train to the end, from the last checkpoint where there is one; returns the metrics of the last step."""
        self.turn(to_servers=False)  # the optimizer of a checkpoint takes memory that the servers have
        state = checkpoints.load(self.learner, self.folder) or {"step": 0, "taken": 0}
        self.turn(to_servers=True)
        if "algorithm" in state:
            self.algorithm.load(state["algorithm"])
        done, taken = state["step"], state["taken"]
        self.lines = Lines(self.metrics_path, self.learner, self.total_steps, done)
        metrics: dict[str, float] = state.get("metrics", {})
        with self._background() as background:
            self.send(done)
            if done == 0:
                self._evaluate(0)
            else:
                metrics = self._line_of_checkpoint(done, metrics)
            ahead = self._collect(background, done + 1, taken, done) if done < self.total_steps else None
            for step in range(done + 1, self.total_steps + 1):
                begun = time.monotonic()
                metrics = self._collected(background, ahead, step, taken, step - 1)
                records = rollouts_of(self.folder / "rollouts", step)
                metrics["waited_seconds"] = time.monotonic() - begun
                samples, known = samples_of(records)
                taken = known[-1][TAKEN]
                more = step < self.total_steps
                if self.staleness and more:
                    ahead = self._collect(background, step + 1, taken, step - 1)
                self.turn(to_servers=False)
                training = time.monotonic()
                metrics |= of_rollouts(known, samples, step) | self.algorithm.step(records, samples, step)
                metrics["training_seconds"] = time.monotonic() - training
                if self.staleness and more:
                    ahead = self._on_disk(ahead)  # before the weights that sample it change
                if step % self.save_steps == 0 or not more:
                    whole = {"taken": taken, "algorithm": self.algorithm.state(), "metrics": metrics}
                    checkpoints.save(self.learner, self.folder, step, whole)
                self.turn(to_servers=True)
                if more or self._evaluates(step):
                    metrics["sync_seconds"] = self.send(step)
                metrics |= self._evaluate(step) if self._evaluates(step) else {}
                if more and (ahead is None or not self.staleness):
                    ahead = self._collect(background, step + 1, taken, step)
                metrics["seconds"] = time.monotonic() - begun
                metrics |= speed(self.learner, metrics, samples)
                self.lines.add(step, metrics)
                if program.rank() == 0:
                    self.warn(step, metrics)
        self.lines.close()
        return metrics

    @contextmanager
    def _background(self) -> Iterator[ThreadPoolExecutor]:
        """Context of the thread that collects. What ends the training, such as Ctrl-C, waits for no rollouts or rewards."""
        with ThreadPoolExecutor(1, "collector") as background:
            try:
                yield background
            except BaseException:
                if self.collector is not None:
                    self.collector.cancel()
                raise

    def send(self, version: int) -> float:
        """Send the weights to all servers; returns the seconds that it took. A server that cannot take them starts anew once.

        All processes have to call this: they gather the weights.
        """
        begun = time.monotonic()
        for last in (False, True):
            failed = [False]
            weights = weights_for_servers(self.learner.models.actor)
            if self.engines is None:
                for _ in weights:
                    pass
            else:
                failed = [not self.engines.take(weights, version, last)]
            if program.world_size() > 1:
                broadcast_object_list(failed)
            if not failed[0]:
                break
        return time.monotonic() - begun

    def _collect(self, background: ThreadPoolExecutor, step: int, taken: int, version: int) -> Future | None:
        return self.collector and background.submit(self.collector.collect, step, taken, version)

    def _collected(
        self, background: ThreadPoolExecutor, ahead: Future | None, step: int, taken: int, version: int
    ) -> dict[str, float]:
        """What it took to collect a step, despite deaths of servers."""
        if ahead is None:
            return {}
        tries = itertools.chain([ahead], iter(lambda: self._collect(background, step, taken, version), None))
        return self._despite_deaths(lambda: dict(next(tries).result()), version)

    def _despite_deaths(self, ask: Callable[[], dict[str, float]], version: int) -> dict[str, float]:
        """What `ask` gives. Where servers of ours have died, they start anew, get the weights again, and are asked again.

        Not for ever: there are prompts of which a server dies each time.
        """
        deaths = 0
        while True:
            try:
                return ask()
            except FailuresListed:
                deaths += 1
                # The weights that sample are those of this process now, and it has them whole.
                if deaths > MOST_DEATHS or is_sharded(self.learner.models.actor) or not self.engines.restart_dead():
                    raise
                self.engines.take(weights_for_servers(self.learner.models.actor), version, last=True)

    def _on_disk(self, ahead: Future | None) -> Future | None:
        """Rollouts that were sampled ahead, once they are on disk; None where servers of ours have died.

        Those start anew, and what is missing is sampled from the next weights.
        """
        try:
            if ahead is not None:
                ahead.result()
            return ahead
        except FailuresListed:
            if not self.engines.restart_dead():
                raise
            return None

    def turn(self, to_servers: bool) -> None:
        """Where trainer and servers share GPUs, give their memory to the one or the other."""
        if not self.shares_gpus:
            return
        if to_servers:
            self.learner.move_optimizer("cpu")
            self.learner.accelerator.wait_for_everyone()
        if self.engines is not None:
            self.engines.wake() if to_servers else self.engines.sleep()
        if not to_servers:
            self.learner.accelerator.wait_for_everyone()
            self.learner.move_optimizer(self.learner.accelerator.device)

    def _line_of_checkpoint(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics of a checkpoint's step: those of its line, which is written now where a death came before it was."""
        known = self.lines.of(step)
        if known is None:
            known = metrics | (self._evaluate(step) if self._evaluates(step) else {})
            self.lines.add(step, known)
        return known

    def _evaluates(self, step: int) -> bool:
        return self.evaluate is not None and (step % self.eval_steps == 0 or step == self.total_steps)

    def _evaluate(self, step: int) -> dict[str, float]:
        """Metrics of held-out prompts, despite deaths of servers; logged too where no step's line has them."""
        if self.evaluate is None or self.engines is None:
            return {}
        found = self._despite_deaths(lambda: self.evaluate(step), step)
        metrics = {f"eval/{name}": value for name, value in found.items()}
        if step == 0:
            self.lines.add(0, metrics)
        return metrics


class Lines:
    """A step's metrics as a line of the log, of the metrics file and of the reports; the progress of the steps."""

    def __init__(self, path: Path, learner: Learner, total: int, done: int):
        first = program.rank() == 0
        self.accelerator, self.done = learner.accelerator, done
        self.state = TrainerState(is_world_process_zero=first, global_step=done)
        self.file = MetricsFile(path)
        self.file.on_train_begin(None, self.state, None)
        self.progress = Progress(total, "steps", done=done) if first else None

    def add(self, step: int, metrics: dict[str, float]) -> None:
        self.state.global_step = step
        self.file.on_log(None, self.state, None, logs=metrics)
        self.accelerator.log(metrics, step=step)
        if self.progress is not None:
            shown = ", ".join(f"{name} {metrics[name]:.4g}" for name in SHOWN if name in metrics)
            log.info("step %d: %s", step, shown)
            if step > self.done:
                self.progress.update(1)

    def of(self, step: int) -> dict[str, float] | None:
        """The metrics in the line of a step, where process 0 has written it."""
        line = self.file.lines.get((step, ""))
        return line and {name: value for name, value in line.items() if name not in ("step", "epoch")}

    def close(self) -> None:
        self.accelerator.end_training()
        if self.progress is not None:
            self.progress.close()


def samples_of(records: Iterable[Record]) -> tuple[Samples, list[Record]]:
    """A step's samples, and its records without what is `LARGE`; reads the records once."""
    known: list[Record] = []

    def noted() -> Iterator[Record]:
        for record in records:
            known.append({name: value for name, value in record.items() if name not in LARGE})
            yield record

    return Samples.of(noted()), known


def of_rollouts(records: list[dict[str, Any]], samples: Samples, step: int) -> dict[str, float]:
    """Metrics of the samples as they came: lengths, what was cut off, each scorer's rewards, how old the weights were."""
    lengths = samples.lengths.double()
    found = {
        "length": float(lengths.mean()),
        "truncated": float((~samples.stopped).double().mean()),
        "prompt_length": sum(map(len, samples.prompts)) / len(samples.prompts),
        "staleness": step - 1 - sum(record["weight_versions"][0] for record in records) / len(records),
    }
    names = sorted({name for record in records for name in record.get("rewards_by", {})})
    for name in names if len(names) > 1 else ():
        rewards = [value for record in records for value in record["rewards_by"].get(name, ())]
        found[f"reward/{name}"] = sum(rewards) / len(rewards)
    return found


def speed(learner: Learner, metrics: dict[str, float], samples: Samples) -> dict[str, float]:
    """Samples and tokens a second, and the share of the GPUs' peak that the training's passes reached, where that is known."""
    flops, seconds = learner.taken()
    processes = learner.accelerator.num_processes
    found = {
        "samples_per_second": len(samples.responses) / metrics["seconds"],
        "training_tokens_per_second": float(samples.lengths.sum()) / max(metrics["training_seconds"], 1e-9),
    }
    peak = peak_flops(learner.accelerator.device)
    if peak and seconds:
        found["mfu"] = flops / seconds / (peak * processes)
    if learner.accelerator.device.type == "cuda":
        found["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found
