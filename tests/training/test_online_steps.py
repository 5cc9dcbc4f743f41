"""Steps of online training: packed rows give the gradients of padded batches, in any number of processes and rows."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from baton.online.samples import Samples, own_rows, packed
from baton.parallel import DataParallel
from ppo import losses
from tests.models.tiny_models import FAMILIES, VOCABULARY, one_thread
from tests.training import online_processes
from tests.training.online_processes import algorithm_of, learner_of, settings

__all__ = ["one_thread"]  # a fixture

PROMPTS, K = 5, 3


def rollout(generator: random.Random, number: int) -> dict:
    """A record as the collector writes it; two of its responses are equal."""
    responses = [[generator.randrange(3, VOCABULARY) for _ in range(generator.randrange(1, 12))] for _ in range(K)]
    responses[-1] = responses[0]
    return {
        "id": str(number),
        "prompt": f"prompt {number}",
        "prompt_token_ids": [generator.randrange(3, VOCABULARY) for _ in range(generator.randrange(1, 20))],
        "responses": ["text"] * K,
        "response_token_ids": responses,
        "response_logps": [[-generator.random() - 3 for _ in ids] for ids in responses],
        "finish_reasons": [generator.choice(["stop", "length"]) for _ in range(K)],
        "rewards": [generator.uniform(-1, 1) for _ in range(K)],
        "weight_versions": [0] * K,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`model/`, `reference/`, `critic/` of random weights, and `records.json`."""
    folder = tmp_path_factory.mktemp("online")
    generator = random.Random(0)
    records = [rollout(generator, number) for number in range(PROMPTS)]
    (folder / "records.json").write_text(json.dumps(records))
    for seed, name in enumerate(["model", "reference"]):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(FAMILIES["llama"]).save_pretrained(folder / name)
    torch.manual_seed(2)
    FAMILIES["llama"].num_labels = 1
    critic = AutoModelForSequenceClassification.from_config(FAMILIES["llama"])
    torch.nn.init.normal_(critic.score.weight, std=0.3)
    critic.save_pretrained(folder / "critic")
    return folder


@pytest.fixture(scope="module")
def records(folder):
    return json.loads((folder / "records.json").read_text())


def plain_sgd(models):
    groups = [{"params": list(m.parameters()), "lr": 1.0, "initial_lr": 1.0} for m in (models.actor, models.critic) if m]
    return torch.optim.SGD(groups)


def padded_scores(folder, records):
    """The models' own forward passes on a padded batch: log-probabilities and values of response tokens, (B, T)."""
    actor, critic = (
        made.from_pretrained(folder / name, dtype=torch.float32, attn_implementation="eager")
        for made, name in ((AutoModelForCausalLM, "model"), (AutoModelForSequenceClassification, "critic"))
    )
    samples = [(record["prompt_token_ids"], ids) for record in records for ids in record["response_token_ids"]]
    batch = pad_sequence([torch.tensor([*prompt, *ids]) for prompt, ids in samples], batch_first=True)
    hidden = critic.model(input_ids=batch).last_hidden_state
    every = actor(input_ids=batch).logits.log_softmax(-1)
    logps, values = [], []
    for number, (prompt, ids) in enumerate(samples):
        at = torch.arange(len(prompt) - 1, len(prompt) + len(ids) - 1)
        logps.append(every[number, at, ids])
        values.append(critic.score(hidden[number, at])[:, 0])
    return actor, critic, pad_sequence(logps, batch_first=True), pad_sequence(values, batch_first=True)


