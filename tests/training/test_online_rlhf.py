"""The configuration files of Online-RLHF in run_dpo.py: the one that its loop writes, and what its names mean here."""

import json
import os
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from baton.errors import InputError
from baton.models.templates import load_tokenizer, template_hash
from baton.training.checkpoints import history_of_export, last_whole_checkpoint
from baton.training.metrics_file import MetricsFile
from dpo_iteration.online_rlhf import own_names
from tests.programs import read_jsonl, run_program, write_jsonl

# As its run_loop.sh writes it, with the paths of this test.
WRITTEN_BY_ITS_LOOP = """\
run_name: {iteration}
output_dir: {iteration}
model_name_or_path: {model_path}
ref_model: {model_path}
learning_rate: 5.0e-7
num_train_epochs: 2
logging_steps: 2
gradient_checkpointing: true
do_train: true
do_eval: true
eval_steps: 10000
choose_type: max_min
train_dir: {model_output}
eval_dir: {model_output}
loss_type: sigmoid
lr_scheduler_type: cosine
max_length: 2048
max_prompt_length: 1000
eval_strategy: steps
bf16: true
per_device_train_batch_size: 1
per_device_eval_batch_size: 1
gradient_accumulation_steps: 16
report_to: wandb
label_smoothing: 0.1
"""
OTHER_TEMPLATE = "0123456789abcdef"


@pytest.fixture(scope="module")
def iteration(task, annotated, tmp_path_factory):
    """A finished run of that file, on records that were sampled with another chat template."""
    folder = tmp_path_factory.mktemp("online_rlhf")
    manifest = {"version": 4, "stage": "annotate", "arguments": {}, "settings": {"scorers": ["rm=bt"]}}
    manifest["inputs"] = {"scorer rm": {"path": "sfairXC/FsfairX-LLaMA3-RM-v0.1", "hash": "x"}}
    records = [{**record, "chat_template_hash": OTHER_TEMPLATE} for record in read_jsonl(annotated)]
    data = write_jsonl(folder / "reward.json", records)
    (folder / "reward.json.manifest.json").write_text(json.dumps(manifest))
    names = {"iteration": folder / "LLaMA3_iter1", "model_path": task / "base", "model_output": data}
    (folder / "dpo_config.yaml").write_text(WRITTEN_BY_ITS_LOOP.format(**names))
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_DIR"} | {"WANDB_MODE": "offline"}
    done = run_program("dpo_iteration/run_dpo.py", folder / "dpo_config.yaml", env=environment)
    assert done.returncode == 0, done.stderr
    return folder, done.stderr


