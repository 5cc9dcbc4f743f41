"""DPO on the packed forward pass gives TRL's numbers: losses, gradients, weights, the reference's log-probabilities."""

import copy
import json
import logging
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    MambaConfig,
    PreTrainedTokenizerFast,
)
from trl import DPOConfig

from baton.errors import InputError
from baton.models import attention
from baton.models.attention import by_trees
from baton.models.trees import Layout
from baton.partial import PartialRecords
from baton.training.reference import _assemble, kept_reference_logps, reference_logps
from dpo_iteration.losses import LOSS_TYPES
from dpo_iteration.trainer import PackedDPOTrainer
from tests.models.tiny_models import SHAPE, VOCABULARY, model_of, one_thread, pairs_of, random_pairs
from tests.programs import launch

__all__ = ["one_thread"]  # a fixture

# Losses against TRL's own


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"t{i}": i for i in range(3, VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")),
        pad_token="<pad>", bos_token="<s>", eos_token="</s>",
    )  # fmt: skip


def trainer_of(
    model, rows, tokenizer, folder, packed=True, margin_scale=0.0, tokens_per_row=4096, lora=False, check=None, numbers=None,
    reference=True, **config
):  # fmt: skip
    arguments = {
        "gradient_checkpointing": False,
        "bf16": False,
        "report_to": "none",
        "use_cpu": True,
        "max_length": None,
        "beta": 0.3,
    }
    needs_reference = reference and not lora and "ref_chosen_logps" not in rows[0]
    return PackedDPOTrainer(
        copy.deepcopy(model),
        ref_model=copy.deepcopy(model) if needs_reference else None,
        args=DPOConfig(str(folder), **{**arguments, "save_strategy": "no", "disable_tqdm": True, **config}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
        packed=packed,
        margin_scale=margin_scale,
        numbers=numbers,
        tokens_per_row=tokens_per_row,
        check_first_batch=check,
    )


def loss_and_gradients(trainer, rows) -> tuple[float, dict[str, torch.Tensor], dict]:
    batch = trainer.data_collator([{name: row[name] for name in row if name != "id"} for row in rows])
    if not trainer._reads_margin:
        batch.pop("margin", None)
    trainer.model.train().zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def with_reference(rows: list[dict], model, seed: int = 1) -> list[dict]:
    """Rows whose reference log-probabilities are some nats away from the model's."""
    rng = random.Random(seed)
    logps = reference_logps(model, pairs_of(rows)).tolist()
    return [
        {
            **row,
            "ref_chosen_logps": chosen + rng.uniform(-2, 2),
            "ref_rejected_logps": rejected + rng.uniform(-2, 2),
        }
        for row, (chosen, rejected) in zip(rows, logps, strict=True)
    ]


LOSSES = {
    **{name: {"loss_type": [name]} for name in (
        "sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
        "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
    )},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 0.01},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "weighted sum": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "ld_alpha": {"ld_alpha": 0.4},
    "weighting": {"use_weighting": True},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
}  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma2"])
def trainers(request, tokenizer, tmp_path_factory):
    """The packed trainer and TRL's forward pass on the same model and rows, ready for every loss."""
    model = model_of(request.param)
    rows = with_reference(random_pairs(5), model)
    folder = tmp_path_factory.mktemp(request.param)
    ours = trainer_of(model, rows, tokenizer, folder, tokens_per_row=70, use_weighting=True)
    return ours, trainer_of(model, rows, tokenizer, folder, packed=False, use_weighting=True), rows


def set_loss(trainer, config: dict) -> None:
    """Give a trainer the loss settings that TRL's constructor would have read from `config`."""
    defaults = {
        "loss_type": ["sigmoid"],
        "loss_weights": None,
        "label_smoothing": 0.0,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "use_weighting": False,
    }
    settings = {**defaults, **config}
    trainer.loss_types = settings.pop("loss_type")
    trainer.loss_weights = settings.pop("loss_weights") or [1.0] * len(trainer.loss_types)
    for name, value in settings.items():
        setattr(trainer, name, value)


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_gradients_and_metrics_are_those_of_trl(loss, trainers):
    ours, trls, rows = trainers
    for trainer in (ours, trls):
        set_loss(trainer, LOSSES[loss])
    value, gradients, metrics = loss_and_gradients(ours, rows)
    wanted_value, wanted_gradients, wanted_metrics = loss_and_gradients(trls, rows)
    assert value == pytest.approx(wanted_value, rel=1e-4)
    assert metrics == pytest.approx(wanted_metrics, rel=1e-4, abs=1e-5)
    assert gradients.keys() == wanted_gradients.keys()
    largest = max(gradient.norm() for gradient in wanted_gradients.values())
    assert largest > 0
    for name, wanted in wanted_gradients.items():
        assert (gradients[name] - wanted).norm() <= 1e-4 * wanted.norm() + 1e-6 * largest, name


