"""Reward models that learn numbers or steps: loss and gradients are the formulas', whatever is packed; how good outputs are."""

import copy
import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from scipy.stats import kendalltau
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import RewardConfig

from baton.drops import Drops
from baton.errors import InputError
from baton.models import attention
from baton.models.attention import by_trees
from baton.models.templates import load_tokenizer, with_places
from baton.models.trees import Layout
from baton.steps import steps_of, stepwise_records
from reward_model.quality import score_quality, step_quality
from reward_model.run_rm import Arguments, check
from reward_model.score_rows import DIVIDED, LONGER, row_of, rows_of_scores, rows_of_steps, scored_records
from reward_model.score_trainer import PackedScoreTrainer, targets_of
from tests.models.tiny_models import FAMILIES, VOCABULARY, one_thread
from tests.programs import read_jsonl, run_program, write_jsonl
from tests.training.test_dpo_core import tokenizer
from tests.training.test_training_programs import SHORT

__all__ = ["one_thread", "tokenizer"]  # fixtures

HEADS = {"regression": ["helpful", "brief"], "process": ["step"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny language model."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES["llama"])).save_pretrained(folder)
    return str(folder)


def rows_of(loss_type, count=6):
    """Records of one to three conversations; of one a conversation is another's beginning, in one two are equal."""
    rng, rows = random.Random(0), []
    for number in range(count):
        prompt = [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, 12))]
        ids = [prompt + [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(2, 14))] for _ in range(1 + number % 3)]
        if number == 1:
            ids[1] = ids[0][:-1]
        if number == 2:
            ids[2] = list(ids[0])
        places = [[len(each) - 1] for each in ids]
        if loss_type == "process":
            places = [sorted({rng.randrange(len(prompt), len(each)), len(each) - 1}) for each in ids]
        reads = sum(map(len, places))
        numbers = [rng.uniform(-2, 2) for _ in range(2 * reads)]
        rows.append(row_of(ids, places, numbers if loss_type == "regression" else [float(n > 0) for n in numbers[:reads]]))
    return Dataset.from_list(rows)


def trainer_of(model, rows, tokenizer, loss_type, folder="unused", more=(), **config):
    fixed = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False}
    fixed |= {"save_strategy": "no", "logging_steps": 1, "max_length": None, "per_device_train_batch_size": len(rows)}
    args = RewardConfig(str(folder), **fixed | {"model_init_kwargs": {"dtype": "float32"}} | config)
    made = {"args": args, "train_dataset": rows, "processing_class": tokenizer, "loss_type": loss_type}
    return PackedScoreTrainer(model, **made, outputs=HEADS[loss_type], **dict(more))


def by_formula(trained, rows, loss_type):
    """The loss and the model of one forward pass of its own for each place that is read, its gradients computed."""
    plain = AutoModelForSequenceClassification.from_config(copy.deepcopy(trained.config), attn_implementation="eager")
    plain.load_state_dict(trained.state_dict())
    outputs = [
        plain(torch.tensor([ids[: place + 1]])).logits[0]
        for row in rows
        for ids, places in zip(row["sequences"], row["places"], strict=True)
        for place in places
    ]
    outputs, targets = torch.stack(outputs), torch.from_numpy(targets_of(rows)).float()
    if loss_type == "regression":
        loss = ((outputs - targets) ** 2).mean()
    else:
        loss = -(targets * F.logsigmoid(outputs) + (1 - targets) * F.logsigmoid(-outputs)).mean()
    loss.backward()
    return loss, outputs, plain


@pytest.mark.parametrize("loss_type", HEADS)
def test_loss_gradients_and_held_out_numbers_are_those_of_the_formula_for_each_place_alone(model, tokenizer, loss_type):
    rows = rows_of(loss_type)
    trainer = trainer_of(model, rows, tokenizer, loss_type, more={"eval_dataset": rows, "tokens_per_row": 60})
    assert trainer.model.config.id2label == dict(enumerate(HEADS[loss_type]))
    wanted, outputs, plain = by_formula(trainer.model, rows, loss_type)
    loss, metrics = trainer.measure(trainer.model.train(), trainer.data_collator(list(rows)))
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert metrics["mean_reward"] == pytest.approx(outputs.mean().item(), abs=1e-5)
    loss.backward()
    for (name, packed), (_, alone) in zip(trainer.model.named_parameters(), plain.named_parameters(), strict=True):
        assert (packed.grad - alone.grad).norm() <= 1e-4 * alone.grad.norm() + 1e-7, name
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted.item(), rel=1e-4)
    assert trainer.rewards == pytest.approx(outputs.detach().numpy(), abs=1e-5)


