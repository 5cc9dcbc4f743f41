"""The two environments: the device that they are made for decides what is chosen, exported and started; clones share them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from baton.launch import gpus
from baton.launch.unit import Unit, launcher_words
from baton.program import cpu_has_bfloat16
from tests.environments import made_for, on_path
from tests.programs import ROOT, write_jsonl

ANSWERS = {
    "gpu": {"nvidia_smi": 'case "$*" in *compute_cap*) echo 9.0 ;; *--query*) echo 0; echo 1 ;; *) echo "a table" ;; esac'},
    "old gpu": {"nvidia_smi": 'case "$*" in *compute_cap*) echo 7.5 ;; *) echo 0 ;; esac'},
    "no gpu": {"nvidia_smi": "exit 9"},  # no driver
}


def run(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the project's folder; a variable that is empty is not set."""
    environment = {name: value for name, value in (os.environ | variables).items() if value}
    return subprocess.run([str(word) for word in words], cwd=ROOT, env=environment, capture_output=True, text=True)


def setup(folder: Path, machine: str, *words: object, **scripts: str) -> subprocess.CompletedProcess[str]:
    path = on_path(folder.parent / "commands", **ANSWERS[machine], **scripts)
    return run("bash", "scripts/setup_envs.sh", "--manager", "venv", "--prefix", folder, *words, PATH=path)


@pytest.mark.parametrize(("machine", "device"), [("gpu", "cuda"), ("no gpu", "cpu")])
def test_the_first_environments_are_for_the_gpu_that_nvidia_smi_shows(tmp_path, machine, device):
    for name in ("inference", "training"):  # something of the user's, so that nothing is installed over it
        (tmp_path / "envs" / name / "notes").mkdir(parents=True)
    done = setup(tmp_path / "envs", machine)
    assert f"packages for {device} with venv" in done.stderr and "was not made here" in done.stderr
    assert done.returncode == 2


@pytest.mark.parametrize(("device", "machine"), [("cuda", "no gpu"), ("cpu", "gpu"), ("cuda", "gpu"), ("cpu", "no gpu")])
def test_environments_stay_for_the_device_that_they_were_made_for(tmp_path, device, machine):
    envs = made_for(device, tmp_path / "envs", python=Path("/bin/false"))
    done = setup(envs, machine)
    assert done.returncode == 0, done.stderr
    assert f"both environments are up to date in {envs} ({device})" in done.stderr
    assert "the training environment is up to date" in setup(envs, machine, "--only", "training").stderr
    differs = (device == "cuda") != (machine == "gpu")
    assert (f"stays for {device}, though" in done.stderr) == differs
    assert ("--device cpu makes it anew" in done.stderr) == (device == "cuda" and differs)


def test_another_device_is_installed_where_it_is_requested_and_a_change_that_was_cut_short_goes_on(tmp_path):
    envs = made_for("cuda", tmp_path / "envs", python=Path("/bin/false"))  # whose pip fails
    none = dict.fromkeys(("python3.11", "python3", "python"), "exit 1")  # nothing is installed
    for words in (["--device", "cpu"], []):
        done = setup(envs, "gpu", *words, **none)
        assert done.returncode == 1 and "packages for cpu with venv" in done.stderr, done.stderr


def test_environments_in_use_are_not_changed(tmp_path):
    envs = made_for("cuda", tmp_path / "envs", python=Path(shutil.which("sleep")))
    stamps = [(envs / name / "baton.stamp").read_text() for name in ("inference", "training")]
    with subprocess.Popen([envs / "training/bin/python", "600"]) as user:
        try:
            done = setup(envs, "no gpu", "--device", "cpu")
        finally:
            user.kill()
    assert done.returncode in (1, 2)  # the inference environment, which nobody uses, has no pip
    assert f"{envs}/training would be changed, but processes run in it ({user.pid}): wait for them" in done.stderr
    assert not (envs / ".training.unfinished").exists()
    assert (envs / "training/baton.stamp").read_text() == stamps[1]


