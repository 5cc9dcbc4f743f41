"""Distillation: its losses are those of the formulas and of TRL, whatever the packing, the processes and the deaths."""

import copy
import json
import random
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BloomConfig
from trl import SFTConfig
from trl.experimental.gkd import GKDTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from baton.arguments import build_config, read_yaml
from baton.drops import Drops
from baton.errors import InputError
from baton.models import attention, logps
from baton.models.attention import by_trees
from baton.models.templates import load_tokenizer
from baton.models.trees import Layout
from baton.training.arguments import parse_training
from baton.training.checks import check_settings
from baton.training.demonstrations import rows_of_demonstrations
from baton.training.learnt import cut, learnt_rows, outline
from baton.training.memory import Sharding
from distillation import teacher as of_teacher
from distillation.losses import divergence, forward_kl, jensen_shannon, reverse_kl, with_rest
from distillation.rows import examples_of
from distillation.run_kd import Arguments, check
from distillation.teacher import CHUNK, check_tokenizers, chunks_of, kept_teacher
from distillation.trainer import PackedKDTrainer
from tests.models.tiny_models import FAMILIES, VOCABULARY, model_of, one_thread
from tests.programs import ROOT, launch, read_jsonl, run_program, start, write_jsonl
from tests.training.test_dpo_core import tokenizer
from tests.training.test_training_programs import SHORT, logged

__all__ = ["one_thread", "tokenizer"]  # fixtures

LOSSES = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jensen_shannon", 0.3)]


def config_of(folder="unused", **values):
    fixed = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False}
    fixed |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "save_strategy": "no", "logging_steps": 1}
    return SFTConfig(str(folder), **fixed | values)


def random_rows(count=12):
    """Conversations of random tokens; among them shared prompts, equal ones, and turns that are not learnt in between."""
    rng = random.Random(0)
    rows = []
    for number in range(count):
        ids = [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(4, 24))]
        if number % 3 == 1:
            ids[:3] = rows[-1]["input_ids"][:3]
        start = rng.randint(1, len(ids) - 1)
        labels = [-100] * start + ids[start:]
        if number % 4 == 2:
            labels[(start + len(ids)) // 2 :][:1] = [-100]
        labels[start] = ids[start]
        rows.append({"input_ids": ids, "labels": labels})
    rows[5] = copy.deepcopy(rows[4])
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A student, its teacher, and the teacher's folder."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    student = model_of("llama")
    torch.manual_seed(1)
    teacher = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES["qwen2"])).eval()
    teacher.save_pretrained(folder)
    return student, teacher, folder


def kept_of(rows, teacher, folder, top=VOCABULARY, **more):
    return kept_teacher(rows, outline(rows), str(teacher), config_of(), folder, top, VOCABULARY, **more)


def trainer_of(student, rows, kept, tokenizer, folder="unused", whole=True, lora=False, more=(), **config):
    return PackedKDTrainer(
        copy.deepcopy(student), args=config_of(folder, **config), train_dataset=rows, outline=outline(rows), teacher=kept,
        whole=whole, processing_class=tokenizer, peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
        **dict(more),
    )  # fmt: skip


def logits_of_learnt(model, rows):
    """The logits at all learnt tokens, (N, V), one row of token ids at a time, and the learnt tokens."""
    logits, targets = [], []
    for row in rows:
        labels = torch.tensor(row["labels"])[1:]
        logits.append(model(torch.tensor([row["input_ids"]])).logits[0, :-1][labels != -100])
        targets.append(labels[labels != -100])
    return torch.cat(logits), torch.cat(targets)


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_near(found, expected, most):
    """That gradients differ by at most that share of the norm of each."""
    for name, value in expected.items():
        assert (found[name] - value).norm() <= most * value.norm() + 1e-7, name


# Losses


