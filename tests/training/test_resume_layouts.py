"""After a death, training and reference log-probabilities go on with another number of processes and another batch split."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from baton.training.layouts import convert
from tests.programs import FORKS, begin, launch
from tests.training.test_dpo_core import model_of, pairs_of, random_pairs, tokenizer, with_reference
from tests.training.test_training_programs import dpo_words, logged

__all__ = ["tokenizer"]  # a fixture


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


@pytest.mark.parametrize("processes", [1, 2])  # of the two, one has no batch of its own
def test_a_reference_whose_packed_numbers_are_not_the_models_own_ends_the_program(processes, task, annotated, tmp_path):
    script = Path(__file__).with_name("checked_processes.py")
    words = dpo_words(task, annotated, tmp_path / "policy", "--max_steps", 1)
    for which in ("wrong", "right"):
        (tmp_path / which).mkdir()
        codes, errors = launch(processes, tmp_path / which, script, which, *words)
        found = re.findall(r"^.*packed log-probabilities differ from the model's own by .*$", errors, re.MULTILINE)
        if which == "right":
            assert set(codes) == {0} and len(found) == 1 and "INFO first batch: " in found[0], errors[-3000:]
            continue
        assert set(codes) == {2} and len(found) == processes and "Traceback" not in errors, errors[-3000:]
        assert found[0].endswith("Train with `--forward trl`: padded batches and the model's own attention")
        assert not list(tmp_path.glob("**/reference-logps-*.npy")) and "step 1:" not in errors


# Training


@pytest.fixture(scope="module")
def material(tmp_path_factory, tokenizer):
    folder, model = tmp_path_factory.mktemp("resume"), model_of("llama-tied")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "rows.json").write_text(json.dumps(with_reference(random_pairs(16), model)))
    return folder


def training_run(material, output, layout, *fields, **environment):
    """Train in `layout` (processes, micro-batch, accumulation); returns exit codes and stderr."""
    count, *split = layout
    output.parent.mkdir(exist_ok=True)
    return launch(
        count, output.parent, Path(__file__).with_name("resume_processes.py"), material, output, *split, *fields, **environment
    )


def steps_of(output):
    """{step: (its loss, its rows in any order)}, of all processes and of the last time that the step was made."""
    steps = {}
    for path in sorted(output.parent.glob(f"{output.name}.steps-*")):
        of_process = {step: (loss, rows) for step, loss, rows in map(json.loads, path.read_text().splitlines())}
        for step, (loss, rows) in of_process.items():
            steps[step] = (loss, sorted([*steps.get(step, (0, []))[1], *rows]))
    return steps


def killed(material, output, layout, *fields, **environment):
    """A run of 8 steps, with a checkpoint each 2, whose processes are killed after step 5."""
    codes, errors = training_run(material, output, layout, "stop_after", 5, *fields, **environment)
    assert set(codes) == {-signal.SIGKILL}, errors[-3000:]
    for path in output.parent.glob(f"{output.name}.steps-*"):
        path.unlink()


@pytest.fixture(scope="module")
def uninterrupted(material, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "policy"
    codes, errors = training_run(material, output, (1, 4, 1))
    assert codes == [0], errors[-3000:]
    return steps_of(output)


@pytest.mark.parametrize(
    ("before", "after"), [((1, 4, 1), (1, 4, 1)), ((1, 4, 1), (2, 2, 1)), ((1, 4, 1), (1, 2, 2)), ((2, 1, 2), (1, 4, 1))]
)
def test_training_killed_goes_on_in_another_layout_of_the_same_global_batch(before, after, material, uninterrupted, tmp_path):
    killed(material, tmp_path / "policy", before)
    codes, errors = training_run(material, tmp_path / "policy", after)
    assert set(codes) == {0} and "going on from" in errors, errors[-3000:]
    steps = steps_of(tmp_path / "policy")
    assert list(steps) == [5, 6, 7, 8]
    for step, (loss, rows) in steps.items():
        assert rows == uninterrupted[step][1], step
        assert loss == (uninterrupted[step][0] if before == after else pytest.approx(uninterrupted[step][0], abs=1e-4)), step


def test_each_step_has_the_same_rows_in_every_layout_and_an_epoch_has_each_row_once(material, tmp_path):
    rows = json.loads((material / "rows.json").read_text())
    (tmp_path / "material").mkdir()
    for name in ("model", "tokenizer"):
        (tmp_path / "material" / name).symlink_to(material / name)
    (tmp_path / "material" / "rows.json").write_text(json.dumps(rows[:13]))
    of_layout = []
    for layout in ((1, 4, 1), (2, 1, 2)):
        output = tmp_path / str(len(of_layout)) / "policy"
        codes, errors = training_run(tmp_path / "material", output, layout, "num_train_epochs", 1)
        assert set(codes) == {0}, errors[-3000:]
        of_layout.append({step: rows for step, (_, rows) in steps_of(output).items()})
    one, two = of_layout
    assert one == two and [len(rows) for rows in one.values()] == [4, 4, 4, 1]
    every = sorted(logp for rows in one.values() for logp in rows)
    assert every == pytest.approx(sorted(row["ref_chosen_logps"] for row in rows[:13]))


def test_a_resumed_training_logs_as_often_as_it_is_told_now(material, tmp_path):
    killed(material, tmp_path / "policy", (1, 4, 1))
    codes, errors = training_run(material, tmp_path / "policy", (1, 4, 1), "logging_steps", 2)
    assert codes == [0], errors[-3000:]
    assert list(steps_of(tmp_path / "policy")) == [6, 8]


@pytest.mark.parametrize(("before", "after"), [((1, 8), (2, 4)), ((2, 4), (1, 8))])
def test_run_dpo_killed_goes_on_in_another_layout_of_the_same_global_batch(before, after, task, annotated, tmp_path):
    def words(output, batch):
        split = ["--per_device_train_batch_size", batch, "--max_steps", 8, "--save_steps", 2]
        return dpo_words(task, annotated, tmp_path / output, *split)

    codes, whole = launch(1, tmp_path, *words("whole", 8))
    assert codes == [0], whole[-3000:]

    (tmp_path / "killed").mkdir()
    running = begin(before[0], tmp_path / "killed", *words("policy", before[1]))
    errors = tmp_path / "killed" / "stderr"
    while not errors.exists() or " step 5:" not in errors.read_text():
        running[0].join(0.1)
        assert running[0].exitcode is None
    for process in running:
        process.kill()
        process.join()

    (tmp_path / "resumed").mkdir()
    codes, resumed = launch(after[0], tmp_path / "resumed", *words("policy", after[1]))
    assert set(codes) == {0} and "going on from" in resumed, resumed[-3000:]
    assert logged(resumed, "loss") == pytest.approx(logged(whole, "loss")[-len(logged(resumed, "loss")) :], abs=1e-4)
    expected, got = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "policy"))
    assert all((expected[name] - got[name]).abs().max() < 1e-4 for name in expected)


# DeepSpeed

GLOO = ("use_cpu", "false", "ddp_backend", "gloo")


def zero(stage):
    """The environment in which Accelerate's launcher starts a process under this ZeRO stage, on a CPU."""
    return {
        "DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_CPU": "false",
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    }  # fmt: skip


