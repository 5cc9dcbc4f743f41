"""The loss that balances a router, on packed rows: that of TRL's padded batches, of steps in several rows, of reward models."""

import copy
import sys
from functools import partial

import pytest
import torch
from torch.distributed.utils import _apply_to_tensors
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, MixtralConfig, Qwen3MoeConfig

from baton.models.router import balance_loss, balance_of
from baton.models.scoring import without_padding
from baton.training.checkpoints import load_as_written
from baton.training.learnt import collate, padded
from baton.training.measured import take_rows
from reward_model.packing import SIDES
from reward_model.trainer import PackedRewardTrainer
from tests.models.tiny_models import SHAPE, one_thread, random_pairs
from tests.training import test_dpo_core, test_reward_core, test_sft_core
from tests.training.test_distillation import random_rows
from tests.training.test_dpo_core import loss_and_gradients, tokenizer, with_reference

__all__ = ["one_thread", "tokenizer"]  # fixtures

COEFFICIENT = 0.7
FAMILIES = {
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "qwen3": Qwen3MoeConfig(**SHAPE, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2),
}


def experts(family, made=AutoModelForCausalLM, **more):
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES[family])
    for name, value in more.items():
        setattr(config, name, value)
    return made.from_config(config)


def assert_close(gradients, expected):
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        assert (gradients[name] - value).norm() <= 1e-4 * value.norm() + 1e-6, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_demonstrations_has_the_loss_of_a_padded_batch(family, tokenizer):
    rows = random_rows()
    ours, trls = (
        test_sft_core.trainer_of(experts(family), rows, tokenizer, trl=trl, router_aux_loss_coef=COEFFICIENT)
        for trl in (False, True)
    )
    every = list(rows)
    wanted = trls.compute_loss(trls.model.train(), trls.data_collator(every))
    shares = {"tokens": 1.0, "router_tokens": 1.0}
    found = ours.loss_of_row(ours.model.train(), ours.data_collator(every), shares)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4)
    auxiliary = trls._metrics["train"]["aux_loss"][-1]
    assert ours._metrics["train"]["aux_loss"] == [pytest.approx(auxiliary, rel=1e-4)] and auxiliary > 1
    assert_close(test_sft_core.gradients_of(ours, found), test_sft_core.gradients_of(trls, wanted))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_pairs_has_the_loss_of_a_padded_batch(family, tokenizer, tmp_path):
    model = experts(family)
    rows = with_reference(random_pairs(6), model)
    packed, padded = (
        loss_and_gradients(
            test_dpo_core.trainer_of(model, rows, tokenizer, tmp_path, packed=way, router_aux_loss_coef=COEFFICIENT), rows
        )
        for way in (True, False)
    )
    assert packed[0] == pytest.approx(padded[0], rel=1e-4)
    assert packed[2]["aux_loss"] == pytest.approx(padded[2]["aux_loss"], rel=1e-4)
    assert_close(packed[1], padded[1])


def test_a_step_in_several_rows_has_the_mean_of_their_losses_by_tokens(tokenizer, tmp_path):
    rows = random_rows()
    config = {"per_device_train_batch_size": 12, "max_steps": 1, "router_aux_loss_coef": COEFFICIENT, "learning_rate": 1e-9}
    trainer = test_sft_core.trainer_of(experts("mixtral"), rows, tokenizer, tmp_path, more={"tokens_per_row": 60}, **config)
    of_rows, measure = [], trainer.measure

    def measured(model, inputs):
        found = measure(model, inputs)
        of_rows.append((balance_loss(trainer._balance, [inputs["row"]]).item(), int(inputs["attention_mask"].sum())))
        return found

    trainer.measure = measured
    trainer.train()
    assert len(of_rows) > 1
    tokens = sum(count for _, count in of_rows)
    assert tokens == sum(map(len, rows["input_ids"]))
    expected = sum(loss * count for loss, count in of_rows) / tokens
    assert trainer.state.log_history[0]["aux_loss"] == pytest.approx(expected, rel=1e-5)


def test_pairs_train_row_by_row_with_the_routers_loss(tokenizer, tmp_path):
    model, losses, norms = experts("qwen3"), [], []
    for tokens, again in ((10_000, False), (10_000, True), (60, True)):
        trainer = test_dpo_core.trainer_of(
            model, with_reference(random_pairs(8), model), tokenizer, tmp_path, tokens_per_row=tokens, max_steps=1,
            logging_steps=1, per_device_train_batch_size=8, router_aux_loss_coef=COEFFICIENT,
            gradient_checkpointing=again,
        )  # fmt: skip
        assert trainer._steps is not None
        trainer.train()
        line = trainer.state.log_history[0]
        losses.append(line["loss"] - COEFFICIENT * line["aux_loss"])
        norms.append(line["grad_norm"])
        assert 0.5 < line["useful_tokens"] < 1
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-4)
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)  # layers that run again in the backward pass change nothing


def test_a_reward_models_router_is_balanced_over_the_tokens_of_both_responses(tokenizer, tmp_path):
    rows = test_reward_core.rows_of()
    model = experts("mixtral", AutoModelForSequenceClassification, num_labels=1)
    with_it, without = (
        test_reward_core.trainer_of(model, rows, tokenizer, tmp_path, more={"router_aux_loss_coef": weight})
        for weight in (COEFFICIENT, 0.0)
    )
    assert isinstance(with_it, PackedRewardTrainer)
    shares = {"pairs": 1.0, "router_tokens": 1.0}
    losses = [each.loss_of_row(each.model.train(), each.data_collator(list(rows)), shares) for each in (with_it, without)]
    found = with_it._metrics["train"]["aux_loss"][-1]
    assert (losses[0] - losses[1]).item() == pytest.approx(COEFFICIENT * found, rel=1e-4)
    batch = padded([without_padding(row[side], SHAPE["pad_token_id"]) for side in SIDES for row in rows])
    logits = copy.deepcopy(model).base_model(**batch, output_router_logits=True, use_cache=False).router_logits
    own = sys.modules[type(model).__module__].load_balancing_loss_func(logits, 4, 2, batch["attention_mask"])
    assert found == pytest.approx(own.item(), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_loaded_from_a_checkpoint(family, tokenizer, tmp_path):
    trainer = test_sft_core.trainer_of(experts(family), random_rows(), tokenizer, tmp_path)
    trained = copy.deepcopy(trainer.model.state_dict())
    trainer.save_model(str(tmp_path / "checkpoint-1"))
    load_as_written(trainer)
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    for load in (partial(trainer._load_from_checkpoint, trainer.state.best_model_checkpoint), trainer._load_best_model):
        for weight in trainer.model.parameters():
            weight.data.zero_()
        load()
        assert all(torch.equal(tensor, trained[name]) for name, tensor in trainer.model.state_dict().items())


def test_a_model_that_is_given_a_copy_of_the_row_has_the_same_loss():
    model, row = experts("mixtral"), collate(list(random_rows()), balanced=True)["row"]
    take_rows(model)
    losses = []
    for given in (row, _apply_to_tensors(torch.clone, row)):  # what FSDP does to the arguments of a module
        row.left.router_logits = None
        model(row=given)
        losses.append(balance_loss(balance_of(model), [row]).item())
    assert losses[0] == losses[1]


def test_a_model_without_experts_has_no_such_loss():
    assert balance_of(AutoModelForCausalLM.from_config(copy.deepcopy(test_dpo_core.NOT_PACKED["bloom"][0]))) is None
    row = collate(list(random_rows()))["row"]
    assert row.counts is None and row.left.router_logits is None