@pytest.mark.parametrize("loss_type", HEADS)
def test_a_training_step_is_the_same_in_rows_of_any_size(model, tokenizer, tmp_path, loss_type):
    rows, runs = rows_of(loss_type), []
    for tokens in (10_000, 30):
        more = {"tokens_per_row": tokens, "check_first_batch": True}
        trainer = trainer_of(model, rows, tokenizer, loss_type, tmp_path, more, max_steps=2, learning_rate=1e-2)
        trainer.train()
        names = ("loss", "grad_norm", "mean_reward", "min_reward", "max_reward", "num_tokens")
        runs.append([line[name] for line in trainer.state.log_history if "loss" in line for name in names])
    assert len(runs[0]) == 12 and runs[0] == pytest.approx(runs[1], rel=1e-4, abs=1e-5)


def test_packed_numbers_that_are_not_the_models_own_are_refused(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "by_trees", lambda *a: by_trees(*a[:3], Layout([(a[3].length, [])]), *a[4:]))
    more = {"check_first_batch": True}
    trainer = trainer_of(model, rows_of("process"), tokenizer, "process", tmp_path, more, max_steps=1)
    with pytest.raises(InputError, match="hidden states differ"):
        trainer.train()


def test_a_score_head_of_half_precision_gives_rewards_in_float32(model, tokenizer):
    trainer = trainer_of(model, rows_of("regression"), tokenizer, "regression")
    trainer.model.to(torch.bfloat16)  # as DeepSpeed does
    batch = trainer.data_collator(list(rows_of("regression")))
    with torch.no_grad():
        states = trainer.model(row=batch["row"], at=batch["ends"][:, 0], states=True)
        rewards = trainer.model(row=batch["row"], at=batch["ends"][:, 0])
    assert states.dtype == torch.bfloat16 and rewards.dtype == torch.float32
    assert torch.equal(rewards, F.linear(states.float(), trainer.model.score.weight.float()))


# Quality


def test_scores_are_judged_by_distance_by_correlation_and_by_the_order_within_prompts():
    scores, rewards = np.array([1.0, 2.0, 0.0, 5.0, 5.0]), np.array([1.0, 1.5, 2.0, 3.0, 4.0])
    found = score_quality(scores, rewards, np.array([3, 2]))
    assert found["mse"] == pytest.approx(np.mean((scores - rewards) ** 2))
    assert found["pearson"] == pytest.approx(np.corrcoef(scores, rewards)[0, 1])
    assert found["pairs"] == 4 and found["accuracy"] == 0.25  # 1 < 1.5 alone is in order; equal scores are not
    assert np.sign(found["spearman"]) == np.sign(kendalltau(scores, rewards)[0])
    alone = score_quality(np.array([1.0, 1.0]), np.array([0.0, 1.0]), np.array([1, 1]))
    assert alone == {"mse": 0.5, "pearson": None, "spearman": None, "pairs": 0}


def test_steps_are_judged_by_each_label():
    found = step_quality(np.array([1.0, -1.0, 2.0, -3.0]), np.array([1.0, 1.0, 0.0, 0.0]))
    assert (found["accuracy"], found["accuracy_right_steps"], found["accuracy_wrong_steps"], found["steps"]) == (
        0.5,
        0.5,
        0.5,
        4,
    )
    assert step_quality(np.array([1.0]), np.array([1.0]))["accuracy_wrong_steps"] is None


# Records


HELPSTEER = [
    {"prompt": "a", "response": "x", "helpfulness": 4, "correctness": 3, "coherence": 2},
    {"prompt": "a", "response": "y", "helpfulness": 1, "correctness": 3, "coherence": 0},
    {"prompt": "b", "response": "z", "helpfulness": 0, "correctness": 1, "coherence": 1},
]


def scores_in(records, score=None, heads=None):
    numbered = ((f"f:{number}", record) for number, record in enumerate(records, 1))
    return [record["scores"] for _, record in scored_records(numbered, score, heads)]


