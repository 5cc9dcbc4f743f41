"""SFT on packed rows gives TRL's numbers: losses, gradients, steps, an evaluation; and noise as NEFTune has it."""

import copy
import json
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from trl import SFTTrainer

from baton.errors import InputError
from baton.models import attention
from baton.models.attention import by_trees
from baton.models.trees import Layout
from baton.stage import Stage
from baton.training.checks import check_tokens
from baton.training.data import warn_of_trained_on
from baton.training.learnt import collate
from sft import run_sft
from sft.demonstrations import held_out_demonstrations, prompts_aside, training_demonstrations
from sft.trainer import PackedSFTTrainer
from tests.models.tiny_models import SHAPE, model_of, one_thread
from tests.programs import read_jsonl, run_program, write_jsonl
from tests.training.test_distillation import config_of, random_rows
from tests.training.test_dpo_core import bloom, tokenizer
from tests.training.test_training_programs import SHORT

__all__ = ["one_thread", "tokenizer"]  # fixtures

FAMILIES = ["llama", "qwen3", "gemma2"]


def trainer_of(model, rows, tokenizer, folder="unused", trl=False, lora=False, more=(), **config):
    made = SFTTrainer if trl else PackedSFTTrainer
    return made(
        copy.deepcopy(model), args=config_of(folder, **config), train_dataset=rows, processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None, **dict(more),
    )  # fmt: skip


def gradients_of(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_trl(family, loss_type, tokenizer):
    rows = random_rows()
    ours, trls = (trainer_of(model_of(family), rows, tokenizer, trl=trl, loss_type=loss_type) for trl in (False, True))
    every = [rows[number] for number in range(len(rows))]
    wanted = trls.compute_loss(trls.model.train(), trls.data_collator(every))
    found, metrics = ours.measure(ours.model.train(), collate(every))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4)
    for name in ("entropy", "mean_token_accuracy"):
        assert metrics[name] == pytest.approx(trls._metrics["train"][name][-1], rel=1e-4), name
    expected, gradients = gradients_of(trls, wanted), gradients_of(ours, found)
    assert expected.keys() == gradients.keys()
    for name, value in expected.items():
        assert (gradients[name] - value).norm() <= 1e-4 * value.norm() + 1e-7, name


@pytest.mark.parametrize(
    "setting", [{"gradient_checkpointing": True, "gradient_accumulation_steps": 2}, {"lora": True, "loss_type": "dft"}]
)
def test_training_steps_are_those_of_trl_in_rows_of_any_size(setting, tokenizer, tmp_path):
    rows, runs = random_rows(), []
    batch = 12 // setting.get("gradient_accumulation_steps", 1)
    config = {"per_device_train_batch_size": batch, "max_steps": 2, "learning_rate": 1e-3, **setting}
    for trl, tokens in ((True, None), (False, 10_000), (False, 30)):
        torch.manual_seed(0)
        more = {} if trl else {"tokens_per_row": tokens, "check_first_batch": True}
        trainer = trainer_of(model_of("llama"), rows, tokenizer, tmp_path, trl, more=more, **config)
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        runs.append([[entry[name] for name in ("loss", "grad_norm", "mean_token_accuracy")] for entry in history])
    assert len(runs[0]) == 2
    for run in runs[1:]:
        for first, second in zip(runs[0], run, strict=True):
            assert first[:2] == pytest.approx(second[:2], rel=1e-4, abs=1e-5)
    for first, second in zip(*runs[1:], strict=True):
        assert first == pytest.approx(second, rel=1e-5, abs=1e-5)


def test_a_held_out_loss_is_the_mean_over_all_its_learnt_tokens(tokenizer, tmp_path):
    rows = random_rows()
    held_out = rows.select(range(5))
    settings = {"per_device_train_batch_size": 12, "max_steps": 2, "learning_rate": 1e-2}
    more = {"eval_dataset": held_out, "tokens_per_row": 30}
    trainer = trainer_of(model_of("llama"), rows, tokenizer, tmp_path, more=more, **settings)
    trainer.train()
    (evaluated,) = (line for line in trainer.state.log_history if "eval_loss" in line)
    assert evaluated["step"] == 2
    logps = []
    trainer.model.eval()
    for row in held_out:
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            scores = trainer.model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        logps += scores[labels != -100].gather(1, labels[labels != -100, None]).flatten().tolist()
    assert evaluated["eval_loss"] == pytest.approx(-sum(logps) / len(logps), rel=1e-4)


