"""What docs/coming_from says to type runs here: each line is checked as `--check` does, on tiny files under the pages' names.

A page has code blocks after «You typed:», lines of another toolkit, and after «You type:», Baton's. All lines of a page that
call a program of Baton's are looked at in order and in one process, as a user would type them one after another: what one
would make is there for the next. Nothing is run, and no hub is asked.
"""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from baton import ahead
from baton.launch.plan import plan, problems
from baton.launch.unit import Unit
from baton.training.known import CONFIGS, config_fields
from generation import register_server
from ppo.openrlhf import NAMES
from tests.contract.test_docs import CODE_SPAN, FOLDERS, PROGRAM, own_flags
from tests.contract.test_loop import run_loop

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs/coming_from").glob("*.md"))
OPTIONS = ROOT / "docs/options.md"

THERE, HERE = "You typed:", "You type:"
ENVIRONMENTS = {"generation": "inference", "annotate_data": "inference"}  # the others' is training
# What a script runs, and which of its words are left: a plan looks at Python programs.
SCRIPTS = {"scripts/test_gen.sh": "generation/run_shards.py", "scripts/run_ppo.sh": "ppo/run_ppo.py"}
# Scripts whose flags tests/contract/test_docs.py compares with theirs, and that have nothing else to look at.
PLAIN = {"scripts/setup_envs.sh", "scripts/quickstart.sh", "report/summarize.py"}
OF_LAUNCHERS = set("--config_file --num_processes --num_machines --machine_rank --main_process_ip --main_process_port".split())

