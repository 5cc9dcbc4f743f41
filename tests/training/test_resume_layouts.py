"""After a death, training and reference log-probabilities go on with another number of processes and another batch split."""

import json
import os
import signal
import socket
from pathlib import Path

import numpy as np
import pytest

from tests.programs import start
from tests.training.test_dpo_core import model_of, pairs_of, random_pairs, tokenizer, with_reference

__all__ = ["tokenizer"]  # a fixture


def launch(count, folder, script, *words, **environment):
    """Run `script` in `count` processes on CPU to its end, as a launcher starts them; returns exit codes and stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(count):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count} if count > 1 else {}
        env = {**os.environ, **{name: str(value) for name, value in {**shared, **own, **environment}.items()}}
        processes.append(start(script, *words, env=env, output=str(folder)))
    for process in processes:
        process.join(300)
        if process.exitcode is None:
            process.kill()
    return [process.exitcode for process in processes], (folder / "stderr").read_text()


# Reference log-probabilities


def reference_run(count, folder, run, *words):
    """How many batches each process computed, and the log-probabilities of process 0 where the run came to its end."""
    codes, errors = launch(count, folder, Path(__file__).with_name("reference_processes.py"), folder, run, *words)
    assert set(codes) == {-signal.SIGKILL if words else 0}, errors[-3000:]
    computed = [int((folder / f"{run}-{rank}.computed").read_text()) for rank in range(count)]
    return computed, None if words else np.load(folder / f"{run}-0.npy")


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_reference_logps_killed_go_on_in_another_number_of_processes(before, after, tmp_path):
    model_of("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "rows.json").write_text(json.dumps(pairs_of(random_pairs(24))))
    batches, whole = reference_run(1, tmp_path, "whole")
    (kept,) = (tmp_path / "kept").glob("*.npy")
    kept.unlink()

    reference_run(before, tmp_path, "killed", 3)
    assert not list((tmp_path / "kept").iterdir())
    computed, resumed = reference_run(after, tmp_path, "resumed")
    assert sum(computed) == batches[0] - 3 * before and min(computed) > 0
    assert resumed.tobytes() == whole.tobytes()
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [kept.name] and not list((tmp_path / "parts").iterdir())