# Training


@pytest.mark.parametrize(
    "setting", [{"gradient_checkpointing": True}, {"lora": True}, {"tokens_per_row": 60, "loss_type": ["sigmoid", "sft"]}]
)
def test_training_steps_are_those_of_trl(setting, tokenizer, tmp_path):
    rows = random_pairs(12)
    config = {
        "per_device_train_batch_size": 3,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        **setting,
    }
    losses, weights = {}, {}
    for packed in (True, False):
        trainer = trainer_of(model_of("llama"), rows, tokenizer, tmp_path, packed=packed, **config)
        trainer.train()
        losses[packed] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        weights[packed] = trainer.model.state_dict()
    assert len(losses[True]) == 4
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    for name, value in weights[False].items():
        torch.testing.assert_close(weights[True][name], value, atol=2e-4, rtol=1e-3)


def test_training_bf16_weights_follows_trl(tokenizer, tmp_path):
    rows = random_pairs(6)
    values = {}
    for packed in (True, False):
        model = model_of("llama").to(torch.bfloat16)
        trainer = trainer_of(model, with_reference(rows, model), tokenizer, tmp_path, packed=packed, bf16=True)
        values[packed], gradients, _ = loss_and_gradients(trainer, trainer.train_dataset.to_list())
        assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert values[True] == pytest.approx(values[False], rel=0.05)


def test_the_margin_is_an_offset_in_the_sigmoid_and_metrics_do_not_see_it(tokenizer, tmp_path):
    model = model_of("llama")
    rows = with_reference(random_pairs(5), model)
    plain = trainer_of(model, rows, tokenizer, tmp_path)
    trainer = trainer_of(model, rows, tokenizer, tmp_path, margin_scale=0.7)
    loss, _, metrics = loss_and_gradients(trainer, rows)
    _, _, plain_metrics = loss_and_gradients(plain, rows)

    policy = reference_logps(model, pairs_of(rows))
    reference = torch.tensor([[row["ref_chosen_logps"], row["ref_rejected_logps"]] for row in rows])
    margin = torch.tensor([row["margin"] for row in rows])
    chosen, rejected = (policy - reference).unbind(1)
    expected = -torch.nn.functional.logsigmoid(0.3 * (chosen - rejected) - 0.7 * margin).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    assert metrics == pytest.approx(plain_metrics)
    assert trainer._total_train_tokens == plain._total_train_tokens


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"loss_type": ["sft", "sigmoid"], "loss_weights": [0.3, 0.8]},
        {"ld_alpha": 0.4, "use_weighting": True},
        {"lora": True},
    ],
)
def test_the_loss_with_a_margin_and_its_gradients_are_trls_with_a_reference_that_much_surer_of_the_chosen(
    config, packed, tokenizer, tmp_path
):
    model = model_of("llama")
    rows = with_reference(random_pairs(5), model)
    surer = [{**row, "ref_chosen_logps": row["ref_chosen_logps"] + 0.7 / 0.3 * row["margin"]} for row in rows]
    outcomes = []
    for data, margin_scale in ((rows, 0.7), (surer, 0.0)):
        torch.manual_seed(0)  # an adapter's first weights
        outcomes.append(loss_and_gradients(trainer_of(model, data, tokenizer, tmp_path, packed, margin_scale, **config), data))
    (loss, gradients, _), (wanted_loss, wanted, _) = outcomes
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"loss_type": ["ipo"]}, "margin_scale needs loss_type sigmoid"),
        ({"f_divergence_type": "forward_kl"}, "margin_scale needs f_divergence_type reverse_kl"),
    ],
)
def test_a_margin_with_another_loss_is_refused(config, message, tokenizer, tmp_path):
    with pytest.raises(InputError, match=message):
        trainer_of(model_of("llama"), random_pairs(3), tokenizer, tmp_path, margin_scale=1.0, **config)