@pytest.mark.parametrize(
    ("scripts", "message", "code"),
    [
        ({"uname": "echo Darwin"}, "Baton runs on Linux", 2),
        ({"nvidia_smi": "echo 550.54.14"}, "needs NVIDIA's driver 580 or a newer one; this machine has 550.54.14", 1),
        ({"uname": "[[ $1 == -m ]] && echo aarch64 || echo Linux"}, "for x86-64, and this machine is aarch64", 1),
    ],
)
def test_what_a_machine_lacks_is_said_before_anything_is_installed(tmp_path, scripts, message, code):
    envs = made_for("cuda", tmp_path / "envs", python=Path("/bin/false"))  # whose pip fails
    for name in ("inference", "training"):
        (envs / name / "baton.stamp").write_text(f"venv {envs / name}\ncuda of other pins\n")
    path = on_path(tmp_path / "commands", **ANSWERS["gpu"] | scripts)
    done = run("bash", "scripts/setup_envs.sh", "--manager", "venv", "--prefix", envs, PATH=path)
    assert done.returncode == code and message in done.stderr, done.stderr


def test_a_folder_without_locks_is_said_with_its_path_and_what_to_do(tmp_path):
    """The answer is made up, in the command that passes it on: no file system here gives it."""
    done = setup(tmp_path / "envs", "no gpu", flock="echo 'flock: No locks available' >&2; exit 71")
    assert done.returncode == 2
    assert f"{tmp_path}/envs/.inference.lock: no lock can be had there (flock: No locks available)" in done.stderr
    assert "choose a --prefix on a file system that has locks" in done.stderr


@pytest.mark.parametrize("lock", [None, "# no pin\n"])
def test_environments_stay_as_they_are_where_a_lock_cannot_be_read_or_is_empty(tmp_path, lock):
    envs = made_for("cpu", tmp_path / "envs", python=Path("/bin/false"))
    shutil.copytree(ROOT / "scripts", tmp_path / "clone/scripts")
    shutil.copytree(ROOT / "configs/envs", tmp_path / "clone/configs/envs")
    broken = tmp_path / "clone/configs/envs/training-cpu.txt"
    broken.unlink() if lock is None else broken.write_text(lock)
    done = run("bash", tmp_path / "clone/scripts/setup_envs.sh", "--device", "cpu", "--prefix", envs)
    assert done.returncode == 2 and f"{broken}: cannot be read, or pins no package" in done.stderr
    assert sorted(path.name for path in envs.iterdir()) == ["inference", "training"]


def test_scripts_find_their_folders_where_cdpath_is_set(tmp_path):
    envs = made_for("cpu", tmp_path / "envs", python=Path("/bin/false"))
    (tmp_path / "elsewhere/envs").mkdir(parents=True)
    assert shell("CDPATH=$PWD; source scripts/lib.sh; echo $BATON_ROOT").stdout == f"{ROOT}\n"
    command = f"cd '{tmp_path}' && CDPATH='{tmp_path}/elsewhere' bash '{ROOT}/scripts/setup_envs.sh' --prefix envs"
    done = run("bash", "-c", f"{command} --device cpu")
    assert f"both environments are up to date in {envs} (cpu)" in done.stderr, done.stderr


# Writes down what `baton.launch chain` would run: of each unit on stdin the GPUs and the words.
RECORDER = """
import os, sys
words = iter(sys.stdin.read().split("\\0")[:-1])
with open(os.environ["RECORD"], "a") as file:
    for count in words:
        print(os.environ["CUDA_VISIBLE_DEVICES"], " ".join(next(words) for _ in range(int(count))), sep="|", file=file)
"""
RECORDS = """
case "$1 $2 $3" in
  "-m baton.launch chain") exec "$REAL" -c "$RECORDER" ;;
  "-m baton.launch plan") cat >/dev/null ;;
  report/*) ;;
  "-m baton.launch "* | "-c import sys; from baton.program "*) exec "$REAL" "$@" ;;
  *) exit 1 ;;  # pip, for one, must never reach an environment that is in use
esac"""


ON_CPU = "bfloat16" if cpu_has_bfloat16() else "float32"


