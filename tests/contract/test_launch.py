"""What baton.launch promises, with small real programs: slots, failures, exit codes; no unit outlives its launcher."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from baton import launch
from baton.errors import InputError, UnitFailed
from baton.launch import Unit, processes
from tests.environments import made_for

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def environments(monkeypatch, tmp_path_factory):
    """The environments are those that the tests run in, as if made for GPUs; the launcher is the default one."""
    folder = made_for("cuda", tmp_path_factory.mktemp("envs"))
    monkeypatch.setenv("BATON_ENVS", str(folder))
    monkeypatch.delenv("LAUNCHER", raising=False)
    return folder


def program(folder: Path, text: str) -> str:
    """A program of these lines; returns its path."""
    path = folder / "program.py"
    path.write_text(textwrap.dedent(text))
    return str(path)


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "baton.launch", *map(str, words)]


def run(*words: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=120)


def on_training(name: str, *words: object) -> list[object]:
    """The words of `baton.launch run` for a program in the training environment."""
    return ["run", "--name", name, "--environment", "training", *words]


def wait_for_line(path: Path, process: subprocess.Popen) -> list[str]:
    """Wait until a file has a whole line; returns its words. The process must still run."""
    while not (path.exists() and path.read_text().endswith("\n")):
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.02)
    return path.read_text().split()


def wait_until_ended(pid: int) -> None:
    """Wait until a process has ended, which must be soon."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended, _, _ = select.select([descriptor], [], [], 60)
    os.close(descriptor)
    assert ended, f"process {pid} lives on"


AT_WORK = """
    import os, pathlib, subprocess, sys
    place = pathlib.Path(sys.argv[1], os.environ["CUDA_VISIBLE_DEVICES"])
    place.mkdir()  # fails if another unit has this GPU
    subprocess.run([sys.executable, "-c", "import asyncio"], check=True)
    place.rmdir()
    with open(sys.argv[2], "a") as file:
        file.write(f"{sys.argv[3]} {place.name}\\n")
"""


@pytest.mark.parametrize(("size", "groups"), [(1, {"5", "7", "8"}), (2, {"5,7"})])
def test_units_share_the_slots_and_a_gpu_has_one_unit_at_a_time(tmp_path, monkeypatch, size, groups):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7,8")
    path, record = program(tmp_path, AT_WORK), tmp_path / "record"
    (tmp_path / "busy").mkdir()
    words = (path, str(tmp_path / "busy"), str(record))
    launch.run([Unit(f"unit {index}", "training", (*words, str(index)), gpus=size) for index in range(8)])
    lines = [line.split() for line in record.read_text().splitlines()]
    assert sorted(int(index) for index, _ in lines) == list(range(8))
    assert {place for _, place in lines} == groups


def test_without_gpus_one_unit_runs_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "cpu")  # a name for AT_WORK
    path, record = program(tmp_path, AT_WORK), tmp_path / "record"
    (tmp_path / "busy").mkdir()
    launch.run([Unit(f"unit {n}", "training", (path, str(tmp_path / "busy"), str(record), str(n))) for n in range(3)])
    assert record.read_text() == "0 cpu\n1 cpu\n2 cpu\n"


def test_a_unit_that_needs_more_gpus_than_there_are_is_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(InputError, match="needs 3 GPUs, but there are 2"):
        launch.run([Unit("big", "training", ("-V",), gpus=3)])


def test_a_failure_stops_further_units_and_its_code_and_the_end_of_its_log_reach_the_caller(tmp_path):
    path = program(
        tmp_path,
        """
        import sys
        print("starts", sys.argv[1])
        if sys.argv[1] == "1":
            print(*("line %d" % n for n in range(40)), sep="\\n")
            sys.exit(3)
        """,
    )
    logs = [tmp_path / "logs" / f"{index}.log" for index in range(4)]
    logs[1].parent.mkdir()
    logs[1].write_text("of an earlier run\n")
    with pytest.raises(UnitFailed) as failed:
        launch.run([Unit(f"unit {n}", "training", (path, str(n)), log=log) for n, log in enumerate(logs)])
    assert failed.value.exit_code == 3
    first, *tail = str(failed.value).splitlines()
    assert first == f"unit 1: failed with exit code 3; the end of {logs[1]}:"
    assert tail == [f"line {n}" for n in range(25, 40)]
    assert logs[1].read_text().startswith("of an earlier run\nstarts 1\n")
    assert [log.exists() for log in logs] == [True, True, False, False]


