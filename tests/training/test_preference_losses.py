"""Losses that TRL's DPO trainer does not have are those of their papers, packed or not, with LoRA or without."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer

from baton.errors import InputError
from baton.pairs import edit_distance
from baton.training.reference import reference_logps
from dpo_iteration.losses import OWN_LOSSES, LossNumbers, check_loss_types
from dpo_iteration.own_losses import LEAST, LOSSES, Pairs
from tests.models.tiny_models import model_of, one_thread, pairs_of, random_pairs
from tests.programs import read_jsonl, run_program, write_jsonl
from tests.training.test_dpo_core import loss_and_gradients, tokenizer, trainer_of, with_reference

__all__ = ["one_thread", "tokenizer"]  # fixtures

NUMBERS = LossNumbers(simpo_gamma=0.7, orpo_lambda=0.4, dpop_lambda=3.0, rebel_eta=2.0)
BETA = 0.3


@pytest.fixture(scope="module")
def data():
    """A model, and rows whose reference log-probabilities are some nats away from the model's."""
    model = model_of("llama")
    return model, with_reference(random_pairs(5), model)


def of_formula(name: str, policy, reference, lengths, margin) -> torch.Tensor:
    """The loss of each pair, written out once more from sums of log-probabilities, (pairs, 2) each, chosen first."""
    chosen, rejected = (policy - reference).unbind(1)
    mean_chosen, mean_rejected = (policy / lengths).unbind(1)
    if name == "simpo":
        return torch.log1p(torch.exp(-(BETA * mean_chosen - BETA * mean_rejected - 0.7)))
    if name == "orpo":
        odds_chosen, odds_rejected = (mean.exp() / (1 - mean.exp()) for mean in (mean_chosen, mean_rejected))
        return -mean_chosen - 0.4 * torch.log(torch.sigmoid(torch.log(odds_chosen / odds_rejected)))
    if name == "dpop":
        lost = torch.clamp(reference[:, 0] - policy[:, 0], min=0)
        return -torch.log(torch.sigmoid(BETA * (chosen - rejected - 3.0 * lost)))
    if name == "rebel":
        return (0.5 * (chosen - rejected) - margin) ** 2
    win = 1 / (1 + torch.exp(-margin))
    return (chosen - (win - 0.5) / BETA) ** 2 + (rejected - ((1 - win) - 0.5) / BETA) ** 2


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", OWN_LOSSES)
def test_a_loss_is_that_of_its_paper_on_packed_rows_and_in_trls_own_forward_pass(name, packed, data, tokenizer, tmp_path):
    model, rows = data
    trainer = trainer_of(model, rows, tokenizer, tmp_path, packed, tokens_per_row=70, numbers=NUMBERS, loss_type=[name])
    loss, gradients, _ = loss_and_gradients(trainer, rows)
    lengths = torch.tensor([[len(row["chosen_ids"]), len(row["rejected_ids"])] for row in rows])
    reference = torch.tensor([[row["ref_chosen_logps"], row["ref_rejected_logps"]] for row in rows])
    margin = torch.tensor([row["margin"] for row in rows])
    wanted = of_formula(name, reference_logps(model, pairs_of(rows)), reference, lengths, margin).mean()
    assert loss == pytest.approx(wanted.item(), rel=1e-4)
    assert max(gradient.norm() for gradient in gradients.values()) > 0


def some_pairs(count=64) -> Pairs:
    torch.manual_seed(0)
    draw = [torch.randn(count) * 3 for _ in range(2)]
    means = [-torch.rand(count) * 4 for _ in range(2)]
    return Pairs(*draw, *means, *(torch.full((count,), 5),) * 2, torch.rand(count) * 3, None)


