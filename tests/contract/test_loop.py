"""What run_loop.sh refuses and what it plans before any stage starts."""

import json
import re
import shlex
import subprocess
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest

from baton import ahead
from baton.errors import InputError
from baton.launch import recipe
from baton.launch.plan import listing, plan, problems
from baton.launch.unit import Unit
from baton.sources import check_hub_ahead
from baton.task import VERSION

ROOT = Path(__file__).resolve().parents[2]
KNOWN = ("INITIAL_POLICY", "MAX_NEW_TOKENS", "LEARNING_RATE_OF_NOTHING", "K")


def run_loop(*words: object) -> subprocess.CompletedProcess[str]:
    command = ["bash", "scripts/run_loop.sh", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(autouse=True)
def nothing_looked_at_yet():
    ahead.OUTLOOK = ahead.Outlook()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with what a recipe names: a policy, a reward model, prompts, a function that scores. Nothing can be loaded."""
    for name, config in (("policy", {}), ("reward", {"architectures": ["X"], "num_labels": 1})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        for file in ("model.safetensors", "tokenizer.json"):
            (tmp_path / name / file).write_text("")
    for name in ("prompts", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"prompt": "{i}"}}\n' for i in range(8)))
    (tmp_path / "rule.py").write_text("def brevity(prompts, responses, records):\n    return [-len(r) for r in responses]\n")
    return tmp_path


def written_recipe(folder: Path, text: str) -> Path:
    """A recipe for the folder: what every recipe needs on a CPU, and `text`."""
    path = folder / "own.env"
    path.write_text(f"INITIAL_POLICY={folder}/policy\nPROMPTS=({folder}/prompts.jsonl)\nGPUS=0\n{text}")
    return path


def commands(planned: str) -> dict[str, str]:
    """The command line of each stage, by its name, as `--plan` prints them."""
    lines = planned.splitlines()
    return {name.split(":")[0]: line for name, line in pairwise(lines) if line.startswith("    in_env ")}


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ("MAX_NEW_TOKEN", "unknown variable MAX_NEW_TOKEN: did you mean MAX_NEW_TOKENS"),
        ("BLUE", "unknown variable BLUE: there are INITIAL_POLICY, MAX_NEW_TOKENS"),
        ("max_new_tokens", "unknown variable max_new_tokens: did you mean MAX_NEW_TOKENS"),
        ("Max_New_Tokens", "unknown variable Max_New_Tokens: did you mean MAX_NEW_TOKENS"),
    ],
)
def test_a_variable_that_there_is_not_is_refused_with_the_nearest(new, message):
    with pytest.raises(InputError, match=message):
        recipe.check("own.env", [], KNOWN, [new])


def test_a_recipe_may_have_variables_of_its_own_and_variables_for_programs(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    recipe.check("own.env", [], KNOWN, ["base", "VLLM_CPU_KVCACHE_SPACE", "K", "BASH_REMATCH"])


@pytest.mark.parametrize(
    ("name", "word", "message"),
    [
        ("GENERATE_ARGS", "--dtype float32", r"GENERATE_ARGS=\(--dtype float32\)"),
        ("GENERATE_ARGS", "--chat_template=x.jinja", "set CHAT_TEMPLATE"),
        ("DPO_ARGS", "--chat_template", "set CHAT_TEMPLATE"),
        ("GENERATE_ARGS", "--max_samples", "would choose among the held-out prompts too: put it into PROMPT_ARGS"),
        ("REWARD_ARGS", "--scorer", "set SCORERS"),
    ],
)
def test_a_word_that_cannot_be_meant_is_refused(name, word, message):
    with pytest.raises(InputError, match=message):
        recipe.check("own.env", [(name, word)], KNOWN, [])


def test_a_template_of_the_reward_model_is_its_own():
    recipe.check("own.env", [("REWARD_ARGS", "--chat_template"), ("PROMPT_ARGS", "--max_samples")], KNOWN, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SCORERS=(bt:reward)\nMAX_NEW_TOKEN=24\n", "did you mean MAX_NEW_TOKENS?"),
        ("", "sets neither REWARD_MODEL nor SCORERS"),
        ("REWARD_MODEL=reward\nK=1\n", "a preference pair needs 2 responses"),
        ("REWARD_MODEL=reward\nK=many\n", "K is a whole number from 1, not 'many'"),
        ("REWARD_MODEL=reward\nEVAL_SCORERS=(bt:other)\n", "EVAL_SCORERS is for evaluation, and HELDOUT_PROMPTS is empty"),
        ("REWARD_MODEL=reward\nRUN_DIR=elsewhere\n", "own.env: line 5: RUN_DIR: readonly variable"),
        ("REWARD_MODEL=reward\nROLLOUT_BATCH_SIZE=4\nPROMPTS=(a b)\n", "windows of one prompt set, but PROMPTS names 2"),
        ("REWARD_MODEL=reward\nTRAINER=pp\n", "raft, conditional_sft, distillation, ppo or online_dpo, not 'pp'"),
        ("REWARD_MODEL=reward\nTRAIN_ARGS=(--x)\n", "the flags of TRAINER=dpo are DPO_ARGS"),
        ("REWARD_MODEL=reward\nTRAINER=raft\nTRAIN_CONFIG=a.yaml\nREFERENCE=previous\n", "TRAINER=raft has no reference"),
        ("REWARD_MODEL=reward\nLEVELS=(poor good)\n", "LEVELS is for TRAINER=conditional_sft"),
        ("REWARD_MODEL=reward\nTRAINER=ppo\n", "TRAINER=ppo needs its settings: TRAIN_CONFIG"),
        ("REWARD_MODEL=reward\nTRAINER=ppo\nTRAIN_CONFIG=a.yaml\nPROMPT_ARGS=(--x)\n", "PROMPT_ARGS is not for TRAINER=ppo"),
        ("REWARD_MODEL=reward\nSERVER_GPUS=1\n", "SERVER_GPUS=1 of GPUS=0: none is left to train"),
        ("REWARD_MODEL=reward\nrun_dir=elsewhere\n", "own.env: line 5: run_dir: readonly variable"),
        ("REWARD_MODEL=reward\nNAME=another\n", "unknown variable NAME"),
        ("REWARD_MODEL=reward\r\n", "own.env: has Windows line ends"),
        ("REWARD_MODEL=reward\nK = 4\n", "own.env: the shell stopped in it"),
        ("REWARD_MODEL=reward\n[[ -d nowhere ]] && K=4\n", "or its last line is a test that failed"),
        ("REWARD_MODEL=reward\nHELDOUT_PROMPTS=(a b)\n", "HELDOUT_PROMPTS is one value, without parentheses"),
        ("REWARD_MODEL=reward\nACCELERATE_CONFIG=zero2.yaml\n", "ACCELERATE_CONFIG=zero2.yaml: no such file in"),
        ("REWARD_MODEL=reward\nexport CUDA_VISIBLE_DEVICES=3\n", "sets CUDA_VISIBLE_DEVICES: set it before the command"),
    ],
)
def test_a_recipe_that_cannot_run_is_refused_and_nothing_is_written(folder, text, message):
    done = run_loop(written_recipe(folder, text), "--run_dir", folder / "run")
    assert done.returncode == 2 and message in done.stderr
    assert not (folder / "run").exists()


def test_held_out_prompts_that_are_trained_on_are_warned_of(folder):
    for held_out, warned in (("heldout", False), ("prompts", True)):
        text = f"REWARD_MODEL={folder}/reward\nGPUS=1\nHELDOUT_PROMPTS={folder}/{held_out}.jsonl\n"
        done = run_loop(written_recipe(folder, text), "--run_dir", folder / "run", "--plan")
        assert done.returncode == 0 and ("is trained on too" in done.stderr) == warned, done.stderr


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("quickstart", "configs/recipes/quickstart.env"),
        ("recipes/quickstart.env", "configs/recipes/quickstart.env"),
        ("{folder}/own", "{folder}/own.env"),
    ],
)
def test_a_recipe_that_is_not_there_is_named_with_the_one_that_is_meant(folder, name, meant):
    written_recipe(folder, "")
    done = run_loop(name.format(folder=folder), "--plan")
    assert done.returncode == 2 and f"did you mean {ROOT / meant.format(folder=folder)}?" in done.stderr


@pytest.mark.parametrize("script", ["run_loop.sh", "quickstart.sh", "smollm2.sh"])
def test_a_recipe_that_an_editor_on_windows_wrote_is_refused_with_the_command_that_mends_it(folder, script):
    recipe = folder / "own.env"
    text = (ROOT / "configs/recipes/quickstart.env").read_bytes()
    recipe.write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    flag = () if script == "run_loop.sh" else ("--recipe",)
    command = ["bash", f"scripts/{script}", *flag, recipe, "--run_dir", folder / "run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "own.env: has Windows line ends or a byte order mark; sed " in done.stderr
    assert not (folder / "run").exists()
    subprocess.run(["bash", "-c", done.stderr.partition("; ")[2].removesuffix(" takes them away\n")], check=True)
    assert recipe.read_bytes() == text


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("rule.py/run", "because {folder}/rule.py is no folder that you may write to"),
        ("lr=1e-6,beta=0.1", "{folder}/lr=1e-6,beta=0.1: a comma stands between the files that a program reads"),
    ],
)
@pytest.mark.parametrize("script", ["run_loop.sh", "quickstart.sh", "smollm2.sh"])
def test_a_run_folder_that_cannot_be_made_or_has_a_comma_is_refused_before_anything_is(folder, script, run, message):
    recipe = written_recipe(folder, "REWARD_MODEL=reward\n")
    flag = () if script == "run_loop.sh" else ("--recipe",)
    command = ["bash", f"scripts/{script}", *flag, recipe, f"--run_dir={folder}/{run}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and message.format(folder=folder) in done.stderr
    assert not (folder / run).exists()


def test_a_plan_says_at_once_that_a_comma_in_the_folders_path_does_not_work(folder):
    done = run_loop(written_recipe(folder, "REWARD_MODEL=reward\n"), "--run_dir", folder / "a,b", "--plan")
    assert done.returncode == 2 and "/a,b: a comma stands between" in done.stderr


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("configs/recipes/*.env")))
def test_every_recipe_of_ours_can_be_planned(name, tmp_path):
    done = run_loop(f"configs/recipes/{name}.env", "--run_dir", tmp_path / "run", "--plan")
    refused = [line for line in done.stderr.splitlines() if re.match(r"(\d\d:\d\d:\d\d )?(evaluate|round)\d+-", line)]
    assert all("no such f" in line for line in refused), refused  # what scripts/quickstart.sh makes first
    assert "run_loop.sh:" not in done.stderr and (done.returncode == 0 or refused), done.stderr


def test_the_plan_shows_every_stage_with_windows_own_heldout_settings_and_scorers_without_a_reward_model(folder):
    text = f"""
ROUNDS=2
ROLLOUT_BATCH_SIZE=4
PROMPT_ARGS=(--max_samples 6)
CHAT_TEMPLATE={folder}/own.jinja
SYSTEM_PROMPT='Be brief.'
DATASET_KEY=prompt
SCORERS=(short=function:{folder}/rule.py:brevity bt:{folder}/reward)
WEIGHTS=(0.5 1)
EVAL_SCORERS=(judge_of_all=function:{folder}/rule.py:brevity)
HELDOUT_PROMPTS={folder}/heldout.jsonl
HELDOUT_ARGS=(--temperature 0.7)
DPO_CONFIG=configs/quickstart/dpo.yaml
GOLD_SCORER=quickstart/score_gold.py
"""
    evaluated = folder / "run/heldout/round0/evaluated.jsonl"  # of a call without GOLD_SCORER
    evaluated.parent.mkdir(parents=True)
    evaluated.symlink_to("data_with_logps.jsonl")
    (folder / "own.jinja").write_text("{{ messages[0].content }}")
    done = run_loop(written_recipe(folder, text), "--plan", "--run_dir", folder / "run")
    assert done.returncode == 0, done.stderr
    assert [path for path in (folder / "run").rglob("*") if not path.is_dir()] == [evaluated]
    lines = commands(done.stdout)
    assert list(lines) == [
        *("evaluate0-generate", "round1-generate"),
        *("round1-rewards", "evaluate0-rewards", "evaluate0-logps", "evaluate0-gold", "round1-train"),
        *("evaluate1-generate", "round2-generate"),
        *("round2-rewards", "evaluate1-rewards", "evaluate1-logps", "evaluate1-gold", "round2-train"),
        *("evaluate2-generate", "evaluate2-rewards", "evaluate2-logps", "evaluate2-gold"),
    ]
    for round_, line in ((0, lines["round1-generate"]), (1, lines["round2-generate"])):
        assert f"--data_seed 0 --rollout_batch_size 4 --iter {round_} --max_samples 6" in line
    assert "--max_samples" not in lines["evaluate0-generate"] and "--temperature 0.7" in lines["evaluate0-generate"]
    assert "--temperature 0.7" not in lines["round1-generate"]
    for name, line in lines.items():
        assert ("--chat_template" in line) == (not name.endswith(("rewards", "gold"))), name
        assert ("'Be brief.'" in line and "--dataset_key prompt" in line) == name.endswith("generate"), name
    assert "--weights 0.5 1 " in f"{lines['round1-rewards']} " and "judge_of_all" not in lines["round1-rewards"]
    assert "judge_of_all" in lines["evaluate1-rewards"] and lines["evaluate1-rewards"].endswith("--weights 0.5 1 0")
    assert f"--model_name_or_path {folder}/run/round1/policy" in lines["round2-train"]
    assert "18 stages, 0 of them up to date" in done.stdout


@pytest.mark.parametrize(("trainer", "program"), [("ppo", "ppo/run_ppo.py"), ("online_dpo", "dpo_iteration/run_online_dpo.py")])
def test_an_online_trainer_is_one_stage_of_a_round_and_is_evaluated_as_any_other(folder, trainer, program):
    (folder / "online.yaml").write_text("rollout_batch_size: 4\n")
    (folder / "my rubric.txt").write_text("How good?")
    text = f"""
TRAINER={trainer}
TRAIN_CONFIG={folder}/online.yaml
TRAIN_ARGS=(--learning_rate 1e-6)
K=4
ROUNDS=2
REWARD_MODEL={folder}/reward
REWARD_ARGS=(--dtype float32 --rubric "{folder}/my rubric.txt")
HELDOUT_PROMPTS={folder}/heldout.jsonl
"""
    done = run_loop(written_recipe(folder, text), "--plan", "--run_dir", folder / "run")
    assert done.returncode == 0, done.stderr
    lines = commands(done.stdout)
    assert [name for name in lines if name.startswith("round")] == ["round1-train", "round2-train"]
    assert len([name for name in lines if name.startswith("evaluate")]) == 9
    line = lines["round2-train"]
    assert f"{program} {folder}/online.yaml --model_name_or_path {folder}/run/round1/policy" in line
    assert f"--scorer bt:{folder}/reward --weights 1 " in line and "--export_dtype float32 " in line
    (text,) = (word for word in shlex.split(line) if word.startswith("--reward_args="))
    assert shlex.split(text.partition("=")[2]) == ["--dtype", "float32", "--rubric", f"{folder}/my rubric.txt"]
    assert "--K 4" in line and line.endswith("--learning_rate 1e-6")


@pytest.mark.parametrize(
    ("trainer", "program", "data"),
    [
        ("kto", "dpo_iteration/run_kto.py", "data_with_rewards.jsonl"),
        ("raft", "sft/run_sft.py", "demonstrations.jsonl"),
        ("conditional_sft", "sft/run_sft.py", "demonstrations.jsonl"),
        ("distillation", "distillation/run_kd.py", "gen_data.jsonl"),
    ],
)
def test_other_trainers_take_the_rounds_responses(folder, trainer, program, data):
    (folder / "own.yaml").write_text("export_dtype: checkpoint\n")
    configs = {"kto": "configs/kto.yaml", "distillation": "configs/kd.yaml", "conditional_sft": folder / "own.yaml"}
    config = configs.get(trainer, "configs/sft.yaml")
    teacher = f"--teacher_model {folder}/policy " if trainer == "distillation" else ""
    settings = f"TRAIN_CONFIG={config}\nTRAIN_ARGS=({teacher}--learning_rate 1e-6)\nREWARD_MODEL={folder}/reward\nROUNDS=2\n"
    levels = "LEVELS=(poor fair 'very good')\n" if trainer == "conditional_sft" else ""
    text = f"TRAINER={trainer}\n{settings}{levels}"
    done = run_loop(written_recipe(folder, text), "--plan", "--run_dir", folder / "run")
    assert done.returncode == 0, done.stderr
    lines = commands(done.stdout)
    line = lines["round2-train"]
    assert program in line and f"--dataset_name_or_path {folder}/run/round2/{data}" in line
    assert f"--model_name_or_path {folder}/run/round1/policy" in line and line.endswith("--learning_rate 1e-6")
    asks = [name for name, words in lines.items() if "--prompt_prefix 'very good '" in words]
    assert asks == (["round2-generate"] if trainer == "conditional_sft" else [])
    assert ("round2-rewards" in lines) == (trainer != "distillation")
    assert ("--export_dtype float32 " in line) == (trainer in ("raft", "distillation"))  # unless the configuration has one
    if trainer in ("raft", "conditional_sft"):
        processor = "rs" if trainer == "raft" else "ca --levels poor fair 'very good'"
        assert f"--post_processor {processor}" in lines["round2-demonstrations"]


@pytest.mark.parametrize(
    ("name", "variables", "rounds", "words"),
    [
        ("gemma2-9b-wpo", {"GPT4_RESPONSES": "prompts.jsonl"}, 1, "--extra_responses prompts.jsonl"),
        ("self-rewarding", {"rounds": "2"}, 2, "--min_margin 1"),
    ],
)
def test_a_recipe_takes_what_differs_between_its_users_from_the_environment(
    name, variables, rounds, words, folder, monkeypatch
):
    there = str(folder / "prompts.jsonl")
    for variable, value in (variables | {"HF_HUB_OFFLINE": "1"}).items():
        monkeypatch.setenv(variable, value.replace("prompts.jsonl", there))
    done = run_loop(f"configs/recipes/{name}.env", "--plan", "--run_dir", folder / "run")
    assert done.returncode == 0, done.stderr
    lines = [line for name, line in commands(done.stdout).items() if name.endswith("-train")]
    assert len(lines) == rounds and all(words.replace("prompts.jsonl", there) in line for line in lines)


def units_with_mistakes(folder: Path) -> list[Unit]:
    """Two trainings and a scoring: a mistyped setting, a missing file, a mistyped function."""
    settings = (("1", "--learning_rat", "1"), ("2", "--learning_rate", "1"))
    train = [
        Unit(
            name=f"round{number}-train",
            environment="training",
            program=(
                *("dpo_iteration/run_dpo.py", "--model_name_or_path", f"{folder}/policy", "--use_cpu", "true", *words),
                *("--dataset_name_or_path", f"{folder}/pairs{pairs}.jsonl", "--output_dir", f"{folder}/out{number}"),
            ),
        )
        for number, (pairs, *words) in enumerate(settings, 1)
    ]
    reward = ("annotate_data/get_rewards.py", "--dataset_name_or_path", f"{folder}/pairs1.jsonl", "--output_dir")
    scorer = f"function:{folder}/rule.py:breviti"
    return [*train, Unit(name="score", environment="inference", program=(*reward, f"{folder}/r.jsonl", "--scorer", scorer))]


def test_what_is_wrong_with_any_stage_is_said_of_all_at_once_before_one_starts(folder, monkeypatch):
    monkeypatch.chdir(ROOT)
    (folder / "pairs1.jsonl").write_text('{"prompt": "a", "responses": ["b", "c"], "rewards": [0, 1]}\n')
    entries = plan(units_with_mistakes(folder))
    said = problems(entries)
    assert "round1-train: unknown setting `learning_rat`" in said
    assert f"round2-train: {folder}/pairs2.jsonl: no such file" in said
    assert "score: " in said and "breviti" in said
    assert "no such file" in listing(entries)
    assert not (folder / "out1.partial").exists() and not list(folder.glob("*.lock"))


@pytest.mark.parametrize("in_the_projects_folder", [False, True])
def test_of_a_users_own_program_nothing_is_run(folder, monkeypatch, in_the_projects_folder):
    if in_the_projects_folder:
        monkeypatch.setattr("baton.launch.plan.ROOT", folder)
    (folder / "own.py").write_text(f"open('{folder}/ran', 'w').close()\ndef main(): open('{folder}/ran', 'w').close()\n")
    units = [Unit(name=name, environment="inference", program=(str(folder / name),)) for name in ("own.py", "none.py")]
    outside, missing = plan(units)
    assert outside.planned.startswith("would run") and outside.problem is None and not (folder / "ran").exists()
    assert "none.py: no such program" in missing.problem


def test_a_round_that_would_start_from_an_adapter_alone_is_refused_before_the_first_one_trains(folder, monkeypatch):
    monkeypatch.chdir(ROOT)
    ahead.OUTLOOK.several = True
    (folder / "pairs.jsonl").write_text('{"prompt": "a", "responses": ["b", "c"], "rewards": [0, 1]}\n')
    flags = ("--dataset_name_or_path", f"{folder}/pairs.jsonl", "--use_peft", "true", "--output_dir")
    for merge, first, second in (("true", "one", "two"), ("false", "three", "four")):
        words = ("dpo_iteration/run_dpo.py", "--merge_adapter", merge, *flags)
        ahead.look((*words, f"{folder}/{first}", "--model_name_or_path", f"{folder}/policy"))
        start = pytest.raises(InputError, match="adapter without its model") if merge == "false" else nullcontext()
        with start:
            ahead.look((*words, f"{folder}/{second}", "--model_name_or_path", f"{folder}/{first}"))


def test_a_run_that_starts_offline_needs_the_hubs_models_here_and_a_plan_does_not(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ahead.note(folder / "out", "starting")
    check_hub_ahead("nobody/nothing", folder / "out")
    ahead.OUTLOOK.starts = True
    with pytest.raises(InputError, match="not in the hub's cache on this machine, and HF_HUB_OFFLINE is set"):
        check_hub_ahead("nobody/nothing", folder / "out")


def test_what_follows_from_a_refused_stage_is_no_mistake_of_its_own(folder, monkeypatch):
    """Nor is a result of another stage «made from» what this one would read."""
    monkeypatch.chdir(ROOT)
    (folder / "samples.jsonl").write_text('{"prompt": "a", "responses": ["b", "c"]}\n')
    for name, stage, inputs in (("old", "annotate", {"dataset": {}}), ("later", "annotate", {"dataset": {}}), ("own", "x", {})):
        (folder / f"{name}.jsonl").write_text("")
        manifest = {"version": 0 if stage == "annotate" else VERSION, "stage": stage, "arguments": {}, "inputs": inputs}
        (folder / f"{name}.jsonl.manifest.json").write_text(json.dumps(manifest))
    chain = (("samples", "old"), ("old", "later"), ("samples", "new"), ("new", "own"))
    units = [
        Unit(
            name=output,
            environment="inference",
            program=(
                *("annotate_data/get_rewards.py", "--scorer", f"function:{folder}/rule.py:brevity"),
                *("--dataset_name_or_path", f"{folder}/{source}.jsonl", "--output_dir", f"{folder}/{output}.jsonl"),
            ),
        )
        for source, output in chain
    ]
    old, later, new, own = plan(units)
    assert "another version of Baton" in old.problem
    assert later.problem is None and later.planned == ahead.WAITS and not later.up_to_date
    assert new.problem is None and new.planned == "would run"
    assert "stage (x, now annotate)" in own.problem


def test_a_configuration_that_was_accepted_when_the_work_began_is_not_checked_again_and_a_new_one_is_once():
    made = []
    ahead.OUTLOOK.several = True
    ahead.accept("dpo with beta 0.1")
    for kind in ("dpo with beta 0.1", "dpo with beta 0.2", "dpo with beta 0.2"):
        ahead.later(kind, lambda kind=kind: made.append(kind))
    ahead.make_checks()
    assert made == ["dpo with beta 0.2"]