def test_the_end_of_the_log_holds_nothing_of_an_earlier_run(tmp_path):
    log = tmp_path / "log"
    log.write_text("of an earlier run\n")
    done = run(*on_training("unit", "--log", log, program(tmp_path, "import sys; sys.exit('why')")))
    assert done.returncode == 1
    assert "the end of" in done.stderr and done.stderr.endswith(":\nwhy\n")


def stages(folder: Path, *names_and_words: tuple[str, list[object]]) -> subprocess.CompletedProcess[str]:
    """`baton.launch chain` of programs by their names and words, each with a log."""
    words = []
    for name, program_words in names_and_words:
        unit = ["--name", name, "--environment", "training", "--log", folder / f"{name}.log", *program_words]
        words += [len(unit), *unit]
    given = "".join(f"{word}\0" for word in words)
    return subprocess.run(command("chain"), cwd=ROOT, input=given, capture_output=True, text=True, timeout=120)


def gold(folder: Path, name: str, source: str) -> tuple[str, list[object]]:
    """A small stage: the gold scores of a file."""
    words = ["--dataset_name_or_path", folder / f"{source}.jsonl", "--output_dir", folder / f"{name}.jsonl"]
    return name, ["quickstart/score_gold.py", *words]


def test_stages_of_one_environment_run_in_one_process_each_with_its_log_and_manifest_up_to_the_first_that_fails(tmp_path):
    (tmp_path / "first.jsonl").write_text('{"prompt": "The film", "responses": ["is good"]}\n')
    (tmp_path / "empty.jsonl").write_text("")
    own = program(tmp_path, "import os; print('by', os.getppid())")
    order = [gold(tmp_path, "second", "first"), ("own", [own]), gold(tmp_path, "third", "second")]
    done = stages(tmp_path, *order, gold(tmp_path, "failing", "empty"), gold(tmp_path, "never", "third"))
    assert done.returncode == 2, done.stderr
    said = done.stderr.splitlines()
    started = [line.split()[1] for line in said if " starts; log: " in line]
    assert started == ["second", "own", "third", "failing"]
    assert f"failing: failed with exit code 2; the end of {tmp_path}/failing.log:" in done.stderr
    assert "the file is empty" in said[-1] and "third: 0 s" in done.stderr
    assert [(tmp_path / f"{name}.jsonl.manifest.json").exists() for name in ("second", "third", "never")] == [True, True, False]
    for name in ("second", "third"):
        assert "1 in, 1 out, dropped: none" in (tmp_path / f"{name}.log").read_text().splitlines()[-1]
        assert len((tmp_path / f"{name}.log").read_text().splitlines()) == 2
    again = stages(tmp_path, *order)
    assert again.returncode == 0 and (tmp_path / "third.log").read_text().endswith("up to date\n")
    parents = [line for line in (tmp_path / "own.log").read_text().splitlines() if line.startswith("by ")]
    assert len(parents) == 2  # no stage of Baton's: a process of its own, each time