def test_the_loss_types_are_those_that_trl_names():
    named = re.findall(r"`'(\w+)'`", DPOConfig.__dataclass_fields__["loss_type"].metadata["help"])
    assert sorted(named) == sorted(LOSS_TYPES)


def test_a_margin_scale_without_margins_is_refused(tokenizer, tmp_path):
    rows = [{name: row[name] for name in row if name != "margin"} for row in random_pairs(3)]
    with pytest.raises(InputError, match="needs a `margin` in every row"):
        trainer_of(model_of("llama"), rows, tokenizer, tmp_path, margin_scale=1.0)


@pytest.mark.parametrize("lora", [False, True])
def test_a_training_stops_at_a_first_batch_whose_packed_numbers_are_not_the_models_own(
    lora, tokenizer, tmp_path, monkeypatch, caplog
):
    def train(**more):
        settings = {"per_device_train_batch_size": 4, "max_steps": 2, "bf16": True, "lora": lora, **more}
        trainer_of(model_of("llama"), random_pairs(8), tokenizer, tmp_path, **settings).train()

    with caplog.at_level(logging.INFO):
        train(check=True)
    assert caplog.text.count("first batch: packed log-probabilities differ") == 1
    monkeypatch.setattr(attention, "by_trees", lambda *a: by_trees(*a[:3], Layout([(a[3].length, [])]), *a[4:]))
    with pytest.raises(InputError, match=r"rounding in bfloat16 explains .*`--forward trl`"):
        train(check=True)
    train()  # on a CPU, where the packed attention is tested, nothing is compared


LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
NOT_PACKED = {
    "bloom": (BloomConfig(hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0), "its attention does not go through"),
    "mamba": (MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4), "its attention does not go through"),
    "deepseek": (DeepseekV3Config(**SHAPE | LATENT, first_k_dense_replace=3), "its attention is latent"),
}


@pytest.mark.parametrize("family", NOT_PACKED)
def test_an_architecture_that_cannot_be_packed_is_padded_and_says_so(family, tokenizer, tmp_path, caplog):
    config, why = NOT_PACKED[family]
    config.vocab_size, rows = VOCABULARY, random_pairs(4)
    settings = {"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    model = AutoModelForCausalLM.from_config(config)
    with caplog.at_level(logging.WARNING, logger="baton"):
        trainer = trainer_of(model, rows, tokenizer, tmp_path, **settings)
    assert caplog.text.count(f"{type(model).__name__}: {why}") == 1
    assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape[0] == 4  # two pairs at a time: TRL's own steps
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)


# The reference