@pytest.fixture(scope="module")
def student_with(models, tokenizer, tmp_path_factory):
    """A function from kept tokens, divergence and `kd_coef` to a student, its loss of all rows, and its metrics."""
    folder, rows = tmp_path_factory.mktemp("kept"), random_rows()
    trainer = trainer_of(models[0], rows, kept_of(rows, models[2], folder), tokenizer, folder)

    def measured(top, name, beta, kd_coef):
        trainer.data_collator.teacher = kept_of(rows, models[2], folder, top)
        trainer._distance, trainer._whole, trainer._kd_coef = divergence(name, beta), top == VOCABULARY, kd_coef
        return trainer.model, *trainer.measure(trainer.model, trainer.data_collator(list(trainer.train_dataset)))

    return measured


@pytest.mark.parametrize(("name", "beta"), LOSSES)
def test_with_all_tokens_loss_and_gradients_are_those_of_the_formula_and_of_trl(name, beta, models, student_with):
    student, teacher, rows = *models[:2], random_rows()
    trained, loss, metrics = student_with(VOCABULARY, name, beta, 0.3)
    logits, targets = logits_of_learnt(student, rows)
    with torch.no_grad():
        of_teacher = logits_of_learnt(teacher, rows)[0]
    p, q = of_teacher.softmax(-1), logits.softmax(-1)
    m = beta * p + (1 - beta) * q
    expected = {
        "forward_kl": (p * (p / q).log()).sum(-1),
        "reverse_kl": (q * (q / p).log()).sum(-1),
        "jensen_shannon": beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1),
    }[name].mean()
    nll = torch.nn.functional.cross_entropy(logits, targets)
    assert metrics["kd_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["nll"] == pytest.approx(nll.item(), rel=1e-5)
    assert metrics["teacher_nll"] == pytest.approx(torch.nn.functional.cross_entropy(of_teacher, targets).item(), rel=1e-5)
    assert metrics["top1_agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())
    assert metrics["covered_mass"] == pytest.approx(1)
    wanted = gradients_of(student, 0.3 * expected + 0.7 * nll)
    assert loss.item() == pytest.approx((0.3 * expected + 0.7 * nll).item(), rel=1e-5)
    assert_near(gradients_of(trained, loss), wanted, 1e-5)

    at_trl = {"forward_kl": 0.0, "reverse_kl": 1.0, "jensen_shannon": beta}[name]
    gkd = GKDTrainer.generalized_jsd_loss(logits[None], of_teacher[None], targets[None], beta=at_trl)
    assert gkd.item() == pytest.approx(metrics["kd_loss"], abs=1e-4)
    hidden = [torch.cat(list(hidden_of_learnt(model, rows)))[None] for model in (student, teacher)]
    heads = [model.lm_head.weight for model in (student, teacher)]
    trl, *_ = _chunked_divergence_loss(*hidden, *heads, torch.ones(1, len(targets)), at_trl)
    assert trl.item() == pytest.approx(metrics["kd_loss"], abs=1e-4)


def hidden_of_learnt(model, rows):
    with torch.no_grad():
        for row in rows:
            states = model.model(torch.tensor([row["input_ids"]])).last_hidden_state[0, :-1]
            yield states[torch.tensor(row["labels"])[1:] != -100]


@pytest.mark.parametrize(("name", "beta"), LOSSES)
def test_with_few_tokens_all_others_count_as_one(name, beta, models, student_with):
    student, teacher, rows = *models[:2], random_rows()
    trained, loss, metrics = student_with(5, name, beta, 1.0)
    logits, targets = logits_of_learnt(student, rows)
    with torch.no_grad():
        p = logits_of_learnt(teacher, rows)[0].softmax(-1)
    q = logits.softmax(-1)
    top = p.topk(5).indices
    top[:, -1] = torch.where((top == targets[:, None]).any(-1), top[:, -1], targets)
    lumped = [torch.cat([x.gather(1, top), 1 - x.gather(1, top).sum(-1, keepdim=True)], dim=-1).log() for x in (p, q)]
    expected = divergence(name, beta)(*lumped).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["nll"] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-5)
    assert metrics["covered_mass"] == pytest.approx(p.gather(1, top).sum(-1).mean().item(), rel=1e-5)
    assert_near(gradients_of(trained, loss), gradients_of(student, expected), 1e-4)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8), st.floats(0.01, 0.99))