def test_simpo_and_orpo_are_those_of_trls_trainers():
    pairs = some_pairs()
    cpo = SimpleNamespace(
        alpha=0.0, loss_type="simpo", simpo_gamma=0.7, beta=BETA, label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    wanted, *_ = CPOTrainer.cpo_loss(cpo, pairs.chosen_mean, pairs.rejected_mean)
    torch.testing.assert_close(LOSSES["simpo"](pairs, BETA, NUMBERS), wanted)
    orpo = SimpleNamespace(beta=0.4, accelerator=cpo.accelerator)
    ratio, *_ = ORPOTrainer.odds_ratio_loss(orpo, pairs.chosen_mean, pairs.rejected_mean)
    torch.testing.assert_close(LOSSES["orpo"](pairs, BETA, NUMBERS), -pairs.chosen_mean - ratio)


def test_odds_of_a_response_that_is_certain_are_finite_and_so_are_their_gradients():
    mean = torch.tensor([0.0, -LEAST / 2, -1e-5, -0.6, -0.7, -80.0], requires_grad=True)
    pairs = some_pairs(6)._replace(chosen_mean=mean, rejected_mean=mean.flip(0))
    LOSSES["orpo"](pairs, BETA, NUMBERS).sum().backward()
    assert mean.grad.isfinite().all()


def test_sppo_with_a_certain_winner_is_trls_sppo_hard(data, tokenizer, tmp_path):
    model, rows = data
    certain = [{**row, "margin": 100.0} for row in rows]
    soft, hard = (
        loss_and_gradients(trainer_of(model, certain, tokenizer, tmp_path, loss_type=[name]), certain)
        for name in ("sppo", "sppo_hard")
    )
    assert soft[0] == pytest.approx(hard[0], rel=1e-5)
    for name, gradient in hard[1].items():
        torch.testing.assert_close(soft[1][name], gradient, rtol=1e-4, atol=1e-5)


def test_dpop_without_its_penalty_is_trls_sigmoid_and_a_list_of_losses_is_their_weighted_sum(data, tokenizer, tmp_path):
    model, rows = data
    plain = trainer_of(model, rows, tokenizer, tmp_path)
    wanted, gradients, metrics = loss_and_gradients(plain, rows)
    config = {"loss_type": ["dpop", "sigmoid"], "loss_weights": [0.25, 0.75], "numbers": LossNumbers(dpop_lambda=0.0)}
    loss, both, same_metrics = loss_and_gradients(trainer_of(model, rows, tokenizer, tmp_path, **config), rows)
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert same_metrics == pytest.approx(metrics)
    for name, gradient in gradients.items():
        torch.testing.assert_close(both[name], gradient, rtol=1e-4, atol=1e-5)


def test_use_weighting_counts_a_pair_of_an_own_loss_as_it_counts_one_of_trls(data, tokenizer, tmp_path):
    model, rows = data
    outcomes = [
        loss_and_gradients(trainer_of(model, rows, tokenizer, tmp_path, **config, use_weighting=True, ld_alpha=0.5), rows)
        for config in ({}, {"loss_type": ["dpop"], "numbers": LossNumbers(dpop_lambda=0.0)})
    ]
    assert outcomes[1][0] == pytest.approx(outcomes[0][0], rel=1e-5)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("margin_scale", [0.0, 0.7])
def test_the_difference_of_lengths_stands_in_the_sigmoid(margin_scale, packed, data, tokenizer, tmp_path):
    model, rows = data
    numbers = LossNumbers(length_alpha=0.05)
    trainer = trainer_of(model, rows, tokenizer, tmp_path, packed, margin_scale, numbers=numbers)
    loss, _, metrics = loss_and_gradients(trainer, rows)
    policy = reference_logps(model, pairs_of(rows))
    reference = torch.tensor([[row["ref_chosen_logps"], row["ref_rejected_logps"]] for row in rows])
    chosen, rejected = (policy - reference).unbind(1)
    longer = torch.tensor([len(row["chosen_ids"]) - len(row["rejected_ids"]) for row in rows])
    margin = torch.tensor([row["margin"] for row in rows])
    wanted = -F.logsigmoid(BETA * (chosen - rejected) + 0.05 * longer - margin_scale * margin).mean()
    assert loss == pytest.approx(wanted.item(), rel=1e-4)
    plain = loss_and_gradients(trainer_of(model, rows, tokenizer, tmp_path, packed), rows)[2]
    assert metrics == pytest.approx(plain, rel=1e-5) and "rewards/margins" in metrics


@pytest.mark.parametrize("config", [{}, {"packed": False}, {"lora": True}])
@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_a_loss_without_a_reference_trains_without_one_and_logs_what_it_compares(name, config, tokenizer, tmp_path):
    rows = [{key: value for key, value in row.items() if key != "margin"} for row in random_pairs(8)]
    steps = {"max_steps": 4, "logging_steps": 1, "learning_rate": 2e-3, "per_device_train_batch_size": 8}
    trainer = trainer_of(
        model_of("llama"), rows, tokenizer, tmp_path, reference=False, loss_type=[name, "sft"], **config, **steps
    )
    before = reference_logps(model_of("llama"), pairs_of(rows)).unbind(1)
    trainer.train()
    assert trainer.ref_model is None
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]
    chosen, rejected = (
        logps / torch.tensor([len(row[f"{side}_ids"]) for row in rows])
        for logps, side in zip(before, ("chosen", "rejected"), strict=True)
    )
    assert lines[0]["rewards/chosen"] == pytest.approx(BETA * chosen.mean().item(), rel=1e-4)
    assert lines[0]["rewards/accuracies"] == pytest.approx((chosen > rejected).float().mean().item())
    assert lines[0]["rewards/margins"] == pytest.approx(BETA * (chosen - rejected).mean().item(), rel=1e-3, abs=1e-5)
    assert "kl_on_pairs" not in lines[0]