def test_every_shape_of_rewards_is_read():
    assert scores_in([{"prompt": "a", "responses": ["x", "y"], "rewards": [1.0, 2]}]) == [[[1.0], [2]]]
    assert scores_in([{"prompt": "a", "completion": "x", "label": True}]) == [[[1.0]]]
    assert scores_in([{"prompt": "a", "completion": "x", "label": True, "completion_reward": 0.3}]) == [[[0.3]]]
    assert scores_in(HELPSTEER) == [[[4], [1]], [[0]]]
    assert scores_in(HELPSTEER, "coherence") == [[[2], [0]], [[1]]]
    assert scores_in(HELPSTEER, None, ["correctness", "coherence"]) == [[[3, 2], [3, 0]], [[1, 1]]]
    by = {"a": [1.0, 2.0], "b": [3.0, 4.0], "c": [0.0, 0.0]}
    record = {"prompt": "a", "responses": ["x", "y"], "rewards": [4.0, 6.0], "rewards_by": by}
    assert scores_in([record], None, ["b", "a"]) == [[[3.0, 1.0], [4.0, 2.0]]]


@pytest.mark.parametrize(
    ("record", "heads", "message"),
    [
        ({"responses": ["x"]}, None, "f:1: `rewards` must be a list of numbers"),
        ({"responses": ["x"], "rewards": [None]}, None, "f:1: `rewards` holds None, which is not a finite number"),
        ({"chosen": "x", "rejected": "y"}, None, "f:1: the record is a pair; loss_type regression learns from `responses`"),
        ({"completion": "x", "label": 1, "completion_reward": "good"}, None, "f:1: `completion_reward` holds 'good'"),
        ({"responses": ["x"], "rewards": [1]}, ["a"], "f:1: `rewards_by` must hold rewards by the names a, it has none"),
        ({"responses": ["x"], "rewards_by": {"b": [1]}}, ["a"], "by the names a, it has `b`; annotate with scorers of"),
        ({"responses": ["x"], "rewards_by": {"a": [1, 2]}}, ["a"], "f:1: `rewards_by`: `a` must be a list of 1 numbers"),
        ({"responses": ["x"], "rewards_by": {"a": ["1"]}}, ["a"], "f:1: `rewards_by: a` holds '1', which is not a"),
        ({"response": "x", "helpfulness": 1}, ["a"], "f:1: the record has neither `responses` nor a `response` with"),
        ({"response": "x", "a": 1}, ["a", "b"], "f:1: `rewards_by: b` holds None, which is not a finite number"),
    ],
)  # fmt: skip
def test_rewards_that_are_missing_or_no_numbers_are_named(record, heads, message):
    with pytest.raises(InputError) as refused:
        scores_in([{"prompt": "a", **record}], None, heads)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"completions": "x", "labels": [True]}, "f:1: `completions` must be a list of at least one step"),
        ({"completions": ["x", " "], "labels": [True, True]}, "f:1: `completions` must be a list of at least one step, texts"),
        (
            {"completions": ["x"]},
            "f:1: `labels` must be a list of true or false, one for each of the 1 `completions`; got None",
        ),
        ({"completions": ["x", "y"], "labels": [True]}, "one for each of the 2 `completions`"),
        ({"completions": ["x"], "labels": [0.5]}, "f:1: `labels` must be a list of true or false"),
    ],
)
def test_steps_without_a_label_each_are_named(record, message):
    with pytest.raises(InputError) as refused:
        list(stepwise_records([("f:1", {"prompt": "a", **record})]))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ({"heads": ["a"]}, {}, "`heads` acts with loss_type regression only"),
        ({"loss_type": "regression", "margin_scale": 1}, {}, "`margin_scale` acts with loss_type bradley_terry only"),
        ({"loss_type": "process", "score_key": "s"}, {}, "`score_key` acts with loss_type bradley_terry and regression only"),
        ({"loss_type": "regression"}, {"center_rewards_coefficient": 0.1}, "`center_rewards_coefficient` acts with"),
        ({"loss_type": "regression", "heads": ["a", "a"]}, {}, "`heads`: a name stands twice"),
        ({"loss_type": "regression", "heads": ["step"]}, {}, "`heads`: `step` is the name of a process reward model's output"),
        ({"loss_type": "regression", "heads": ["a"], "score_key": "s"}, {}, "`score_key` does too"),
        ({"loss_type": "process", "step_separator": ""}, {}, "`step_separator` must not be empty"),
        ({}, {"neftune_noise_alpha": "5"}, "`neftune_noise_alpha` is not for reward models"),
    ],
)
def test_settings_of_another_loss_are_refused(task, given, settings, message):
    arguments = Arguments(model_name_or_path=str(task / "base"), dataset_name_or_path="x", output_dir="y", **given)
    with pytest.raises(InputError) as refused:
        check(arguments, settings)
    assert message in str(refused.value)


