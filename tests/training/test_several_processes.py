"""What the training programs promise where a launcher starts several processes of them on one machine."""

import os
import socket
import subprocess
import sys

import pytest

from tests.environments import made_for
from tests.programs import ROOT, run_program, succeed, write_jsonl
from tests.training.test_training_programs import SMALL

PROGRAMS = {
    "sft/run_sft.py": "sft.jsonl",
    "reward_model/run_rm.py": "rm_train.jsonl",
    "dpo_iteration/run_dpo.py": "rm_train.jsonl",
    "dpo_iteration/run_kto.py": "rm_train.jsonl",
}
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/ddp.yaml"]
LAUNCH += ["--mixed_precision", "no", "--num_processes", "2"]
ON_CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def words_of(program, task, output, data=None):
    words = ["--model_name_or_path", task / "base", "--dataset_name_or_path", data or task / "data" / PROGRAMS[program]]
    return [program, *words, "--output_dir", output, *SMALL]


def of_two_processes(*words):
    """All output of a program under a bare `accelerate launch` of two processes, in which it must fail."""
    command = [*LAUNCH, *map(str, words)]
    environment = os.environ | ON_CPU
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert done.returncode != 0
    return done.stdout


def assert_said_once_and_last(message, output):
    assert output.count(message) == 1, output
    assert message in output.rstrip("=\n").splitlines()[-1], output
    assert output.count("Traceback") == 1 and "interrupted" not in output, output  # the launcher's own


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_bad_record_is_said_once_and_last(task, tmp_path, program):
    data = write_jsonl(tmp_path / "bad.jsonl", [{"response": "A warm film."}])
    output = of_two_processes(*words_of(program, task, tmp_path / "model", data))
    assert_said_once_and_last("bad.jsonl:1: ", output)


def test_another_machine_ends_where_the_first_one_finds_a_bad_record(task, tmp_path):
    data = write_jsonl(tmp_path / "bad.jsonl", [{"response": "A warm film."}])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    words = [*LAUNCH, "--num_machines", 2, "--main_process_ip", "127.0.0.1", "--main_process_port", port, "--machine_rank"]
    program = [*words_of("dpo_iteration/run_dpo.py", task, tmp_path / "model", data), "--max_prompt_length", 64]
    outputs, machines = [tmp_path / "first", tmp_path / "second"], []
    for machine, path in enumerate(outputs):
        with path.open("wb") as output:
            command = [*map(str, [*words, machine, *program])]
            machines.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | ON_CPU, stdout=output, stderr=output))
    try:
        assert all(machine.wait(240) != 0 for machine in machines)  # it would try to reach the first one for half an hour
    finally:
        for machine in machines:
            machine.kill()
    assert_said_once_and_last("bad.jsonl:1: ", outputs[0].read_text())


def test_a_setting_that_its_trainer_refuses_is_said_once_and_last(task, tmp_path):
    output = of_two_processes(*words_of("sft/run_sft.py", task, tmp_path / "model"), "--max_steps", 0)
    assert_said_once_and_last("`max_steps`: 0 would train by epochs", output)


@pytest.mark.parametrize("program", PROGRAMS)
def test_more_processes_than_gpus_are_refused_before_anything_loads(task, tmp_path, program):
    launched = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0"}
    words = words_of(program, task, tmp_path / "model")
    words[words.index("--use_cpu") + 1] = "false"
    done = run_program(*words, env=os.environ | launched | {"BATON_ENVS": str(made_for("cuda", tmp_path / "envs"))})
    assert done.returncode == 2
    assert "`num_processes`: 2 processes on this machine, but 1 GPUs" in done.stderr
    assert len(done.stderr.splitlines()) == 2, done.stderr  # beside what is done with the output


def test_a_pods_rank_and_world_size_do_not_make_accelerate_wait_for_others(task, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = succeed(*words_of("sft/run_sft.py", task, tmp_path / "model"), "--max_steps", 1)
    assert "processes=1 distributed=NO" in done.stderr
    assert (tmp_path / "model.manifest.json").exists()
