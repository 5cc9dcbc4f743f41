"""The GPUs that may be used."""

import os
import re
import subprocess
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from baton.errors import InputError
from baton.launch.unit import made_for

GPU = re.compile(r"\d+|(GPU|MIG)-.+")  # a number or an identifier, as CUDA_VISIBLE_DEVICES names one


def visible() -> list[str]:
    """The GPUs in CUDA_VISIBLE_DEVICES where it is set, else all of the machine; none without a driver.

    None either where the environments are made for the CPU: what is installed there can use no GPU.
    """
    if made_for("inference") == "cpu":
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        try:
            listed = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:  # a container without it still has the devices, numbered from 0 for CUDA
            return [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]
        return listed.stdout.split() if listed.returncode == 0 else []
    names = (name.strip() for name in named.split(","))
    return list(takewhile(GPU.fullmatch, names))  # as CUDA: any other word, such as -1 or Slurm's NoDevFiles, ends the list


def check_vllm() -> None:
    """Raise InputError where vLLM cannot run: the environment has its CUDA build, and there is no GPU to use."""
    if made_for("inference") == "cuda" and not visible():
        raise InputError(
            "no GPU may be used (GPUS=0 in a recipe, CUDA_VISIBLE_DEVICES), and the inference environment is made for CUDA, "
            "whose vLLM cannot run on a CPU: use a GPU, or --backend hf, or environments for the CPU (BATON_ENVS=.envs-cpu "
            "bash scripts/setup_envs.sh --device cpu, and BATON_ENVS=.envs-cpu before this command)"
        )


def groups(gpus: Sequence[str], size: int) -> list[list[str]]:
    """`gpus` cut into groups of `size` (1 or more) that share one copy of a model; what does not fill a group is left out."""
    return [list(gpus[first : first + size]) for first in range(0, len(gpus) - size + 1, size)]