def test_a_chain_goes_on_after_a_stage_that_finished_without_some_records_and_not_after_one_that_did_not(tmp_path):
    (tmp_path / "rule.py").write_text(
        "def rule(prompts, responses, records):\n"
        "    if records[0]['prompt'] == 'bad': raise ValueError('no opinion')\n"
        "    return [1.0 for _ in responses]\n"
    )
    records = [{"prompt": prompt, "responses": ["a"]} for prompt in ("good", "bad", "fine")]
    (tmp_path / "first.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    scored = tmp_path / "scored.jsonl"
    words = ["annotate_data/get_rewards.py", "--dataset_name_or_path", tmp_path / "first.jsonl", "--output_dir", scored]
    words += ["--scorer", f"function:{tmp_path}/rule.py:rule", "--workers", 1]
    in_another_process = ["--group", "later", *gold(tmp_path, "after", "scored")[1]]  # which waits for its turn
    done = stages(tmp_path, ("scored", words), ("after", in_another_process))
    assert done.returncode == 0, done.stderr
    assert "scored: goes on without the records that were dropped" in done.stderr
    assert "1 records have no rewards" in (tmp_path / "scored.log").read_text()
    assert len((tmp_path / "after.jsonl").read_text().splitlines()) == 2
    (tmp_path / "after.jsonl").unlink()
    (tmp_path / "after.jsonl.manifest.json").unlink()
    done = stages(tmp_path, ("scored", [*words, "--overwrite", "true"]), ("after", in_another_process))
    assert done.returncode == 0 and (tmp_path / "after.jsonl").exists(), done.stderr

    away = ["--scorer", "http:http://127.0.0.1:9/", "--tries", 1, "--output_dir", tmp_path / "none.jsonl"]
    done = stages(tmp_path, ("none", [*words[:3], *away]), gold(tmp_path, "never", "none"))
    assert done.returncode == 3 and "none: failed with exit code 3" in done.stderr and "never starts" not in done.stderr


def test_what_a_process_of_a_training_starts_is_told_nothing_of_that_training(monkeypatch):
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_ERROR_FILE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    told = launch.unit.variables(Unit("server", "inference", ("serve_rm.py",)))
    assert told.keys() & {*launch.unit.OF_TRAINING, "OMP_NUM_THREADS"} == {"OMP_NUM_THREADS"}


def test_kill_9_of_a_chain_counts_as_the_stage_that_ran(tmp_path):
    (tmp_path / "first.jsonl").write_text('{"prompt": "The film", "responses": ["is good"]}\n')
    own = program(tmp_path, "import os, signal; os.kill(os.getppid(), signal.SIGKILL); signal.pause()")
    done = stages(tmp_path, gold(tmp_path, "second", "first"), ("own", [own]))
    assert done.returncode == 137 and "own: failed with exit code 137" in done.stderr, done.stderr


KILLS_WHO_WAITS = """
    import os, signal, time
    from pathlib import Path

    def parent(pid):
        try:
            return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended since
            return None

    own = os.getppid()
    launcher, others = parent(own), []
    while not others:
        time.sleep(0.05)
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        others = [pid for pid in pids if parent(pid) == launcher and pid != own]
    os.kill(others[0], signal.SIGKILL)
"""


def test_a_process_that_dies_while_it_waits_for_its_turn_is_started_anew(tmp_path):
    (tmp_path / "first.jsonl").write_text('{"prompt": "The film", "responses": ["is good"]}\n')
    name, words = gold(tmp_path, "second", "first")
    kills = program(tmp_path, KILLS_WHO_WAITS)
    done = stages(tmp_path, ("kills", [kills]), (name, ["--group", "later", *words]))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "second.jsonl").exists()