MESSAGES = [{"role": "user", "content": "q"}]
SAMPLED = {"prompt": MESSAGES, "responses": ["a", "b", "c", "d"]}
FILES = {
    "data/sft.jsonl": {"prompt": "q", "response": "a"},
    "data/messages.jsonl": {"messages": [{"from": "human", "content": "q"}, {"from": "assistant", "content": "a"}]},
    "data/preferences.jsonl": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "data/context.jsonl": {
        "context": [{"from": "human", "content": "q"}],
        "chosen": [{"from": "assistant", "content": "a"}],
        "rejected": [{"from": "assistant", "content": "b"}],
    },
    "data/labelled.jsonl": {"prompt": "q", "completion": "a", "label": True},
    "data/prompts.jsonl": {"prompt": "q"},
    "data/heldout.jsonl": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "data/pretrain.jsonl": {"text": "a"},
    "data/sft_pos-train.jsonl": {"prompt": "q", "answer": "a"},
    "data/rm_paired-train.jsonl": {"prompt": "q", "pos_answers": ["a", "c"], "neg_answers": ["b", "d"]},
    "data/rm_paired-valid.jsonl": {"prompt": "q", "pos_answers": ["a"], "neg_answers": ["b"]},
    "data/ppo_prompt.jsonl": {"prompt": "q"},
    "data/sampled.jsonl": SAMPLED,
    "data/scored.jsonl": SAMPLED | {"rewards": [0.0, 1.0, 2.0, 3.0]},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder in which the pages' lines are typed: the project's files, and the data that the pages name."""
    for name in (*FOLDERS, "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "data").mkdir()
    for name, record in FILES.items():
        (tmp_path / name).write_text(f"{json.dumps(record)}\n" * 40)
    (tmp_path / "data/chat.jinja").write_text("{{ messages[0].content }}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ahead.OUTLOOK = ahead.Outlook()
    return tmp_path


def blocks(page: Path) -> list[tuple[str, list[str]]]:
    """(THERE or HERE, or the line before it, and its commands) of each indented block of a page, continued lines joined."""
    found: list[tuple[str, list[str]]] = []
    label, lines = "", []
    for line in [*page.read_text(encoding="utf-8").splitlines(), "end"]:
        if line.startswith("    ") or (lines and not line.strip()):
            lines.append(line.strip())
        elif line.strip():
            if lines:
                found.append((label, [each for each in "\n".join(lines).replace("\\\n", " ").splitlines() if each]))
            label, lines = next((end for end in (THERE, HERE) if line.endswith(end)), line), []
    return found


def is_recipe(lines: list[str]) -> bool:
    return all(re.fullmatch(r"[A-Z_]+=(\S+|\(.*\))|#.*", line) for line in lines)


def unit_of(line: str) -> Unit | None:
    """The program that a line calls, with its words; None for a line that calls none of Baton's."""
    words = [word for word in shlex.split(line, comments=True) if word != "&"]
    if words[:3] == ["python", "-m", "baton.data"]:
        words[:3] = ["python", "baton/data/__main__.py"]
    at = next((i for i, word in enumerate(words) if (match := PROGRAM.fullmatch(word)) and (ROOT / match[1]).is_file()), None)
    if at is None:
        return None
    program = PROGRAM.fullmatch(words[at])[1]
    program = SCRIPTS.get(program, program)
    environment = ENVIRONMENTS.get(program.split("/")[0], "training")
    return Unit(name=line, environment=environment, program=(str(ROOT / program), *words[at + 1 :]))


def look_at(lines: list[str]) -> str:
    """What is wrong with lines, in order; the empty text where nothing is."""
    units, said = [], []
    for unit in filter(None, map(unit_of, lines)):
        name = str(Path(unit.program[0]).relative_to(ROOT))
        if name.endswith("register_server.sh"):
            register_server.parse(list(unit.program[1:]))
        elif name == "scripts/run_loop.sh" or name in PLAIN:
            continue
        elif name.endswith(".sh"):
            said.append(f"{unit.name}: no rule says how this script is looked at")
        else:
            units.append(unit)
    return "\n".join([*said, problems(plan(units))]).strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_each_block_of_another_toolkits_lines_is_answered_by_lines_of_batons(page):
    found = [(label, lines) for label, lines in blocks(page) if label in (THERE, HERE)]
    labels = [label for label, _ in found]
    assert labels and labels == [THERE, HERE] * (len(labels) // 2)
    for _, lines in found[1::2]:
        assert is_recipe(lines) or any(unit_of(line) for line in lines), lines


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_says_to_type_is_accepted_by_the_programs(page, folder):
    lines = [line for label, lines in blocks(page) if label == HERE and not is_recipe(lines) for line in lines]
    assert look_at(lines) == ""


RECIPES = [(page.stem, lines) for page in PAGES for label, lines in blocks(page) if label == HERE and is_recipe(lines)]


@pytest.mark.parametrize(("page", "lines"), RECIPES, ids=[name for name, _ in RECIPES])
def test_a_recipe_on_a_page_can_be_planned(page, lines, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "own.env").write_text("\n".join(lines) + "\n")
    done = run_loop(tmp_path / "own.env", "--plan", "--run_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("python sft/run_sft.py configs/sft.yaml --learning_rat 1e-6", "did you mean `learning_rate`?"),
        ("python sft/run_sft.py configs/sft.yaml --num_train_epochs many", "`num_train_epochs`"),
        ("python sft/run_sft.py configs/sft.yaml --dataset_name_or_path data/none.jsonl", "no such file"),
        ("bash scripts/test_gen.sh --model a/b --prompts data/prompts.jsonl --K 4 --temperature 0", "greedy"),
        ("bash scripts/run_ppo.sh configs/ppo.yaml --pretrain a/b --zero_stage 3", "configs/zero2.yaml"),
        ("bash scripts/best_of_n.sh a/b data/prompts.jsonl data/best.jsonl", "no rule"),
    ],
)
def test_a_line_that_is_not_accepted_is_found(line, message, folder):
    assert message in look_at([line])


def test_the_losses_of_the_recipes_are_accepted_by_their_trainer(folder):
    script = 'RUN_DIR=run; source "$1"; printf "%s\\n" "${DPO_CONFIG:-configs/training.yaml}" "${DPO_ARGS[@]}"'
    units = []
    for recipe in sorted(ROOT.glob("configs/recipes/*.env")):
        done = subprocess.run(["bash", "-c", script, "bash", recipe], capture_output=True, text=True, check=True)
        words = done.stdout.replace("data/gpt4_turbo_with_rewards", "data/scored").split()
        words += f"--model_name_or_path a/b --dataset_name_or_path data/scored.jsonl --output_dir out/{recipe.stem}".split()
        units.append(Unit(recipe.stem, "training", (str(ROOT / "dpo_iteration/run_dpo.py"), *words)))
    assert problems(plan(units)) == ""


def test_every_option_that_the_table_offers_is_one_of_a_program():
    known = {name for config in CONFIGS.values() for name in config_fields(config)} | set(NAMES)
    files = [file for name in FOLDERS for file in (ROOT / name).glob("*.py") if "class Arguments(" in file.read_text()]
    flags = {flag for file in files for flag in own_flags(str(file.relative_to(ROOT)))} | OF_LAUNCHERS
    lines = OPTIONS.read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ") and not line.startswith(("| ---", "| option"))]
    assert len(rows) > 100 and all(len(row) == 3 for row in rows)
    named = {flag for row in rows for span in CODE_SPAN.findall(row[-1]) for flag in re.findall(r"(?<![\w-])--\w+", span)}
    assert {flag for flag in named - flags if flag[2:] not in known} == set()