def test_a_step_ends_with_the_token_of_its_last_character(task):
    tokenizer, prompt = load_tokenizer(str(task / "base")), [{"role": "user", "content": "A film opens."}]
    for response in ("A warm film.\n\nThe cast shines. \n\n\n\n Good", "  A dull mess.", "|\n\n<|end"):
        ends = steps_of(response, "\n\n")
        ids, places = with_places(tokenizer, prompt, response, ends, "here")
        messages = [*prompt, {"role": "assistant", "content": response}]
        assert ids == tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
        said = tokenizer.decode(ids)
        for end, place in zip(ends, places, strict=True):
            before, with_it = (tokenizer.decode(ids[:last]) for last in (place, place + 1))
            assert len(before) < said.rindex(response.strip()) + len(response[:end].lstrip()) <= len(with_it)


def test_steps_that_hold_the_separator_are_counted(task):
    tokenizer, counted = load_tokenizer(str(task / "base")), Counter()
    record = {"prompt": "Go on.", "completions": ["A warm\n\nfilm.", "It shines."], "labels": [True, False]}
    for separator, divided in (("\n\n", 1), ("\n\n\n", 0)):
        counted.clear()
        (row,) = rows_of_steps(tokenizer, 256, separator, stepwise_records([("f:1", record)]), Drops(), counted)
        assert len(row["places"][0]) == 2 and counted == (Counter({DIVIDED: divided}) if divided else {})


def test_responses_that_are_too_long_are_counted_where_their_record_stays_and_dropped_with_it_elsewhere(task):
    tokenizer, drops, counted = load_tokenizer(str(task / "base")), Drops(), Counter()
    texts = (["Warm.", "A dull mess. " * 40], ["A dull mess. " * 40] * 2, ["Warm.", "Dull."])
    records = [
        (f"f:{n}", {"prompt": [{"role": "user", "content": "Go on."}], "responses": two, "scores": [[1.0], [2.0]]})
        for n, two in enumerate(texts, 1)
    ]
    rows = list(rows_of_scores(tokenizer, 60, tokenizer.pad_token_id, records, drops, counted))
    assert [row["targets"] for row in rows] == [[1.0], [1.0, 2.0]] and counted == {LONGER: 1}
    assert drops.names == {"longer than max_length 60 tokens": ["f:2"]}


# The program


def test_heads_and_steps_are_learnt_and_reported(task, tmp_path):
    good, rows, steps = ("warm", "lovely", "shines", "joy"), [], []
    for pair in read_jsonl(task / "data/rm_train.jsonl")[:60]:
        for side in ("chosen", "rejected"):
            kind = float(side == "chosen")
            rows.append(
                {"prompt": pair["prompt"], "response": pair[side], "helpfulness": kind, "verbosity": len(pair[side]) / 99}
            )
        if not steps:
            rows.append({**rows[-1], "response": "A dull mess. " * 100})
        both = [pair["chosen"], pair["rejected"]]
        steps.append({"prompt": pair["prompt"], "completions": both, "labels": [True, any(word in both[1] for word in good)]})
    words = ["reward_model/run_rm.py", "--model_name_or_path", task / "base", "--learning_rate", 3e-3, "--max_steps", 4, *SHORT]
    for name, records, more in (
        ("regression", rows, ["--heads", "helpfulness", "verbosity"]),
        ("process", steps, ["--use_peft", "--merge_adapter", "--tokens_per_row", 300]),
    ):
        output, data = tmp_path / name, write_jsonl(tmp_path / f"{name}.jsonl", records)
        more += ["--dataset_name_or_path", data, "--output_dir", output, "--loss_type", name, "--max_length", 256]
        done = run_program(*words, *more)
        assert done.returncode == 0, done.stderr
        assert "memory, estimated for each process" in done.stderr
        manifest = json.loads((tmp_path / f"{name}.manifest.json").read_text())
        held_out, config = manifest["held_out"], json.loads((output / "config.json").read_text())
        assert manifest["counts"]["in"] == manifest["counts"]["out"] == 57 and held_out["records"] == 3
        if name == "process":
            assert config["id2label"] == {"0": "step"} and held_out["steps"] == 6 and 0 <= held_out["accuracy"] <= 1
        else:
            assert config["id2label"] == {"0": "helpfulness", "1": "verbosity"}
            assert set(held_out["heads"]) == {"helpfulness", "verbosity"} and held_out["heads"]["helpfulness"]["pairs"] == 3
            assert manifest["noted"] == {LONGER: 1} and held_out["noted"] == {}
        losses = [json.loads(line) for line in (tmp_path / f"{name}.metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in losses if "loss" in line]
        assert losses[-1] < losses[0]