@pytest.mark.parametrize("stage", [2, 3])
def test_a_zero_checkpoint_of_two_processes_goes_on_in_one(stage, material, tmp_path):
    fields = ("weight_decay", 10)
    codes, errors = training_run(material, tmp_path / "whole", (1, 4, 1), *fields)
    assert codes == [0], errors[-3000:]
    killed(material, tmp_path / "policy", (2, 2, 1), *GLOO, *fields, **zero(stage))

    codes, errors = training_run(material, tmp_path / "policy", (1, 4, 1), *fields)
    assert codes == [2] and "checkpoint-4: written with" in errors
    wanted = "with ZeRO-1 or ZeRO-2 in 2 processes" if stage == 2 else "with ZeRO-3 in 2 processes"
    assert f"go on {wanted} again" in errors

    codes, errors = training_run(material, tmp_path / "policy", (1, 4, 1), *GLOO, *fields, **zero(stage))
    assert codes == [0] and "checkpoint-4: converting to a universal checkpoint" in errors, errors[-3000:]
    whole, resumed = steps_of(tmp_path / "whole"), steps_of(tmp_path / "policy")
    assert list(resumed) == [5, 6, 7, 8]
    for step, (loss, rows) in resumed.items():
        assert rows == whole[step][1] and loss == pytest.approx(whole[step][0], abs=1e-4), step


@pytest.mark.parametrize("stage", [2, 3])
def test_the_best_checkpoint_of_two_processes_is_loaded_at_the_end_in_one(stage, material, tmp_path):
    output, partial = tmp_path / "policy", tmp_path / "policy.partial"
    # The best is the one with the highest loss, that of step 2
    fields = (*GLOO, "eval_strategy", "steps", "eval_steps", 2, "load_best_model_at_end", "true", "greater_is_better", "true",
              "save_total_limit", 4)  # fmt: skip
    killed(material, output, (2, 2, 1), *fields, **zero(stage))
    best = load_file(partial / "checkpoint-2" / "model.safetensors")

    for last in (4, 6):  # of two processes, and of one
        codes, errors = training_run(material, output, (1, 4, 1), *fields, **zero(stage))
        assert codes == [0] and f"checkpoint-{last} (step" in errors, errors[-3000:]
        exported = load_file(partial / "model.safetensors")
        assert all(torch.allclose(exported[name], best[name], atol=1e-6) for name in exported)
        shutil.rmtree(partial / "checkpoint-8")


def test_a_checkpoint_that_this_run_cannot_load_is_refused_by_name(material, tmp_path):
    killed(material, tmp_path / "policy", (1, 4, 1))
    under_zero = (material, tmp_path / "policy", (1, 4, 1), *GLOO)
    codes, errors = training_run(*under_zero, **zero(2))
    assert codes == [2] and "checkpoint-4: written with no sharding, and cannot be loaded with ZeRO-1 or ZeRO-2 in 1" in errors

    states = tmp_path / "policy.partial" / "checkpoint-4" / "global_step4"
    states.mkdir()
    (states.parent / "latest").write_text(states.name)
    for rank in range(3):
        (states / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_bytes(b"damaged")
    codes, errors = training_run(*under_zero, **zero(2))
    assert codes == [2] and "DeepSpeed could not convert the checkpoint" in errors
    assert "go on with ZeRO-1 or ZeRO-2 in 3 processes again" in errors


def test_kill_9_of_a_training_ends_the_conversion_of_its_checkpoint(tmp_path):
    states = tmp_path / "checkpoint-4" / "global_step4"
    states.mkdir(parents=True)
    (states.parent / "latest").write_text(states.name)
    os.mkfifo(states / "zero_pp_rank_0_mp_rank_00_optim_states.pt")  # what reads it waits for ever
    training = FORKS.Process(target=convert, args=(states.parent,))
    training.start()
    used, before = 0.0, None  # seconds of the processor; the conversion waits once it uses no more
    while not used or used != before:
        assert training.exitcode is None
        time.sleep(0.5)
        children = psutil.Process(training.pid).children()
        used, before = sum(child.cpu_times().user for child in children), used
    training.kill()
    _, alive = psutil.wait_procs(children, timeout=30)
    for child in alive:
        child.kill()
    assert not alive