def bloom():
    """A model whose attention is its own: it cannot be packed."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("build", [lambda: model_of("llama"), bloom], ids=["llama", "bloom"])
@pytest.mark.parametrize("ld_alpha", [None, 0.4])
def test_reference_logps_are_those_of_trl(ld_alpha, build, tokenizer, tmp_path):
    model, rows = build(), random_pairs(7)
    trainer = trainer_of(model, rows, tokenizer, tmp_path, packed=False, ld_alpha=ld_alpha)
    batch = trainer.data_collator([{name: row[name] for name in row if name != "margin"} for row in rows])
    wanted = torch.stack(trainer.compute_ref_log_probs(trainer.model, batch), dim=1)
    for tokens_per_row in (50, 10_000):
        logps = reference_logps(model, pairs_of(rows), tokens_per_row, ld_alpha)
        torch.testing.assert_close(logps, wanted, rtol=1e-4, atol=1e-4)


def test_the_reference_computes_a_pair_once_over_all_rounds_and_again_only_for_another_key(tmp_path):
    loads = []

    def load():
        loads.append(1)
        return model_of("llama")

    def kept(pairs, folder="round2", key="model-a", **settings):
        """The log-probabilities, and how many pairs were computed for them."""
        before = set(tmp_path.glob("**/*.npy"))
        logps = kept_reference_logps(pairs, load, tmp_path / folder, [key], **settings)
        return logps, sum(len(np.load(path)) for path in set(tmp_path.glob("**/*.npy")) - before)

    pairs = pairs_of(random_pairs(9))
    expected = reference_logps(model_of("llama"), pairs).numpy()
    assert [kept(pairs[:5], folder)[1] for folder in ("round1", "elsewhere")] == [5, 5]
    logps, computed = kept([*pairs[::-1], pairs[8]])  # five pairs are known from round 1, one stands there twice
    np.testing.assert_allclose(logps[::-1], [expected[8], *expected], rtol=1e-4)
    assert computed == 4 and len(loads) == 3
    again, computed = kept(pairs[3:7], tokens_per_row=50)
    np.testing.assert_array_equal(again, logps[::-1][4:8])
    assert computed == 0 and len(loads) == 3
    assert [kept(pairs, key="model-b")[1], kept(pairs, ld_alpha=0.5)[1], kept(pairs, "elsewhere")[1]] == [9, 9, 4]
    assert not list(tmp_path.glob("**/*.partial"))


def test_reference_logps_are_not_assembled_where_batches_are_missing(tmp_path):
    parts = PartialRecords(tmp_path / "parts", 3)
    parts.append(1, {"logps": np.zeros((2, 2), "<f4").tobytes().hex()})
    parts.close()
    with pytest.raises(RuntimeError, match="parts: 2 of 3 batches of reference log-probabilities are missing"):
        _assemble([[0], [1, 2], [3]], tmp_path / "parts", np.arange(4, dtype=np.uint64), tmp_path / "kept.npy")
    assert not (tmp_path / "kept.npy").exists()


# Several processes


def run_processes(mode: str, count: int, folder: Path) -> None:
    codes, errors = launch(count, folder, Path(__file__).with_name("dpo_processes.py"), mode, folder)
    assert set(codes) == {0}, errors[-3000:]


@pytest.fixture
def run_folder(tokenizer, tmp_path):
    model_of("llama-tied").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model = model_of("llama-tied")
    (tmp_path / "rows.json").write_text(json.dumps(with_reference(random_pairs(13), model)))
    return tmp_path


def test_two_processes_train_and_evaluate_as_one(run_folder):
    for count in (1, 2):
        run_processes("ddp", count, run_folder)
    one, two = (json.loads((run_folder / f"steps-{count}.json").read_text()) for count in (1, 2))
    assert [step["epoch"] for step in one] == [0.25, 0.5, 0.75, 1.0]  # of 4 pairs each, and the last of 1 for two processes
    for alone, divided in zip(one, two, strict=True):
        assert divided.pop("useful_tokens") <= alone.pop("useful_tokens")  # what process 2 repeats in the last step
        assert divided.pop("tokens_per_second") and alone.pop("tokens_per_second")
        assert divided.pop("loss") == pytest.approx(alone.pop("loss"), abs=1e-5)
        assert divided == pytest.approx(alone, rel=1e-4, abs=1e-5)
    one, two = (json.loads((run_folder / f"evaluated-{count}.json").read_text()) for count in (1, 2))
    assert [line[0] for line in one] == [3, 4]  # at `eval_steps`, and at the end
    assert two == pytest.approx(np.array(one), rel=1e-3, abs=1e-5)
    one, two = (json.loads((run_folder / f"own-steps-{count}.json").read_text()) for count in (1, 2))
    for alone, divided in zip(one, two, strict=True):  # with the losses that are not TRL's
        for name in ("loss", "grad_norm", "rewards/margins"):
            assert divided[name] == pytest.approx(alone[name], rel=1e-5, abs=1e-5)
    one, two = (json.loads((run_folder / f"own-evaluated-{count}.json").read_text()) for count in (1, 2))
    assert two == pytest.approx(np.array(one), rel=1e-3, abs=1e-5)


def test_sharded_gradients_are_those_of_the_whole_model(run_folder):
    run_processes("fully_shard", 2, run_folder)


def test_packed_numbers_that_are_wrong_in_one_process_end_all_with_exit_code_2(run_folder):
    run_processes("agreement", 2, run_folder)
    assert [(run_folder / f"code-{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