def quickstart(folder: Path, device: str, machine: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """What `quickstart.sh` started, each stage as `GPUS|WORDS`: nothing runs."""
    path = on_path(folder / "commands", **ANSWERS[machine], records=RECORDS)
    variables |= {"PATH": path, "RECORD": str(folder / "record"), "RECORDER": RECORDER, "REAL": sys.executable}
    envs = made_for(device, folder / "envs", python=folder / "commands/records")
    words = ["bash", "scripts/quickstart.sh", "--run_dir", folder / "run"]
    done = run(*words, BATON_ENVS=str(envs), **({"CUDA_VISIBLE_DEVICES": ""} | variables))
    record = folder / "record"
    return done, record.read_text().splitlines() if record.exists() else []


@pytest.mark.parametrize(
    ("device", "machine", "variables", "gpu", "dtype"),
    [
        ("cuda", "gpu", {}, "0", "bfloat16"),
        ("cuda", "gpu", {"CUDA_VISIBLE_DEVICES": "3,1"}, "3", "bfloat16"),
        ("cuda", "old gpu", {}, "0", "float32"),
        ("cpu", "no gpu", {}, "", ON_CPU),
        ("cpu", "gpu", {}, "", ON_CPU),
        ("cpu", "gpu", {"CUDA_VISIBLE_DEVICES": "3,1"}, "", ON_CPU),
    ],
)
def test_the_quickstart_runs_on_what_its_environments_are_made_for(tmp_path, device, machine, variables, gpu, dtype):
    done, started = quickstart(tmp_path, device, machine, **variables)
    assert done.returncode == 0, done.stderr
    assert f"runs on {f'GPU {gpu}' if gpu else 'the CPU'} in {dtype}" in done.stderr
    assert {line.partition("|")[0] for line in started} == {gpu}
    of_stage = {line.split()[1]: line.split() for line in started}
    assert len(started) == len(of_stage) == 4 + 4 + 3 * (3 + 4)
    number = str(len(gpu and [gpu]))
    for name, words in of_stage.items():
        if "train" in name or "rewards" in name or "logps" in name:
            assert words[words.index("--gpus") + 1] == number, name
        if "train" in name or name in ("sft", "reward-model"):
            assert words[words.index("--bf16") + 1] == str(dtype == "bfloat16").lower()
            assert "--use_cpu" not in words
        if "generate" in name:
            assert words[words.index("--dtype") + 1] == dtype


def ppo(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """What `run_ppo.sh` starts from `folder` on a machine of two GPUs, as FOLDER|WORDS: nothing runs."""
    starts = 'case "$*" in *run_ppo.py*) echo "$PWD|$*" ;; *) exec "$REAL" "$@" ;; esac'
    path = on_path(folder / "commands", **ANSWERS["gpu"], starts=starts)
    envs = made_for("cuda", folder / "envs", python=folder / "commands/starts")
    variables |= {"PATH": path, "REAL": sys.executable, "BATON_ENVS": str(envs), "CUDA_VISIBLE_DEVICES": ""}
    return run("bash", "-c", f"cd '{folder}' && bash '{ROOT}/scripts/run_ppo.sh' own.yaml --output_dir runs/ppo", **variables)


def test_run_ppo_takes_all_paths_relative_to_where_it_is_called(tmp_path):
    done = ppo(tmp_path, SERVER_GPUS="1")
    assert done.returncode == 0, done.stderr
    where, words = done.stdout.strip().split("|")
    assert where == str(tmp_path) and f"--gpus 1 --accelerate_config {ROOT}/configs/zero2.yaml {ROOT}/ppo/run_ppo.py" in words
    assert words.endswith("run_ppo.py own.yaml --server_gpus 1 --output_dir runs/ppo")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"GPUS": "two"}, "run_ppo.sh: GPUS is a whole number, not 'two'"),
        ({"SERVER_GPUS": "-1"}, "run_ppo.sh: SERVER_GPUS is a whole number, not '-1'"),
        ({"GPUS": "3"}, "run_ppo.sh: GPUS=3, but there are 2 to use"),
        ({"SERVER_GPUS": "2"}, "run_ppo.sh: SERVER_GPUS=2 of GPUS=2: none is left to train"),
        ({"ACCELERATE_CONFIG": "zero3.yaml"}, "run_ppo.sh: ACCELERATE_CONFIG=zero3.yaml: no such file"),
    ],
)
def test_run_ppo_refuses_gpus_and_a_file_that_there_are_not(tmp_path, variables, message):
    done = ppo(tmp_path, **variables)
    assert (done.returncode, done.stdout) == (2, "") and message in done.stderr, done.stderr


def test_one_gpu_without_a_file_for_accelerate_is_one_plain_process():
    assert launcher_words(Unit("train", "training", ("run_dpo.py",), gpus=1, accelerate_config="")) == ["python"]


def test_the_quickstart_in_cuda_environments_without_a_gpu_is_refused_before_any_stage(tmp_path):
    done, started = quickstart(tmp_path, "cuda", "no gpu")
    assert (done.returncode, started) == (2, [])
    assert "is made for CUDA, and there is no GPU to use here" in done.stderr
    assert "BATON_ENVS=.envs-cpu bash scripts/quickstart.sh --device cpu" in done.stderr