def test_what_packed_rows_do_not_suit_is_trained_as_trl_does(tokenizer, tmp_path, caplog):
    rows = random_rows()
    once = {"per_device_train_batch_size": 12, "max_steps": 2, "learning_rate": 1e-3}
    for model, config, reason in (
        (bloom(), {}, "attention"),
        (model_of("llama"), {"label_smoothing_factor": 0.1}, "`label_smoothing_factor`"),
    ):
        losses = []
        for trl in (True, False):
            more = {} if trl else {"eval_dataset": rows}
            trainer = trainer_of(model, rows, tokenizer, tmp_path, trl, more=more, **once, **config)
            trainer.train()
            losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert losses[0] == pytest.approx(losses[1], rel=1e-5), reason
        assert any("eval_loss" in entry for entry in trainer.state.log_history)
        assert reason in caplog.text
        caplog.clear()


def test_packed_numbers_that_are_not_the_models_own_are_refused(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "by_trees", lambda *a: by_trees(*a[:3], Layout([(a[3].length, [])]), *a[4:]))
    more = {"check_first_batch": True}
    trainer = trainer_of(model_of("llama"), random_rows(), tokenizer, tmp_path, more=more, max_steps=1)
    with pytest.raises(InputError, match="packed log-probabilities differ"):
        trainer.train()


def test_noise_is_as_large_as_each_conversation_of_a_row_says(tokenizer, tmp_path):
    lengths = [4, 25]
    rows = Dataset.from_list([{"input_ids": list(range(3, 3 + n)), "labels": [-100, *range(4, 3 + n)]} for n in lengths])
    rows = rows.map(lambda row, number: {"input_ids": [3 + number, *row["input_ids"][1:]]}, with_indices=True)
    trainer = trainer_of(model_of("llama"), rows, tokenizer, tmp_path, neftune_noise_alpha=5.0)
    seen = []
    embeddings = trainer.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _, ids, output: seen.append(output[0] - embeddings.weight[ids[0][0]]))
    batch = collate(list(rows))
    trainer.measure(trainer.model.train(), batch)
    start = 0
    for prompt, responses in batch["row"].layout.trees:
        tokens = prompt + sum(responses)
        noise = seen[0][start : start + tokens].detach()
        most = 5.0 / math.sqrt(tokens * SHAPE["hidden_size"])
        assert 0.8 * most < noise.abs().max() <= most and abs(noise.mean()) < most / 4
        start += tokens
    assert sorted(p + sum(r) for p, r in batch["row"].layout.trees) == [n - 1 for n in lengths]
    trainer.measure(trainer.model.eval(), batch)
    assert seen[1].abs().max() == 0


# The program


def test_held_out_numbers_stand_in_the_manifest_of_a_merged_adapter_and_long_texts_are_cut(task, tmp_path):
    texts = [{"text": " ".join(["A warm and lovely film."] * 40)}, {"text": "A dull mess."}]
    records = [*read_jsonl(task / "data/sft.jsonl")[:38], *texts]
    words = [
        "sft/run_sft.py", "--model_name_or_path", task / "base", "--dataset_name_or_path",
        write_jsonl(tmp_path / "data.jsonl", records), "--output_dir", tmp_path / "policy", "--eval_every", 10, "--packing",
        "true", "--neftune_noise_alpha", 5, "--use_peft", "--merge_adapter", "--learning_rate", 1e-2, "--max_steps", 3, *SHORT,
        "--keep_checkpoints", 2, "--early_stopping", 3, "--load_best_model_at_end", "true", "--lr_scheduler_type", "constant",
        *(word for name in ("eval", "save") for word in (f"--{name}_strategy", "steps", f"--{name}_steps", 1)),
    ]  # fmt: skip
    done = run_program(*words)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "policy.manifest.json").read_text())
    assert manifest["counts"] == {"in": 36, "out": 36, "dropped": {}}
    held_out = manifest["held_out"]
    evaluated = [line["eval_loss"] for line in read_jsonl(tmp_path / "policy.metrics.jsonl") if "eval_loss" in line]
    assert held_out["loss"] == min(evaluated) and len(evaluated) == 3
    best = f"step-{1 + evaluated.index(min(evaluated))}"
    kept = {path.name for path in (tmp_path / "policy").glob("step-*")}
    assert len(kept) == 2 and best in kept and not list((tmp_path / "policy").glob("checkpoint-*"))
    weights, of_best = (load_file(folder / "model.safetensors") for folder in (tmp_path / "policy", tmp_path / "policy" / best))
    assert all(torch.equal(weights[name], of_best[name]) for name in weights)
    assert held_out["demonstrations"] == 4 and held_out["perplexity"] == pytest.approx(math.exp(held_out["loss"]))
    assert "further pieces of plain texts" in done.stderr and "`packing`: rows are packed" in done.stderr
    assert (tmp_path / "policy/model.safetensors").exists() and not list((tmp_path / "policy").glob("adapter*"))