def test_divergences_are_0_of_equals_never_negative_and_grow_with_the_tokens_kept(seed, top, beta):
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(3, 9, generator=generator).double().log_softmax(-1) for _ in range(2))
    for loss in (forward_kl, reverse_kl, lambda a, b: jensen_shannon(a, b, beta)):
        few, more, every = (loss(with_rest(p[:, :k]), with_rest(q[:, :k])) for k in (top - 1, top, 9))
        assert torch.allclose(loss(p, p), torch.zeros(3).double(), atol=1e-6)
        assert (few >= -1e-5).all() and (few <= more + 1e-5).all() and (more <= loss(p, q) + 1e-5).all()
        assert torch.allclose(every, loss(p, q), atol=1e-4)


def test_a_rest_that_is_nothing_has_finite_gradients():
    logits = torch.tensor([[40.0, 0.0, -40.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, -50.0, -100.0]])
    for loss in (forward_kl, reverse_kl, lambda a, b: jensen_shannon(a, b, 0.5)):
        loss(with_rest(teacher[:, :2]), with_rest(logits.log_softmax(-1)[:, :2])).sum().backward()
        assert logits.grad.isfinite().all()


# The teacher's tokens


def test_the_teachers_tokens_are_computed_once_whatever_died(models, tmp_path, monkeypatch):
    monkeypatch.setattr(of_teacher, "CHUNK", 40)
    rows = random_rows()
    kept = kept_of(rows, models[2], tmp_path, top=7)
    files = sorted(kept.folder.iterdir())
    assert len(files) == len(kept.chunks) - 1 > 2
    contents, before = [files[0].read_bytes()], [path.stat().st_ino for path in files]
    every = list(range(len(rows)))
    ids, values = kept.of(every)

    files[1].unlink()
    again = kept_of(rows, models[2], tmp_path, top=7, tokens_per_row=30)
    assert [path.stat().st_ino == inode for path, inode in zip(files, before, strict=True)].count(False) == 1
    assert files[0].read_bytes() == contents[0]
    assert (again.of(every)[0] == ids).all() and torch.allclose(again.of(every)[1], values, atol=1e-5)

    monkeypatch.setattr(of_teacher, "load_as_policy", None)  # would fail if it were called
    assert kept_of(rows, models[2], tmp_path, top=7).folder == kept.folder
    backwards = kept.of(every[::-1])
    assert len(backwards[0]) == len(ids) and sorted(backwards[1].flatten().tolist()) == sorted(values.flatten().tolist())


def test_other_rows_another_teacher_or_more_tokens_have_files_of_their_own(models, tmp_path, monkeypatch):
    monkeypatch.setattr(of_teacher, "load_as_policy", lambda *_: models[1])
    monkeypatch.setattr(of_teacher, "_score_missing", lambda *_: None)  # their names say it before they are written
    rows = random_rows()
    changed = rows.map(
        lambda row, number: {"labels": [-100, *row["labels"][1:]] if number else row["labels"]}, with_indices=True
    )
    other = rows.select(range(3))
    models[0].save_pretrained(tmp_path / "other")
    folders = [
        kept_of(rows, models[2], tmp_path, top=5).folder,
        kept_of(changed, models[2], tmp_path, top=5).folder,
        kept_of(other, models[2], tmp_path, top=5).folder,
        kept_of(rows, models[2], tmp_path, top=6).folder,
        kept_of(rows, tmp_path / "other", tmp_path, top=5).folder,
    ]
    assert folders[0] == folders[1]  # the labels of first tokens were none
    assert len(set(folders)) == 4