def test_a_process_that_a_chained_stage_spawns_dies_with_it(tmp_path):
    """As far as Python's way to start it goes: it reads the main file, which says so."""
    spawned = program(
        tmp_path,
        """
        import ctypes, multiprocessing.spawn
        multiprocessing.spawn._fixup_main_from_name("baton.launch.stages")
        signal = ctypes.c_int()
        ctypes.CDLL(None).prctl(2, ctypes.byref(signal))  # PR_GET_PDEATHSIG
        print(signal.value)
        """,
    )
    done = subprocess.run([sys.executable, spawned], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.stdout.split() == [b"9"], done.stderr


def test_a_unit_killed_by_a_signal_counts_as_a_shell_counts(tmp_path):
    done = run(*on_training("unit", program(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")))
    assert done.returncode == 137


def test_a_unit_that_succeeds_is_reported_with_its_seconds_and_its_last_line(tmp_path):
    done = run(*on_training("unit", "--log", tmp_path / "log", program(tmp_path, "print('12:00:00 INFO all 7 are done')")))
    assert done.returncode == 0
    assert re.search(r"unit: \d+ s, all 7 are done$", done.stderr.strip())


WAITS = """
    import os, signal, sys
    with open(sys.argv[1], "a") as file:
        file.write(f"{os.getpid()}\\n")
    signal.pause()
"""


def test_kill_9_of_the_launcher_ends_its_units(tmp_path):
    pids = tmp_path / "pids"
    process = subprocess.Popen(command(*on_training("unit", program(tmp_path, WAITS), pids)), cwd=ROOT)
    (pid,) = map(int, wait_for_line(pids, process))
    process.kill()
    process.wait()
    wait_until_ended(pid)


def test_kill_9_of_a_script_ends_the_stage_that_it_runs(tmp_path):
    pids = tmp_path / "pids"
    path = program(tmp_path, WAITS)
    lines = f"source scripts/lib.sh; run_dir='{tmp_path}'; stage name training '{path}' '{pids}'; run_stages"
    process = subprocess.Popen(["bash", "-c", lines], cwd=ROOT)
    (pid,) = map(int, wait_for_line(pids, process))
    process.kill()
    process.wait()
    wait_until_ended(pid)


def test_a_stage_that_starts_when_its_script_is_dead_does_not_run(tmp_path):
    """Also where nobody has collected the script yet, as under a shell or a container's first process that is busy."""
    ran = tmp_path / "ran"
    script = subprocess.Popen(["sleep", "600"])
    script.kill()
    os.waitid(os.P_PID, script.pid, os.WEXITED | os.WNOWAIT)  # dead, and left uncollected
    try:
        done = run(*on_training("unit", program(tmp_path, f"open({str(ran)!r}, 'w')")), BATON_PARENT=str(script.pid))
    finally:
        script.wait()
    assert done.returncode == 130 and not ran.exists()


def test_an_interrupted_launcher_ends_its_units_first_and_exits_with_130(tmp_path):
    pids = tmp_path / "pids"
    path = program(
        tmp_path,
        f"""
        import os, signal, sys
        from pathlib import Path
        from baton import program
        def main():
            try:
                Path({str(pids)!r}).write_text(f"{{os.getpid()}}\\n")
                signal.pause()
            finally:
                Path({str(tmp_path / "kept")!r}).touch()
        program.run(main)
        """,
    )
    process = subprocess.Popen(command(*on_training("unit", path)), cwd=ROOT, stderr=subprocess.DEVNULL)
    (pid,) = map(int, wait_for_line(pids, process))
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert processes.identify(pid) is None and (tmp_path / "kept").exists()


COUNTS = """
    import os, signal, sys
    from baton import program
    from baton.errors import InputError
    from baton.launch.check import check_processes
    def main():
        check_processes()
        with open(sys.argv[1] + str(program.rank()), "w") as file:
            file.write(f"{os.getpid()} {program.world_size()}\\n")
        if sys.argv[2:] == ["fail"] and program.rank() == 1:
            raise InputError("prompts.jsonl:3: bad input")
        signal.pause()
    program.run(main)
"""


def test_a_program_told_to_be_two_processes_that_is_one_ends_with_exit_code_2(tmp_path):
    """On GPUs that `accelerate launch` does not use, as the file says: it starts one process without a word."""
    words = ["--gpus", 2, "--accelerate_config", "configs/cpu.yaml", program(tmp_path, COUNTS), tmp_path / "record"]
    done = run(*on_training("unit", *words), CUDA_VISIBLE_DEVICES="0,1")
    assert done.returncode == 2
    assert "told to start 2 processes but started 1" in done.stderr
    assert not list(tmp_path.glob("record*"))


def test_one_of_several_processes_that_fails_gives_its_exit_code_and_message_and_ends_the_others(tmp_path):
    words = ["--log", tmp_path / "log", "--processes", 2, program(tmp_path, COUNTS), tmp_path / "record", "fail"]
    done = run(*on_training("unit", *words), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "prompts.jsonl:3: bad input"  # and not what accelerate says after it
    assert "unit: failed with exit code 2; the end of" in done.stderr.splitlines()[-2]
    for rank in (0, 1):
        wait_until_ended(int((tmp_path / f"record{rank}").read_text().split()[0]))


def test_several_processes_on_a_cpu_see_each_other_and_end_with_a_launcher_that_kill_9_ends(tmp_path):
    words = ["--log", tmp_path / "log", "--processes", 2, program(tmp_path, COUNTS), tmp_path / "record"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command(*on_training("unit", *words)), cwd=ROOT, env=environment)
    found = [wait_for_line(tmp_path / f"record{rank}", process) for rank in (0, 1)]
    process.kill()
    process.wait()
    assert [world_size for _, world_size in found] == ["2", "2"]
    for pid, _ in found:
        wait_until_ended(int(pid))


def test_a_service_survives_its_starter_and_is_known_by_pid_and_start_time(tmp_path):
    pids, path = tmp_path / "pids", program(tmp_path, WAITS)
    starter = f"""
        import json
        from pathlib import Path
        from baton import launch
        unit = launch.Unit("service", "training", ({path!r}, {str(pids)!r}), log=Path({str(tmp_path / "log")!r}))
        print(json.dumps(launch.start(unit, slot=3)))  # without GPUs there is room for any number
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(starter)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    service = processes.Process(*json.loads(done.stdout))
    try:
        assert processes.is_alive(service)
        assert os.getsid(service.pid) == service.pid
        assert not processes.is_alive(service._replace(started=service.started - 1))  # an earlier process of this pid
        processes.end([service._replace(started=service.started - 1)])
        assert processes.is_alive(service)
    finally:
        processes.end([service])
    assert not processes.is_alive(service)


def test_services_have_a_group_of_gpus_each_and_none_beyond_the_last(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,6,7,8")
    path = program(tmp_path, "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True)")
    for slot, gpus in enumerate(["0,1", "6,7"]):
        service = launch.start(Unit("service", "training", (path,), gpus=2, log=tmp_path / str(slot)), slot)
        wait_until_ended(service.pid)
        assert (tmp_path / str(slot)).read_text().strip() == gpus
    with pytest.raises(InputError, match="3 × 2 GPUs, but there are 5"):
        launch.start(Unit("service", "training", (path,), gpus=2, log=tmp_path / "2"), slot=2)


@pytest.mark.parametrize("launcher", ["ray", "slurm", "Local"])
def test_a_launcher_that_is_not_available_is_refused(tmp_path, launcher):
    done = run(*on_training("unit", program(tmp_path, "open('ran', 'w')")), LAUNCHER=launcher)
    assert done.returncode == 2
    assert f"LAUNCHER={launcher}: not available; set it to local" in done.stderr


def test_a_program_runs_in_the_environment_of_its_unit(tmp_path, environments):
    text = """
        import os, sys, baton
        print(sys.prefix, os.environ["VIRTUAL_ENV"], sys.flags.no_user_site, sys.dont_write_bytecode, os.environ["PATH"])
    """
    path, log, envs = program(tmp_path, text), tmp_path / "log", environments
    path_before = os.pathsep.join([str(envs / "training/bin"), os.environ["PATH"]])
    words = ["run", "--name", "unit", "--environment", "inference", "--log", log, path]
    done = run(*words, PATH=path_before, PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 0, done.stderr
    prefix, active, *flags, search = log.read_text().split(maxsplit=4)
    assert prefix == active == str(envs / "inference") and flags == ["1", "False"]
    assert search.startswith(f"{envs / 'inference/bin'}{os.pathsep}") and str(envs / "training/bin") not in search


def test_a_missing_environment_is_refused_with_the_command_that_makes_it(tmp_path):
    done = run(*on_training("unit", "program.py"), BATON_ENVS=str(tmp_path))
    assert done.returncode == 2
    assert "run bash scripts/setup_envs.sh" in done.stderr
