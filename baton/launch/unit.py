"""A unit of work: a program, the environment that runs it, its GPUs and its log; and the command line that it comes to."""

import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

from baton import program
from baton.errors import InputError
from baton.secrets import secret_among

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ("inference", "training")
# What torchrun and `accelerate launch` tell a process of a training: a server that one of these starts is none of them.
OF_TRAINING = {
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "GROUP_WORLD_SIZE",
    "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE",
}  # fmt: skip
TAIL_LINES = 15  # of a log that a failure shows
# Files in the folder of a chain: how its units ended, an exit code a line; that it may begin; that it has its libraries.
DONE, GO, READY = "done", "go", "ready"
PROCESSES = "BATON_PROCESSES"  # the variable that tells a program how many processes it should see


@dataclass(frozen=True)
class Unit:
    """A program to run, and what it needs.

    `name` stands in messages. `program` are the words after `python`. `gpus` is how many GPUs it gets for itself; with 0 it
    sees those that its launcher sees. `accelerate launch` starts several `processes`, and a single one on GPUs where there is
    an `accelerate_config`. `variables` are added to its environment variables. Without a `log` its output goes where that of
    the launcher goes. It shares a process only with units of the same `group`, see `chains`.
    """

    name: str
    environment: str  # inference or training
    program: tuple[str, ...]
    gpus: int = 0
    processes: int = 1
    accelerate_config: str | None = None
    log: Path | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    group: str = ""


def chains(units: Iterable[Unit]) -> list[list[Unit]]:
    """Units in groups that a process each can run, one unit after another: those that follow each other and need the same."""

    def needs(unit: Unit) -> tuple[object, ...]:
        return unit.environment, unit.gpus, unit.processes, unit.accelerate_config, dict(unit.variables), unit.group

    return [list(same) for _, same in groupby(units, needs)]


def chained(units: Sequence[Unit], folder: Path) -> Unit:
    """One unit that runs `units`, which need the same, in one process; the files in `folder` are those named above."""
    first, words = units[0], []
    for unit in units:
        words += [str(unit.log or ""), str(len(unit.program)), *unit.program]
    program_words = ("-m", "baton.launch.stages", *words)
    return replace(first, program=program_words, variables={**first.variables, program.CHAIN: str(folder)})


def uses_accelerate(unit: Unit) -> bool:
    """Whether `accelerate launch` stands between the launcher and the program."""
    return unit.processes > 1 or bool(unit.gpus and unit.accelerate_config)


def command_line(unit: Unit) -> list[str]:
    """The words to execute. Raises InputError if the environment is missing, or for a secret among the words."""
    refuse_secrets(unit.name, unit.program)
    launcher = launcher_words(unit)
    launcher[0] = str(environment_folder(unit.environment) / "bin/python")
    return [*launcher, *unit.program]


def launcher_words(unit: Unit) -> list[str]:
    """The words that start a unit's program, in its environment: `python`, or `accelerate launch` as a module of it."""
    if not uses_accelerate(unit):
        return ["python"]
    # On a CPU --multi_gpu stands for several processes, and a variable says that they use no GPU: see `variables`.
    kind = ["--config_file", unit.accelerate_config] if unit.gpus and unit.accelerate_config else ["--multi_gpu"]
    # Port 0 is any free one: the usual 29500 may belong to another run on this machine.
    port = ["--main_process_port", "0"]
    return ["python", "-m", "accelerate.commands.launch", *kind, *port, "--num_processes", str(unit.processes)]


def refuse_secrets(name: str, words: Iterable[str]) -> None:
    """Raise InputError, with the name of who has them, for a secret among words of a command line."""
    if secret := secret_among(words):
        raise InputError(
            f"{name}: {secret}: every user of a machine can read its command lines; give the secret in an environment "
            "variable instead (HF_TOKEN, OPENAI_API_KEY, VLLM_API_KEY)"
        )


def variables(unit: Unit) -> dict[str, str]:
    """All environment variables of the unit: those of its environment as if it was activated, and its own.

    Raises InputError if the environment is missing.
    """
    folder = environment_folder(unit.environment)
    # PYTHONDONTWRITEBYTECODE: see `in_env` in scripts/lib.sh.
    left_out = {"PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV", "CONDA_PREFIX"}
    left_out |= {program.PARENT, program.FAILURE, program.CHAIN}
    left_out |= OF_TRAINING
    values = {name: value for name, value in os.environ.items() if name not in left_out}
    others = {str(folder.parent / name / "bin") for name in ENVIRONMENTS}
    path = [part for part in values.get("PATH", os.defpath).split(os.pathsep) if part not in others]
    python_path = [part for part in values.get("PYTHONPATH", "").split(os.pathsep) if part and part != str(ROOT)]
    values["CONDA_PREFIX" if (folder / "conda-meta").is_dir() else "VIRTUAL_ENV"] = str(folder)
    values["PATH"] = os.pathsep.join([str(folder / "bin"), *path])
    values["PYTHONPATH"] = os.pathsep.join([str(ROOT), *python_path])
    values["PYTHONNOUSERSITE"] = "1"  # a conda environment would read the user's own packages in ~/.local
    values[PROCESSES] = str(unit.processes)
    if unit.processes > 1 and not unit.gpus:
        values["ACCELERATE_USE_CPU"] = "true"
    return values | dict(unit.variables)


def end_of_log(log: Path, start: int = 0) -> list[str]:
    """The last lines of a log, of what was written from byte `start` on; none where there is no log."""
    if not log.exists():
        return []
    with log.open("rb") as file:
        file.seek(start)
        return [line.decode(errors="replace").rstrip("\n") for line in deque(file, TAIL_LINES)]


def environment_folder(name: str) -> Path:
    """The folder of an environment. Raises InputError if it is not installed, or half installed."""
    if name not in ENVIRONMENTS:
        raise InputError(f"no environment '{name}'; there are {' and '.join(ENVIRONMENTS)}")
    folder = _environments()
    if not os.access(folder / name / "bin/python", os.X_OK) or (folder / f".{name}.unfinished").exists():
        raise InputError(f"the {name} environment is missing in {folder}: run bash scripts/setup_envs.sh")
    return folder / name


def made_for(name: str) -> str | None:
    """`cpu` or `cuda`: what an environment is made for, as scripts/setup_envs.sh notes in it; None where there is no note."""
    try:
        _, second = (_environments() / name / "baton.stamp").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return None
    return second.split(" ")[0]


def _environments() -> Path:
    """The folder of all environments."""
    return Path(os.environ.get("BATON_ENVS") or ROOT / ".envs").absolute()