def test_a_teacher_with_a_larger_padded_head_gives_only_tokens_that_the_student_has(models, tokenizer, tmp_path):
    student, teacher, _ = models
    padded = copy.deepcopy(teacher)
    padded.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
    padded.save_pretrained(tmp_path / "padded")
    rows = random_rows()
    kept = kept_of(rows, tmp_path / "padded", tmp_path)
    ids, values = kept.of(range(len(rows)))
    assert ids.max() == VOCABULARY - 1 and values.exp().sum(-1).max() < 1
    with torch.no_grad():
        p = logits_of_learnt(padded, rows)[0].log_softmax(-1)
    assert torch.allclose(p.gather(1, ids), values, atol=1e-5)
    trainer = trainer_of(student, rows, kept, tokenizer, whole=False)
    loss, _ = trainer.measure(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    assert loss.isfinite()


@pytest.mark.parametrize("block_bytes", [1, 2**20])
def test_the_likeliest_tokens_are_those_of_the_finished_logits_in_blocks_of_any_size(block_bytes, monkeypatch):
    monkeypatch.setattr(logps, "TOP_BLOCK_BYTES", block_bytes)
    torch.manual_seed(0)
    hidden, weight, bias, targets = torch.randn(7, 5), torch.randn(30, 5), torch.randn(30), torch.randint(20, (7,))
    ids, found = logps.top_logps(hidden, weight, bias, targets, top=4, vocabulary=20, scale=1.5, softcap=3.0)
    every = (3 * torch.tanh(1.5 * (hidden @ weight.T + bias) / 3)).log_softmax(-1)
    assert (ids == targets[:, None]).any(-1).all() and ids.max() < 20
    assert torch.allclose(found, every.gather(1, ids), atol=1e-5)
    assert torch.allclose(found[:, :3], every[:, :20].topk(3).values, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([1, 10, CHUNK // 2, CHUNK - 1, CHUNK, 2 * CHUNK]), min_size=1, max_size=20))
def test_every_row_is_in_one_file_and_no_file_is_too_large(learnt):
    chunks = chunks_of(np.array(learnt)).tolist()
    assert chunks[0] == 0 and chunks[-1] == len(learnt) and chunks == sorted(set(chunks))
    for first, end in pairwise(chunks):
        assert sum(learnt[first:end]) <= CHUNK or end - first == 1


def test_a_teacher_whose_packed_numbers_are_not_its_own_is_refused(models, tmp_path, monkeypatch):
    rows = random_rows()
    kept_of(rows, models[2], tmp_path / "right", check_first_batch=True)
    monkeypatch.setattr(attention, "by_trees", lambda *a: by_trees(*a[:3], Layout([(a[3].length, [])]), *a[4:]))
    with pytest.raises(InputError, match="packed log-probabilities differ"):
        kept_of(rows, models[2], tmp_path / "wrong", check_first_batch=True)


def test_an_architecture_that_takes_no_packed_rows_is_refused(tmp_path):
    AutoModelForCausalLM.from_config(BloomConfig(vocab_size=VOCABULARY, hidden_size=8, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "bloom"
    )
    with pytest.raises(InputError, match="BloomForCausalLM cannot be distilled"):
        kept_of(random_rows(), tmp_path / "bloom", tmp_path)


def test_tokenizers_that_differ_are_refused_with_the_difference(tokenizer):
    check_tokenizers(tokenizer, copy.deepcopy(tokenizer), ("student", "teacher"))
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<extra>"])
    with pytest.raises(InputError, match=f"'<extra>' has id none in student and {VOCABULARY} in the teacher teacher"):
        check_tokenizers(tokenizer, other, ("student", "teacher"))


# Training


def test_packed_rows_of_any_size_train_alike_and_held_out_numbers_are_those_of_all_tokens(models, tokenizer, tmp_path):
    rows, runs = random_rows(), []
    kept = kept_of(rows, models[2], tmp_path, top=9)
    held_out = {"eval_dataset": rows, "eval_outline": outline(rows), "eval_teacher": kept}
    for tokens in (10_000, 30):
        more = {"tokens_per_row": tokens, "check_first_batch": True, **held_out}
        settings = {"per_device_train_batch_size": 6, "max_steps": 3, "learning_rate": 1e-2}
        trainer = trainer_of(models[0], rows, kept, tokenizer, tmp_path, whole=False, more=more, **settings)
        trainer.train()
        history = trainer.state.log_history
        runs.append([[line[name] for name in METRICS if name in line] for line in history])
        batch = trainer.data_collator(list(trainer.train_dataset))
        trainer.model.eval()
        with torch.no_grad():
            loss, metrics = trainer.measure(trainer.model, batch)
        evaluated = next(line for line in reversed(history) if "eval_loss" in line)
        assert evaluated["eval_loss"] == pytest.approx(loss.item(), abs=1e-5)
        for name, value in metrics.items():
            assert evaluated[f"eval_{name}"] == pytest.approx(value, abs=1e-5), name
    assert len(runs[0]) == len(runs[1]) > 3
    for first, second in zip(*runs, strict=True):
        assert first == pytest.approx(second, abs=1e-4)


METRICS = ["loss", "kd_loss", "nll", "teacher_nll", "top1_agreement", "covered_mass", "grad_norm", "num_tokens", "eval_loss"]


def test_an_adapter_alone_learns(models, tokenizer, tmp_path):
    rows = random_rows()
    settings = {"per_device_train_batch_size": 12, "max_steps": 6, "learning_rate": 3e-2}
    trainer = trainer_of(
        models[0], rows, kept_of(rows, models[2], tmp_path), tokenizer, tmp_path, lora=True, more={"kd_coef": 1.0}, **settings
    )
    trainer.train()
    losses = [line["kd_loss"] for line in trainer.state.log_history if "kd_loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    frozen = {name: value for name, value in trainer.model.named_parameters() if not value.requires_grad}
    assert all("lora" not in name for name in frozen) and len(frozen) > 10


@given(st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_a_packed_row_scores_the_learnt_tokens_of_its_members_in_order(seed):
    rows = random_rows().shuffle(seed=seed)
    cuts = [cut(row["input_ids"], row["labels"]) for row in rows]
    found = {}
    for row, members in learnt_rows(cuts, 40):
        of_members = row.targets.split([len(cuts[member].learnt) for member in members])
        found |= {member: targets.tolist() for member, targets in zip(members, of_members, strict=True)}
    assert [found[n] for n in range(len(rows))] == [[label for label in row["labels"] if label != -100] for row in rows]


# Records


def test_sampled_token_ids_are_used_as_they_are_and_of_generated_records_nothing_else_is_learnt(task):
    tokenizer = load_tokenizer(str(task / "base"))
    letters = [id_ for letter in "Warm." for id_ in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    prompt = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}]
    generated = {
        "prompt": prompt, "responses": ["Warm.", "Cold."], "response_token_ids": [letters, letters],
        "finish_reasons": ["length", "stop"],
    }  # fmt: skip
    demonstration = {"messages": [*prompt, {"role": "assistant", "content": "Warm."}], "response_token_ids": letters}
    examples = [each for record in (generated, demonstration) for each in examples_of(record, "file:1")]
    counted = Counter()
    first, second, third = (
        [label for label in row["labels"] if label != -100]
        for row in rows_of_demonstrations(tokenizer, 200, examples, Drops(), counted)
    )
    assert first == letters and second[-1] == tokenizer.eos_token_id and tokenizer.decode(second[:-1]) == "Cold."
    assert third[-len(letters) :] == letters and tokenizer.decode(third[: -len(letters)]).startswith("B")
    assert [counted[f"responses with {name}"] for name in ("sampled token ids", "another tokenizer's token ids")] == [2, 1]

    (text,) = rows_of_demonstrations(tokenizer, 200, examples_of({"text": "Warm."}, "file:2"), Drops(), counted)
    assert text["labels"] == [-100, *text["input_ids"][1:]] and text["input_ids"][-1] == tokenizer.eos_token_id

    drops = Drops()
    assert list(rows_of_demonstrations(tokenizer, 5, examples, drops, Counter())) == []
    assert drops.counts == {"longer than max_length 5 tokens": 3}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "A"}, "file:7: a demonstration needs `messages`, or a prompt and its response"),
        ({"prompt": "A", "responses": ["B"], "response_token_ids": [[-1]]}, "file:7: `response_token_ids` must be a list"),
        ({"messages": [{"role": "user", "content": "A"}]}, "file:7: `messages` must end with the assistant"),
        ({"responses": ["B"]}, "file:7: the record has no `prompt`"),
    ],
)
def test_a_bad_record_is_refused_with_its_line_and_field(record, message):
    with pytest.raises(InputError, match=message):
        list(examples_of(record, "file:7"))


# The program


def words(task, output, *more):
    return [
        "distillation/run_kd.py", "--model_name_or_path", task / "base", "--teacher_model", output.parent / "teacher",
        "--dataset_name_or_path", task / "data/sft.jsonl", "--max_samples", 32, "--output_dir", output,
        "--learning_rate", 3e-3, *SHORT, *more,
    ]  # fmt: skip


@pytest.fixture
def place(task, tmp_path):
    """A folder with a `teacher/` of the task's tokenizer."""
    teacher = AutoModelForCausalLM.from_pretrained(task / "base")
    torch.manual_seed(1)
    for parameter in teacher.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    teacher.save_pretrained(tmp_path / "teacher")
    load_tokenizer(str(task / "base")).save_pretrained(tmp_path / "teacher")
    return tmp_path


def test_killed_in_one_process_it_goes_on_in_two_as_if_nothing_had_happened(task, place):
    held_out = ["--eval_dataset", write_jsonl(place / "held.jsonl", read_jsonl(task / "data/sft.jsonl")[64:75])]
    done = run_program(*words(task, place / "whole", "--max_steps", 8, *held_out))
    assert done.returncode == 0, done.stderr
    manifest = json.loads((place / "whole.manifest.json").read_text())
    assert manifest["counts"] == {"in": 32, "out": 32, "dropped": {}} and not list(place.glob("whole/checkpoint-*"))
    assert logged(done.stderr, "loss")[-1] < logged(done.stderr, "loss")[0]
    folders = sorted(place.glob("teacher-*"))
    before = [folder.stat().st_mtime_ns for folder in folders]

    killing = words(task, place / "policy", "--max_steps", 8, "--save_steps", 1, *held_out)
    (place / "killed").mkdir()
    killed, errors = start(*killing, output=str(place / "killed")), place / "killed/stderr"
    while not errors.exists() or " step 2:" not in errors.read_text():
        killed.join(0.05)
        assert killed.exitcode is None, errors.read_text()
    killed.kill()
    killed.join()

    halved = [*killing, "--per_device_train_batch_size", 4]
    codes, resumed = launch(2, place, *halved)
    assert codes == [0, 0] and "going on from" in resumed and len(before) == 2, resumed[-3000:]
    assert [folder.stat().st_mtime_ns for folder in sorted(place.glob("teacher-*"))] == before  # none was computed again
    names = [name for name in METRICS if name != "num_tokens"]  # which TRL counts from where it goes on
    expected, found = (
        {
            (line["step"], name): line[name]
            for line in read_jsonl(place / f"{run}.metrics.jsonl")
            for name in names
            if name in line and line["step"] == 8
        }
        for run in ("whole", "policy")
    )
    assert found == pytest.approx(expected, abs=1e-4) and {(8, "loss"), (8, "eval_loss")} <= found.keys()
    weights = [load_file(place / name / "model.safetensors") for name in ("whole", "policy")]
    assert all((weights[0][name] - weights[1][name]).abs().max() < 1e-4 for name in weights[0])
    again = run_program(*killing)
    assert again.returncode == 0 and "up to date" in again.stderr
    other = run_program(*killing, "--teacher_top_k", 5)
    assert other.returncode == 2 and "teacher_top_k" in other.stderr


def test_sampled_responses_train_a_merged_adapter_with_held_out_numbers_in_the_manifest(task, place):
    prompts = [record["prompt"] for record in read_jsonl(task / "data/prompts_round1.jsonl")[:12]]
    records = [{"prompt": prompt, "responses": ["A warm film.", "A dull mess."]} for prompt in prompts]
    data, held_out = write_jsonl(place / "data.jsonl", records[:8]), write_jsonl(place / "held.jsonl", records[8:])
    more = [
        "--use_peft",
        "--merge_adapter",
        "--kd_loss",
        "jensen_shannon",
        "--beta",
        0.2,
        "--teacher_offload",
        "--max_steps",
        2,
    ]
    done = run_program(*words(task, place / "policy", *more, "--dataset_name_or_path", data, "--eval_dataset", held_out))
    assert done.returncode == 0, done.stderr
    manifest = json.loads((place / "policy.manifest.json").read_text())
    assert manifest["counts"]["in"] == 16 and {"eval_loss", "eval_kd_loss", "eval_nll"} <= manifest["metrics"].keys()
    assert "nothing to offload" in done.stderr and (place / "policy/model.safetensors").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--beta", 0.5], "`beta` acts with `kd_loss` jensen_shannon only"),
        (["--kd_loss", "jensen_shannon", "--beta", 1], "`beta`: input should be less than 1"),
        (["--kd_coef", 1.5], "`kd_coef`: input should be less than or equal to 1"),
        (["--teacher_top_k", 1], "`teacher_top_k`: input should be greater than or equal to 2"),
        (["--packing", "true"], "`packing` is not for distillation"),
        (["--neftune_noise_alpha", 5], "`neftune_noise_alpha` is not for distillation"),
        (["--lora_r", 4], "`lora_r` acts with `use_peft` only"),
        (["--eval_strategy", "steps"], "`eval_strategy` needs data to evaluate on"),
        (["--kd_coeff", 1], "did you mean `kd_coef`"),
        (["--teacher_model", "/nowhere/at/all"], "/nowhere/at/all: no such folder"),
    ],
)
def test_what_cannot_train_is_refused_before_anything_is_loaded(more, message, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    needed = ["model_name_or_path", "teacher_model", "dataset_name_or_path", "output_dir"]
    given = [word for name in needed if f"--{name}" not in more for word in (f"--{name}", str(tmp_path / "model"))]
    with pytest.raises(InputError, match=re.escape(message)):
        check(*parse_training("distillation/run_kd.py", Arguments, "", lambda: SFTConfig, [*given, *map(str, more)]))


def test_a_teacher_of_another_tokenizer_is_refused(task, place):
    other = load_tokenizer(str(task / "base"))
    other.add_tokens(["<extra>"])
    other.save_pretrained(place / "teacher")
    done = run_program(*words(task, place / "policy"))
    assert done.returncode == 2 and "'<extra>' has id none in" in done.stderr, done.stderr


def test_the_config_of_the_project_is_one_that_trains():
    settings = read_yaml(ROOT / "configs/kd.yaml")
    own = {name: settings.pop(name) for name in list(settings) if name in Arguments.model_fields}
    Arguments(**own)
    check_settings(build_config(SFTConfig, settings | {"bf16": False, "use_cpu": True, "output_dir": "unused"}), Sharding())