def test_a_run_without_a_reference_scores_none_and_takes_extra_responses(task, annotated, tmp_path):
    best = "A tale of wonder, with a cast to remember."
    extra = [{"prompt": record["prompt"], "responses": [best], "rewards": [9.0]} for record in read_jsonl(annotated)[:20]]
    done = run_program(
        "dpo_iteration/run_dpo.py", "--model_name_or_path", task / "base", "--dataset_name_or_path", annotated,
        "--output_dir", tmp_path / "policy", "--loss_type", "simpo", "--beta", 2.0, "--simpo_gamma", 1.0, "--max_steps", 2,
        "--ref_model", tmp_path / "is not read",
        "--extra_responses", write_jsonl(tmp_path / "extra.jsonl", extra), "--min_edit_distance", 0.8,
        "--max_length", 128, "--max_prompt_length", 64, "--use_cpu", "true", "--bf16", "false", "--logging_steps", 1,
        "--learning_rate", 1e-3, "--eval_dir", annotated,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "loss_type simpo: no reference is loaded" in done.stderr and not list(tmp_path.glob("reference-logps*"))
    manifest = json.loads((tmp_path / "policy.manifest.json").read_text())
    assert manifest["pairs"]["prompts with extra responses"] == 20
    assert manifest["inputs"].keys() == {"model", "data", "extra responses", "held-out data"}
    assert 0 < manifest["metrics"]["eval_loss"] < 3 and "eval_kl_on_pairs" not in manifest["metrics"]
    pairs = read_jsonl(tmp_path / "policy.pairs.jsonl")
    far = [pair for pair in pairs if edit_distance(pair["chosen"], pair["rejected"]) >= 0.8 * len(pair["chosen"])]
    assert manifest["counts"]["dropped"] == {"texts closer than min_edit_distance": 48 - len(pairs)}
    assert len(far) == len(pairs) < 48 and any(pair["chosen"] == best for pair in pairs)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"loss_type": ["dpop"], "f_divergence_type": "forward_kl"}, "dpop needs f_divergence_type reverse_kl"),
        ({"loss_type": ["simpo"], "ld_alpha": 0.5}, "`ld_alpha` weights sums"),
        ({"loss_type": ["rebel"], "sync_ref_model": True, "packed": False}, "rebel reads the reference's .* once"),
        ({"loss_type": ["ipo"], "numbers": LossNumbers(length_alpha=0.1)}, "length_alpha needs loss_type sigmoid"),
        ({"loss_type": ["sppo"], "margins": False}, "loss_type sppo needs a `margin` in every row"),
    ],
)
def test_what_a_loss_does_not_go_with_is_refused(config, message, tokenizer, tmp_path):
    rows = random_pairs(3)
    if not config.pop("margins", True):
        rows = [{name: row[name] for name in row if name != "margin"} for row in rows]
    with pytest.raises(InputError, match=message):
        trainer_of(model_of("llama"), rows, tokenizer, tmp_path, **config)


@pytest.mark.parametrize(
    ("named", "numbers", "message"),
    [
        ("simpa", {}, "'simpa' is not one of TRL's .* or of simpo, orpo"),
        ("sigmoid", {"simpo_gamma": 1.0}, "`simpo_gamma` acts with loss_type simpo only, not with sigmoid"),
        (["orpo", "sft"], {"rebel_eta": 2.0}, "`rebel_eta` acts with loss_type rebel only, not with orpo, sft"),
    ],
)
def test_a_number_of_a_loss_that_is_not_trained_is_refused(named, numbers, message):
    with pytest.raises(InputError, match=message):
        check_loss_types({"loss_type": named}, LossNumbers(**numbers))
    check_loss_types({"loss_type": ["simpo", "sigmoid"]}, LossNumbers(simpo_gamma=1.0, length_alpha=0.1))
