"""SFT, reward-model and DPO training as users run them: what they learn, what they refuse, and what a kill leaves."""

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file

from baton import jsonl
from baton.arguments import build_config, read_yaml
from baton.drops import Drops
from baton.models.templates import load_tokenizer
from baton.pairs import PairSettings
from baton.training.checks import check_settings
from baton.training.memory import Sharding
from dpo_iteration.choose import choose_pairs
from tests.programs import ROOT, read_jsonl, run_program, start, write_jsonl

SMALL = ["--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false", "--logging_steps", 1]
SHORT = ["--max_length", 128, "--per_device_train_batch_size", 8, *SMALL]


def sft(task, output, *more):
    return run_program(
        "sft/run_sft.py", "--model_name_or_path", task / "base", "--dataset_name_or_path", task / "data/sft.jsonl",
        "--output_dir", output, "--learning_rate", 3e-3, *SHORT, *more,
    )  # fmt: skip


def dpo_words(task, annotated, output, *more):
    return [
        "dpo_iteration/run_dpo.py", "--model_name_or_path", task / "base", "--dataset_name_or_path", annotated,
        "--output_dir", output, "--max_prompt_length", 64, "--learning_rate", 1e-3, *SHORT, *more,
    ]  # fmt: skip


def logged(stderr, name):
    """The values of a metric, one for each line of the log that names it."""
    return [float(line.split(f" {name} ")[1].split(",")[0]) for line in stderr.splitlines() if f" {name} " in line]


def test_sft_learns_and_leaves_a_model_with_its_manifest(task, tmp_path):
    done = sft(task, tmp_path / "sft", "--max_steps", 12)
    assert done.returncode == 0, done.stderr
    losses = logged(done.stderr, "loss")
    assert losses[-1] < losses[0] - 0.2
    manifest = json.loads((tmp_path / "sft.manifest.json").read_text())
    assert manifest["counts"] == {"in": 600, "out": 600, "dropped": {}}
    assert not list(tmp_path.glob("sft/checkpoint-*")) and not list(tmp_path.glob("*.partial*"))

    again = sft(task, tmp_path / "sft", "--max_steps", 12)
    assert again.returncode == 0 and "up to date" in again.stderr
    other = sft(task, tmp_path / "sft", "--max_steps", 13)
    assert other.returncode == 2 and "max_steps" in other.stderr