def test_in_pretrain_mode_a_record_is_a_text(tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "Film?", "body": "A warm film."}])
    given = {"model_name_or_path": str(tmp_path), "dataset_name_or_path": str(data), "output_dir": "unused"}
    arguments = run_sft.Arguments(**given, pretrain_mode=True, dataset_key="body")
    assert [each.messages for each in run_sft.demonstrations(arguments)] == ["A warm film."]
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="`pretrain_mode` reads one text of a record"):
        run_sft.check(run_sft.Arguments(**given, pretrain_mode=True, output_key="body"), {})
    for key, message in (("nothing", r"the record has no `nothing` \(--dataset_key\)"), (None, "`text` must be a text")):
        with pytest.raises(InputError, match=message):
            list(run_sft.demonstrations(run_sft.Arguments(**given, pretrain_mode=True, dataset_key=key)))


def test_losses_and_tokens_that_are_not_there_are_refused_before_a_model_is_loaded(tokenizer, tmp_path):
    arguments = run_sft.Arguments(model_name_or_path=str(tmp_path), dataset_name_or_path="unused", output_dir="unused")
    with pytest.raises(InputError, match="`loss_type`: 'nlll' is not one of nll, dft"):
        run_sft.checked_config(arguments, {"loss_type": "nlll", "bf16": False}, Stage(tmp_path / "out", {}))
    config = config_of(tmp_path)
    check_tokens(config, tokenizer)
    config.pad_token = "<none>"
    with pytest.raises(InputError, match="`pad_token`: '<none>' is not in the vocabulary of"):
        check_tokens(config, tokenizer)


def test_held_out_data_that_is_trained_on_is_warned_of_but_not_another_split_of_a_data_set(tmp_path, caplog):
    given = {"model_name_or_path": "", "output_dir": "", "eval_dataset_name_or_path": "owner/name"}
    warn_of_trained_on(run_sft.Arguments(**given, dataset_name_or_path="owner/name"))
    assert not caplog.records
    warn_of_trained_on(run_sft.Arguments(**given, dataset_name_or_path="a.jsonl,owner/name", eval_dataset_split="train"))
    assert "is data that is trained on" in caplog.text


def test_of_every_n_prompts_one_is_held_out_with_all_its_demonstrations_and_one_prompt_alone_is_refused(tmp_path):
    records = [{"prompt": f"{n}?", "response": f"{n}."} for n in range(5)]
    records += [{"text": "A warm film."}, {"prompt": "2?", "response": "Two."}, {"text": "A dull mess."}]
    data = write_jsonl(tmp_path / "data.jsonl", records)
    given = {"model_name_or_path": str(tmp_path), "dataset_name_or_path": str(data), "output_dir": "unused"}
    arguments = run_sft.Arguments(**given, eval_every=3)
    prompts = prompts_aside(arguments)
    sides = training_demonstrations(arguments, prompts), held_out_demonstrations(arguments, prompts)
    said = [
        [each.messages if isinstance(each.messages, str) else each.messages[1]["content"] for each in side] for side in sides
    ]
    assert said == [["0.", "1.", "3.", "4.", "A dull mess."], ["2.", "A warm film.", "Two."]]
    assert prompts_aside(run_sft.Arguments(**given, eval_dataset_name_or_path="held_out.jsonl", eval_every=3)) == frozenset()
    write_jsonl(data, records[:1] * 3)
    with pytest.raises(InputError, match=r"`eval_every`: .*data\.jsonl has 1 different prompts, and 2 or more are needed"):
        prompts_aside(arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"completion_only_loss": "false"}, "`completion_only_loss: false`: here the assistant's turns alone are learnt"),
        ({"dataset_text_field": "body"}, "`dataset_text_field` is of TRL's own preparation of texts"),
        ({"shuffle_dataset": "true"}, "`shuffle_dataset` is of TRL's own preparation of texts"),
    ],
)
def test_settings_of_trls_preparation_are_refused(tmp_path, settings, message):
    (tmp_path / "config.json").write_text("{}")
    arguments = run_sft.Arguments(model_name_or_path=str(tmp_path), dataset_name_or_path="data.jsonl", output_dir="unused")
    with pytest.raises(InputError, match=message):
        run_sft.check(arguments, settings)
    run_sft.check(arguments, {"assistant_only_loss": "true", "completion_only_loss": True})