def test_the_file_that_its_loop_writes_trains_and_evaluates_and_keeps_its_numbers(iteration):
    folder, log = iteration
    lines = read_jsonl(folder / "LLaMA3_iter1.metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6, 6, 6]
    assert all({"epoch", "loss", "learning_rate", "grad_norm", "rewards/margins"} <= line.keys() for line in lines[:3])
    evaluated = {"eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"}
    assert evaluated <= lines[3].keys() and "train_loss" in lines[4]
    assert 0 <= lines[3]["eval_rewards/accuracies"] <= 1
    metrics = json.loads((folder / "LLaMA3_iter1.manifest.json").read_text())["metrics"]
    assert {name: metrics[name] for name in evaluated} == {name: lines[3][name] for name in evaluated}
    assert "`eval_dir` is data that is trained on" in log
    step = next(line for line in log.splitlines() if "step 2:" in line)
    assert "loss" in step and "rewards/margins" in step and step.count(", ") < 8


def test_reports_are_beside_the_metrics_and_not_in_the_policy(iteration):
    folder, _ = iteration
    assert list(folder.glob("reports/wandb/offline-run-*"))
    files = {path.name for path in (folder / "LLaMA3_iter1").iterdir()}
    assert files == {
        *("README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }


def test_the_card_says_what_the_manifest_says(iteration, task):
    folder, _ = iteration
    card = (folder / "LLaMA3_iter1" / "README.md").read_text()
    assert f"stage `dpo` from `{task.name}/base`" in card and "| rewards | rm=bt sfairXC/FsfairX-LLaMA3-RM-v0.1 |" in card
    assert "48 in, 48 trained on, dropped: none." in card and "| label_smoothing | 0.1 |" in card
    assert "| eval_rewards/accuracies |" in card and "| trl |" in card
    assert "None" not in card and str(folder) not in card


def test_samples_of_another_chat_template_are_said_at_the_start_and_among_the_last_lines(iteration, task):
    _, log = iteration
    own = template_hash(load_tokenizer(str(task / "base")))
    said = f"another chat template (48 of template {OTHER_TEMPLATE}) than the one that they are trained with ({own})"
    lines = [number for number, line in enumerate(log.splitlines()) if said in line and "--chat_template FILE" in line]
    finished = next(number for number, line in enumerate(log.splitlines()) if "48 in, 48 out" in line)
    assert len(lines) == 2 and lines[1] == finished + 1


def test_evaluation_does_not_change_what_is_learnt_and_pairs_beyond_the_most_are_counted(task, annotated, tmp_path):
    dropout = ["--use_peft", "--lora_dropout", 0.2, "--disable_dropout", "false"]  # which takes random numbers at each step
    words = ["--model_name_or_path", task / "base", "--train_dir", annotated, "--max_steps", 3, "--max_length", 128]
    words += ["--max_training_samples", 20]
    words += ["--max_prompt_length", 64, "--use_cpu", "true", "--bf16", "false", "--logging_steps", 1, *dropout]
    policies = []
    for evaluation in ([], ["--eval_dir", task / "data/rm_test.jsonl", "--eval_strategy", "steps", "--eval_steps", 1]):
        output = tmp_path / f"policy{len(evaluation)}"
        done = run_program("dpo_iteration/run_dpo.py", *words, "--output_dir", output, *evaluation)
        assert done.returncode == 0, done.stderr
        policies.append(load_file(output / "adapter_model.safetensors"))
        counts = json.loads(output.with_name(f"{output.name}.manifest.json").read_text())["counts"]
        assert counts == {"in": 48, "out": 20, "dropped": {"beyond max_training_samples": 28}}
        lines = read_jsonl(f"{output}.metrics.jsonl")
        assert [line["step"] for line in lines if "eval_loss" in line] == ([1, 2, 3] if evaluation else [])
    assert all((policies[0][name] == policies[1][name]).all() for name in policies[0])


@pytest.mark.parametrize(
    ("settings", "here"),
    [
        ({"train_dir": "a"}, {"dataset_name_or_path": "a"}),
        ({"train_dir": "a", "dataset_name_or_path": "a"}, {"dataset_name_or_path": "a"}),
        ({"sanity_check": "true"}, {"max_training_samples": 100}),
        ({"sanity_check": False, "eos_padding": True, "eot_token": "", "ignore_bias_buffers": "False"}, {}),
        ({"mask_prompt": True, "margin_scale": 0.5, "len_penalty": 0, "max_training_samples": -1},
         {"margin_scale": 0.5, "len_penalty": 0, "max_training_samples": -1}),
    ],
)  # fmt: skip
def test_its_names_are_read_as_what_they_mean_here(settings, here):
    assert own_names(settings) == here


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_dir": "a", "dataset_name_or_path": "b"}, "are two names of one setting"),
        ({"train_dir": "a", "margin_scale": 1.0}, "`margin_scale` beside `train_dir`"),
        ({"sanity_check": True, "max_training_samples": 5}, "`sanity_check` trains on 100 pairs"),
        ({"eos_padding": "false"}, "`eos_padding: false`"),
        ({"eot_token": "<|eot_id|>"}, "`eot_token`: a response ends with"),
        ({"ignore_bias_buffers": True}, "`ignore_bias_buffers`"),
        ({"do_train": False}, "`do_train: false`"),
    ],
)
def test_what_has_no_meaning_here_is_refused_with_a_sentence(settings, message):
    with pytest.raises(InputError, match=message):
        own_names(settings)


@pytest.mark.parametrize("asked", [["--do_eval", "true"], ["--eval_strategy", "steps"]])
def test_an_evaluation_without_pairs_is_refused(task, annotated, tmp_path, asked):
    words = ["--model_name_or_path", task / "base", "--train_dir", annotated, "--output_dir", tmp_path / "policy", *asked]
    done = run_program("dpo_iteration/run_dpo.py", *words)
    assert done.returncode == 2 and "needs pairs to evaluate on: name a file of them with --eval_dir" in done.stderr


def test_an_evaluation_that_is_asked_for_and_left_out_is_refused_before_a_model_is_loaded(task, annotated, tmp_path):
    words = ["--model_name_or_path", task / "base", "--train_dir", annotated, "--output_dir", tmp_path / "policy"]
    words += ["--eval_dir", annotated, "--do_eval", "false", "--eval_strategy", "steps", "--check"]
    done = run_program("dpo_iteration/run_dpo.py", *words)
    assert done.returncode == 2 and "`eval_strategy` asks for what `do_eval: false` leaves out" in done.stderr


def test_the_figures_of_the_best_checkpoint_are_said_where_its_weights_are_the_policy():
    history = [{"step": 2, "eval_loss": 0.5}, {"step": 4, "eval_loss": 0.7}, {"step": 4, "train_loss": 0.6}]
    state = SimpleNamespace(best_model_checkpoint="policy.partial/checkpoint-2", global_step=4, log_history=history)
    for load_best, said in ((True, history[:1]), (False, history)):
        args = SimpleNamespace(load_best_model_at_end=load_best)
        assert history_of_export(SimpleNamespace(state=state, args=args)) == said


def test_a_spoilt_line_of_the_metrics_is_no_reason_not_to_go_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1,"loss":0.7}\n\0\0\0\n{"step":2,"loss":0.6}\n{"step":3,"loss":0.5}\n{"step":')
    MetricsFile(path).on_train_begin(None, SimpleNamespace(is_world_process_zero=True, global_step=2), None)
    assert [line["step"] for line in read_jsonl(path)] == [1, 2]


def test_a_checkpoint_whose_numbers_are_not_finite_is_whole(tmp_path):
    state = {"global_step": 4, "log_history": [{"step": 4, "grad_norm": float("inf"), "loss": float("nan")}]}
    for step, text in ((2, "{}"), (4, json.dumps(state)), (6, json.dumps(state)[:-9])):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