@pytest.mark.parametrize(
    "changes",
    [{}, {"loss_mean": "responses", "entropy_coef": 0.0, "correction_clip": 1.5}, {"kl_in_loss": True, "kl_estimator": "k3"}],
    ids=["tokens", "responses corrected", "kl in the loss"],
)
def test_an_update_has_the_gradients_of_padded_batches_and_autograd(folder, records, changes):
    learner = learner_of(folder, optimizer=plain_sgd)
    learner.max_grad_norm = 0.0
    before = {name: weight.detach().clone() for name, weight in learner.models.named_parameters()}
    algorithm = algorithm_of(folder, learner, **changes)
    samples = Samples.of(records)
    algorithm.add_columns(samples)
    algorithm.add_advantages(samples, samples.scores)
    metrics = algorithm.update(samples, range(PROMPTS), step=1)

    actor, critic, logps, values = padded_scores(folder, records)
    mask, columns, how = samples.mask, samples.columns, settings(**changes)
    torch.testing.assert_close(columns["old_values"][mask], values.detach()[mask], rtol=1e-4, atol=1e-5)
    each, _ = losses.policy_loss(logps, logps.detach(), columns["advantages"], 0.2, 0.2)
    if how.correction_clip:
        each = each * (logps.detach() - columns["sampler_logps"]).exp().clamp(max=how.correction_clip)
    weights = mask / mask.sum()
    if how.loss_mean == "responses":
        weights = mask / mask.sum(dim=1, keepdim=True) / len(mask)
    wanted = (each * weights).sum()
    if how.kl_in_loss:
        wanted = wanted + how.kl_coef * (losses.kl_estimate(logps, columns["ref_logps"], "k3") * weights).sum()
    of_values = 0.5 * (values - columns["returns"]) ** 2
    wanted = wanted + (of_values * mask).sum() / mask.sum()
    wanted.backward()
    assert metrics["loss"] == pytest.approx(wanted.item(), rel=1e-4, abs=1e-6)
    own = {
        f"{part}.{name}": p for part, model in (("actor", actor), ("critic", critic)) for name, p in model.named_parameters()
    }
    for name, weight in learner.models.named_parameters():
        torch.testing.assert_close(before[name] - weight, own[name].grad, rtol=1e-3, atol=2e-6, msg=name)


def test_two_processes_take_the_same_steps_as_one(folder):
    program = Path(online_processes.__file__)
    for processes in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
        done = subprocess.run([sys.executable, *launch, str(program), str(folder)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(folder / f"steps-{processes}.pt") for processes in (1, 2))
    for first, second in zip(one[0], two[0], strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert second[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for name, weight in one[1].items():
        torch.testing.assert_close(two[1][name], weight, rtol=1e-4, atol=1e-5, msg=name)
    assert two[2]["kl"]["coefficient"] == pytest.approx(one[2]["kl"]["coefficient"], rel=1e-5)


def test_rows_of_all_processes_hold_each_group_once_and_are_equally_many(records):
    samples = Samples.of(records)
    size = learner_size()
    for processes in (1, 2, 4, 8):
        rows = [own_rows(samples, range(PROMPTS), size, 60, DataParallel(rank, processes)) for rank in range(processes)]
        assert len(set(map(len, rows))) == 1
        assert sorted(group for own in rows for row in own for group in row) == list(range(PROMPTS))


def test_equal_responses_share_their_tokens_and_keep_their_own_numbers(records):
    samples = Samples.of(records)
    row = packed(samples, [0])
    first, last = len(samples.responses[0]), len(samples.responses[K - 1])
    assert row.index[:first].tolist() == row.index[-last:].tolist()
    assert len(row.index) == sum(len(samples.responses[sample]) for sample in row.samples) > len(row.row.targets)
    column = row.column(samples.columns["sampler_logps"], samples.mask)
    assert column.tolist() == pytest.approx([logp for logps in records[0]["response_logps"] for logp in logps])


def test_a_frozen_actor_stays_while_the_critic_learns(folder, records):
    learner = learner_of(folder)
    before = {name: weight.detach().clone() for name, weight in learner.models.named_parameters()}
    learner.factor = lambda update, group: float(group == 1)
    algorithm = algorithm_of(folder, learner, freezing_actor_steps=1)
    algorithm.step(records, Samples.of(records), 1)
    for name, weight in learner.models.named_parameters():
        assert weight.equal(before[name]) == name.startswith("actor."), name


@pytest.mark.parametrize("estimator", ["reinforce++", "rloo", "grpo", "dr_grpo"])
def test_methods_without_a_critic_raise_the_probability_of_what_was_rewarded(folder, records, estimator):
    learner = learner_of(folder, critic=False)
    changes = {"advantage_estimator": estimator, "whiten_advantages": estimator == "reinforce++", "kl_coef": 0.0}
    algorithm = algorithm_of(folder, learner, **changes)

    def weighted():
        samples = Samples.of(records)
        logps = learner.own_scores(samples, of_actor=True)["logps"]
        means = (logps * samples.mask).sum(dim=1) / samples.lengths
        centred = samples.scores - samples.scores.view(PROMPTS, K).mean(dim=1).repeat_interleave(K)
        return float((means * centred).sum())

    before = weighted()
    for step in (1, 2, 3):
        metrics = algorithm.step(records, Samples.of(records), step)
        assert all(map(math.isfinite, metrics.values())), metrics
    assert weighted() > before


def learner_size():
    from baton.training.dealing import ModelSize

    return ModelSize(10_000, 2_000, 96)