END_ON_PAD = """{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|pad|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


@pytest.mark.parametrize("name", ["sft", "dpo", "kto"])
def test_the_end_token_that_was_learnt_stops_the_exported_policy_beside_the_former_ones(task, annotated, tmp_path, name):
    (tmp_path / "template.jinja").write_text(END_ON_PAD)
    words = ["--chat_template", tmp_path / "template.jinja", "--max_steps", 1]
    if name == "sft":
        done = sft(task, tmp_path / "policy", *words)
    else:
        program, *rest = dpo_words(task, annotated, tmp_path / "policy", *words)
        adapter = ["--use_peft", "--merge_adapter"] if name == "dpo" else []
        done = run_program(program if name == "dpo" else "dpo_iteration/run_kto.py", *rest, *adapter)
    assert done.returncode == 0, done.stderr
    former, end = (load_tokenizer(str(task / "base")).convert_tokens_to_ids(token) for token in ("<|end_of_turn|>", "<|pad|>"))
    settings = json.loads((tmp_path / "policy/generation_config.json").read_text())
    assert settings["eos_token_id"] == sorted([former, end])


TRAINING = ["sft/run_sft.py", "reward_model/run_rm.py", "dpo_iteration/run_dpo.py", "dpo_iteration/run_kto.py"]


@pytest.mark.parametrize("program", TRAINING)
def test_a_chat_template_that_has_changed_is_another_task(task, annotated, tmp_path, program):
    data = {"sft/run_sft.py": task / "data/sft.jsonl", "reward_model/run_rm.py": task / "data/rm_train.jsonl"}
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    words = [
        program, "--model_name_or_path", task / "base", "--dataset_name_or_path", data.get(program, annotated),
        "--output_dir", tmp_path / "out", "--chat_template", template, "--max_steps", 0, *SHORT, "--max_length", 2000,
    ]  # fmt: skip
    begun = run_program(*words)
    assert begun.returncode == 2 and "max_steps" in begun.stderr, begun.stderr  # begun, but ended before it trains
    (tmp_path / "out.partial/checkpoint-1").mkdir(parents=True)
    template.write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    changed = run_program(*words)
    assert changed.returncode == 2
    assert f"unfinished work of another task: chat_template: the content of {template} has changed" in changed.stderr


def test_reward_model_reports_its_held_out_accuracy(task, tmp_path):
    done = run_program(
        "reward_model/run_rm.py", "--model_name_or_path", task / "base",
        "--dataset_name_or_path", task / "data/rm_train.jsonl", "--eval_dataset_name_or_path", task / "data/rm_test.jsonl",
        "--output_dir", tmp_path / "rm", "--max_steps", 2, *SHORT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    held_out = json.loads((tmp_path / "rm.manifest.json").read_text())["held_out"]
    assert 0 <= held_out["accuracy"] <= 1 and held_out["pairs"] == 40
    assert ("little better than chance" in done.stderr) == (held_out["accuracy"] < 0.6)


def test_a_death_in_the_held_out_evaluation_costs_no_training(task, tmp_path):
    words = [
        "reward_model/run_rm.py", "--model_name_or_path", task / "base",
        "--dataset_name_or_path", task / "data/rm_test.jsonl", "--eval_dataset_name_or_path", task / "data/rm_train.jsonl",
        "--output_dir", tmp_path / "rm", "--max_steps", 2, "--lr_scheduler_type", "constant", "--learning_rate", 1e-3,
        "--tokens_per_row", 1, *SHORT,
    ]  # fmt: skip
    killed, errors = start(*words, output=str(tmp_path)), tmp_path / "stderr"
    while not errors.exists() or "evaluating on 200 held-out pairs" not in errors.read_text():
        killed.join(0.05)
        assert killed.exitcode is None, errors.read_text()
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL and not (tmp_path / "rm").exists()
    trained = load_file(tmp_path / "rm.partial/model.safetensors")

    resumed = run_program(*words)
    assert resumed.returncode == 0 and "(step 2)" in resumed.stderr, resumed.stderr
    assert "grad_norm" not in resumed.stderr and "held out: accuracy" in resumed.stderr
    evaluated = load_file(tmp_path / "rm/model.safetensors")
    assert trained.keys() == evaluated.keys() and all((trained[name] == evaluated[name]).all() for name in trained)
    assert not list(tmp_path.glob("rm/checkpoint-*")) and not (tmp_path / "rm/rows").exists()


def test_dpo_prefers_the_chosen_and_accounts_for_every_prompt(task, annotated, tmp_path):
    done = run_program(*dpo_words(task, annotated, tmp_path / "policy", "--num_train_epochs", 2))
    assert done.returncode == 0, done.stderr
    margins = logged(done.stderr, "rewards/margins")
    assert margins[-1] > 0.1 > abs(margins[0]) - 0.1
    pairs = read_jsonl(tmp_path / "policy.pairs.jsonl")
    manifest = json.loads((tmp_path / "policy.manifest.json").read_text())
    assert manifest["counts"]["in"] == 48 == len(pairs) + sum(manifest["counts"]["dropped"].values())
    assert all(pair["chosen_reward"] > pair["rejected_reward"] and pair["source"] == "test" for pair in pairs)


def test_dpo_killed_and_started_again_ends_with_the_same_weights(task, annotated, tmp_path):
    steps = ["--max_steps", 8, "--save_steps", 2]
    whole = run_program(*dpo_words(task, annotated, tmp_path / "whole", *steps))
    assert whole.returncode == 0, whole.stderr

    words = [sys.executable, *map(str, dpo_words(task, annotated, tmp_path / "killed", *steps))]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "step 5:" in line:
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "killed").exists()

    resumed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert resumed.returncode == 0 and "going on from" in resumed.stderr, resumed.stderr
    expected, got = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert expected.keys() == got.keys() and all((expected[name] == got[name]).all() for name in expected)

    expected, got = (read_jsonl(tmp_path / f"{name}.metrics.jsonl") for name in ("whole", "killed"))
    assert [line["step"] for line in got] == [*range(1, 9), 8]  # that of the end too
    assert [line.get("loss") for line in got] == [line.get("loss") for line in expected]


def test_dpo_mixes_files_and_the_pairs_of_earlier_rounds_and_shows_what_it_trains_on(task, annotated, tmp_path):
    rounds = [tmp_path / f"round{number}" / "pairs.jsonl" for number in (1, 2)]
    first = enumerate(read_jsonl(annotated)[:20])
    written = jsonl.write(rounds[0], choose_pairs(first, PairSettings(), Drops(), Counter()))
    liked = [{"prompt": f"Film {i}?", "chosen": "A warm film \x1b[2J.", "rejected": "A mess."} for i in range(40)]
    write_jsonl(tmp_path / "liked.jsonl", liked)
    words = dpo_words(
        task, f"{annotated},{tmp_path / 'liked.jsonl'}", tmp_path / "round2" / "policy", "--dataset_probs", "0.5,0.5",
        "--pairs_path", rounds[1], "--history", 3, "--max_steps", 1,
    )  # fmt: skip
    done = run_program(*words)
    assert done.returncode == 0, done.stderr

    own = read_jsonl(rounds[1])
    taken = sum(pair["chosen"] == liked[0]["chosen"] for pair in own)
    assert 10 < taken <= 40 and 10 < len(own) - taken <= 48
    manifest = json.loads((tmp_path / "round2/policy.manifest.json").read_text())
    assert manifest["counts"]["in"] == len(own) + written == manifest["counts"]["out"]
    assert manifest["pairs"]["pairs of earlier rounds"] == written
    assert {"data", "data2", "pairs of round1"} <= manifest["inputs"].keys()

    start, _, rest = done.stderr.partition("runs on:")
    assert "step 1:" in rest and "step 1:" not in start
    assert f"liked.jsonl: {taken} of 40 records taken" in start and f"history of 3 rounds: {rounds[0]}" in start
    assert f"{len(own) + written} in, {len(own) + written} to train on, dropped: none" in start
    assert start.count("what is learnt in") == 3 and "⟦A warm film \\x1b[2J.<|end_of_turn|>⟧" in start and "\x1b" not in start

    jsonl.write(rounds[0], read_jsonl(rounds[0])[1:])
    again = run_program(*words)
    assert again.returncode == 2 and "pairs of round1: the content of" in again.stderr


def altered(source, target, change):
    """A copy of a JSONL file whose second record is changed."""
    records = read_jsonl(source)
    change(records[1])
    return write_jsonl(target, records)


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (lambda r: r.update(responses=["One."], rewards=[1.0]), [], "bad.jsonl:2: a pair needs at least 2"),
        (lambda r: r.update(rewards=r["rewards"][:3]), [], "bad.jsonl:2: 3 `rewards` for 4 `responses`"),
        (lambda r: r["rewards"].__setitem__(0, None), [], "bad.jsonl:2: `rewards` holds None"),
        (
            lambda r: r["rewards"].__setitem__(0, float("nan")),
            [],
            "bad.jsonl:2: `rewards` holds nan, which is not finite",
        ),
        (
            lambda r: r.update(response_token_ids=[[5, 1.5]] * 4),
            [],
            "bad.jsonl:2: `response_token_ids` must be a list of",
        ),
        (lambda r: r.pop("prompt"), [], "bad.jsonl:2: the record has no `prompt`"),
        (lambda r: None, ["--loss_typ", "ipo"], "unknown setting `loss_typ`: did you mean `loss_type`?"),
        (lambda r: None, ["--learning_rate", "fast"], "`learning_rate`"),
        (lambda r: None, ["--loss_type", "sigmoyd"], "`loss_type`: 'sigmoyd' is not one of TRL's sigmoid, hinge, ipo, "),
        (lambda r: None, ["--dataset_probs", "0.5,0.5"], "2 numbers for 1 datasets"),
        (lambda r: None, ["--history", "1"], "`history` finds the rounds before by their folders"),
        (lambda r: None, ["--choose_type", "best"], "`choose_type`"),
        (lambda r: None, ["--model_name_or_path", "no/such/model"], "no/such/model: no such folder"),
        (lambda r: None, ["--len_penalty", "0.1"], "`len_penalty` acts with choose_type max_min_p only"),
        (lambda r: None, ["--max_prompt_length", "128"], "`max_prompt_length`: 128 must be smaller than `max_length`, 128"),
        (lambda r: None, ["--min_margin", "9"], "no pair is left; dropped: 48 margin below min_margin"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(task, annotated, tmp_path, change, words, message):
    data = altered(annotated, tmp_path / "bad.jsonl", change)
    done = run_program(*dpo_words(task, data, tmp_path / "policy", *words))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize(
    ("program", "data"),
    [
        ("sft/run_sft.py", "sft.jsonl"),
        ("reward_model/run_rm.py", "rm_train.jsonl"),
        ("dpo_iteration/run_kto.py", "rm_train.jsonl"),
    ],
)
def test_every_trainer_refuses_a_training_of_no_steps_before_it_loads_a_model(task, tmp_path, program, data):
    words = ["--model_name_or_path", task / "base", "--dataset_name_or_path", task / "data" / data]
    done = run_program(program, *words, "--output_dir", tmp_path / "model", "--max_steps", 0, *SMALL)
    assert done.returncode == 2, done.stderr
    assert "`max_steps`: 0 would train by epochs" in done.stderr and "runs on:" not in done.stderr
    if program != "reward_model/run_rm.py":  # which holds pairs out
        done = run_program(program, *words, "--output_dir", tmp_path / "model", "--eval_strategy", "steps", *SMALL)
        assert done.returncode == 2 and "`eval_strategy`: this program has no data to evaluate on" in done.stderr


def test_yaml_file_with_an_unknown_key_names_the_nearest(task, annotated, tmp_path):
    config = tmp_path / "training.yaml"
    config.write_text("beta: 0.1\nlerning_rate: 5.0e-7\n")
    words = dpo_words(task, annotated, tmp_path / "policy")
    done = run_program(words[0], config, *words[1:])
    assert done.returncode == 2 and "unknown setting `lerning_rate`: did you mean `learning_rate`?" in done.stderr


LAUNCH_CONFIGS = [path for path in sorted(ROOT.glob("configs/*.yaml")) if "compute_environment" in read_yaml(path)]


@pytest.mark.parametrize("path", LAUNCH_CONFIGS, ids=lambda path: path.stem)
def test_a_launch_configuration_is_one_that_accelerate_accepts_and_does_what_its_name_says(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    deepspeed, fsdp = config.deepspeed_config or {}, config.fsdp_config or {}
    assert (config.distributed_type.value == "DEEPSPEED") == bool(deepspeed)
    assert (config.distributed_type.value == "FSDP") == bool(fsdp)
    assert config.num_processes == (1 if path.stem == "cpu" else 8 * config.num_machines)
    assert config.num_machines == (2 if path.stem == "two_machines" else 1)
    if path.stem.startswith("zero"):
        assert path.stem[4] == str(deepspeed["zero_stage"])
        assert (deepspeed["offload_optimizer_device"] == "cpu") == path.stem.endswith("_offload")
        assert (deepspeed["offload_param_device"] == "cpu") == (path.stem == "zero3_offload")
    if fsdp:
        assert fsdp["fsdp_version"] == 2


def test_every_launch_configuration_is_documented():
    page = (ROOT / "docs/train_dpo.md").read_text()
    assert len(LAUNCH_CONFIGS) >= 10
    assert [path.name for path in LAUNCH_CONFIGS if f"configs/{path.name}" not in page] == []


@pytest.mark.parametrize("launch", LAUNCH_CONFIGS, ids=lambda path: path.stem)
def test_published_training_configuration_is_one_that_the_programs_accept(launch, monkeypatch):
    from trl import DPOConfig, KTOConfig, RewardConfig, SFTConfig

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", read_yaml(launch)["mixed_precision"])
    for name, config_class in (("training", DPOConfig), ("kto", KTOConfig), ("sft", SFTConfig), ("rm", RewardConfig)):
        settings = read_yaml(Path(ROOT / f"configs/{name}.yaml"))
        fields = {field: value for field, value in settings.items() if field in config_class.__dataclass_fields__}
        check_settings(build_config(config_class, fields | {"use_cpu": True}), Sharding())