@pytest.mark.parametrize("named", [None, "0,1"])
def test_environments_for_the_cpu_use_no_gpu_whatever_the_machine_has(tmp_path, monkeypatch, named):
    monkeypatch.setenv("PATH", on_path(tmp_path / "commands", **ANSWERS["gpu"]))
    if named is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setenv("BATON_ENVS", str(made_for("cpu", tmp_path / "cpu")))
    assert gpus.visible() == []
    monkeypatch.setenv("BATON_ENVS", str(made_for("cuda", tmp_path / "cuda")))
    assert gpus.visible() == ["0", "1"]


@pytest.mark.parametrize(
    ("device", "visible", "backend", "code"),
    [("cuda", "", "vllm", 2), ("cuda", "", "hf", 0), ("cuda", "0", "vllm", 0), ("cpu", "", "vllm", 0)],
)
def test_vllm_without_its_gpu_is_refused_before_it_is_imported(tmp_path, device, visible, backend, code):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Hello"}])
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    words = ["--model_name_or_path", tmp_path / "model", "--dataset_name_or_path", prompts, "--output_dir", tmp_path / "gen"]
    environment = os.environ | {"BATON_ENVS": str(made_for(device, tmp_path / "envs")), "CUDA_VISIBLE_DEVICES": visible}
    done = subprocess.run(
        [sys.executable, "generation/get_hf2.py", *map(str, words), "--backend", backend, "--check"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert ("whose vLLM cannot run on a CPU: use a GPU" in done.stderr) == (code == 2)


def shell(lines: str, envs: Path = Path(sys.prefix).parent) -> subprocess.CompletedProcess[str]:
    return run("bash", "-c", f"source scripts/lib.sh; {lines}", BATON_ENVS=str(envs))


def test_a_missing_environment_does_not_end_the_shell_of_a_user(tmp_path):
    done = shell("in_env inference python -V; echo $?", tmp_path)
    assert done.stdout == "2\n"
    assert done.stderr.count("run bash scripts/setup_envs.sh") == 1


def test_a_missing_environment_ends_a_script_from_within_a_substitution_or_a_pipe(tmp_path):
    for lines in ("gpus=$(gpu_ids)", "in_env training python -V | cat", "echo x | in_env training cat"):
        done = shell(f"set -euo pipefail; {lines}; echo went on", tmp_path)
        assert (done.returncode, done.stdout) == (2, ""), lines
        assert done.stderr.count("run bash scripts/setup_envs.sh") == 1


def test_in_env_reads_no_packages_of_the_users_own_and_keeps_what_python_compiles():
    program = "import sys; print(sys.flags.no_user_site, sys.dont_write_bytecode)"
    assert shell(f"PYTHONDONTWRITEBYTECODE=1 in_env training python -c '{program}'").stdout == "1 False\n"


def test_the_commands_that_the_documentation_names_are_those_of_the_environment():
    for environment, commands in (("training", "accelerate hf wandb tensorboard"), ("inference", "accelerate hf")):
        done = shell(f"in_env {environment} bash -c 'command -v {commands}'")
        folder = Path(sys.prefix).parent / environment / "bin"
        assert done.stdout.split() == [str(folder / name) for name in commands.split()]


PROGRAM = """
import multiprocessing
import baton
def show():
    print(baton.__file__, flush=True)
if __name__ == "__main__":
    show()
    child = multiprocessing.get_context("spawn").Process(target=show)
    child.start()
    child.join()
"""


def test_clones_that_share_an_environment_run_their_own_code(tmp_path):
    """Their programs called directly with its Python, from anywhere; processes that these spawn too."""
    environment = tmp_path / "envs/training"
    subprocess.run([sys._base_executable, "-m", "venv", "--without-pip", environment], check=True)
    for name in ("first", "second"):
        clone = tmp_path / name
        (clone / "stage").mkdir(parents=True)
        (clone / "stage/program.py").write_text(PROGRAM)
        for part in ("baton", "configs/envs"):
            shutil.copytree(ROOT / part, clone / part)
        link = "source <(sed -n '/^link_project()/,/^}/p' scripts/setup_envs.sh); link_project training"
        assert run("bash", "-euc", link, BATON_ENVS=str(tmp_path / "envs"), BATON_ROOT=str(clone)).returncode == 0
    for name in ("first", "second"):
        words = [environment / "bin/python", tmp_path / name / "stage/program.py"]
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(words, cwd="/", env=variables, capture_output=True, text=True)
        assert done.stdout.splitlines() == [str(tmp_path / name / "baton/__init__.py")] * 2, done.stderr
