"""Steps of online training: packed rows give the gradients of padded batches, in any number of processes and rows."""

import functools
import json
import math
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from baton import jsonl
from baton.errors import FailuresListed, InputError
from baton.online import checkpoints
from baton.online.arguments import heads_of, scorer_inputs
from baton.online.collect import TAKEN, Collector, HowToSample, rollouts_of, with_samples
from baton.online.engines import Engines
from baton.online.loop import Loop
from baton.online.models import same_tokens
from baton.online.prompts import Prompts
from baton.online.samples import Samples, own_rows, packed
from baton.online.start import evaluate
from baton.pairs import PairSettings
from baton.parallel import DataParallel
from baton.scorers import DEFAULT_RUBRIC
from baton.servers import own
from baton.servers.rewards import Rewards, Scored, request_body
from baton.servers.rollouts import Rollouts, Sampled
from baton.servers.weights import Transfer
from dpo_iteration.online import OnlineDPO
from ppo import losses
from ppo.openrlhf import own_names
from ppo.run_ppo import Arguments, check, critic_of
from tests.models.tiny_models import FAMILIES, VOCABULARY, one_thread
from tests.programs import launch, read_jsonl
from tests.training import online_processes
from tests.training.online_processes import algorithm_of, learner_of, settings
from tests.training.test_resume_layouts import zero

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


LAYOUTS = {"one process": {}, "MULTI_CPU": {}, "ZeRO-2": zero(2), "ZeRO-3": zero(3)}


@pytest.fixture(scope="module")
def steps_of(folder):
    """A function that gives what online_processes.py writes in a layout."""

    @functools.cache
    def run(layout):
        (folder / layout).mkdir()
        count = 1 if layout == "one process" else 2
        codes, errors = launch(count, folder / layout, online_processes.__file__, folder, layout, **LAYOUTS[layout])
        assert set(codes) == {0}, errors[-3000:]
        return torch.load(folder / f"{layout}.pt")

    return run


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_two_processes_take_the_same_steps_as_one(steps_of, layout):
    one, two = steps_of("one process"), steps_of(layout)
    assert two[3] == ("DEEPSPEED" if layout.startswith("ZeRO") else layout)
    for first, second in zip(one[0], two[0], strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert second[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert one[1].keys() == two[1].keys()
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
    asked = []
    learner.factor = lambda update, group: asked.append((update, group)) or 1.0
    algorithm = algorithm_of(folder, learner, freezing_actor_steps=1, prompts_per_update=3)
    algorithm.step(records, Samples.of(records), 1)
    for name, weight in learner.models.named_parameters():
        assert weight.equal(before[name]) == name.startswith("actor."), name
    algorithm.step(records, Samples.of(records), 2)
    assert not any(weight.equal(before[name]) for name, weight in learner.models.named_parameters())
    # Two updates a step: the actor's schedule begins when the actor does.
    assert asked == [(0, 1), (1, 1), (0, 0), (2, 1), (1, 0), (3, 1)]


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


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_online_dpo_begins_at_the_reference_whatever_the_temperature_of_the_sampling(folder, records, temperature):
    learner = learner_of(folder, critic=False)
    learner.models.temperature = temperature
    reference = algorithm_of(folder, learner, "model").reference
    how = SimpleNamespace(beta=0.1, loss_type="sigmoid", nll_coef=0.0, pairs_per_update=None, seed=1)
    different = [{**record, "responses": list("abc")} for record in records]
    metrics = OnlineDPO(how, PairSettings(), learner, reference).step(different, Samples.of(different), 1)
    assert metrics["pairs"] == PROMPTS
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-5) and metrics["kl_on_pairs"] == pytest.approx(0, abs=1e-4)


def test_a_death_between_a_checkpoint_and_its_line_loses_neither_the_line_nor_the_evaluation(folder, tmp_path):
    learner, path, evaluated = learner_of(folder, critic=False), tmp_path / "metrics.jsonl", []

    def evaluate(step):
        evaluated.append(step)
        return {"reward": 0.5}

    def run():
        loop = Loop(
            learner=learner, algorithm=SimpleNamespace(load=lambda state: None), folder=tmp_path, metrics_path=path,
            engines=SimpleNamespace(take=lambda weights, version, last: bool(list(weights))), collector=None, total_steps=4,
            save_steps=2, eval_steps=2, staleness=0, shares_gpus=False, evaluate=evaluate, warn=None,
        )  # fmt: skip
        return loop.run()

    checkpoints.save(learner, tmp_path, 4, {"taken": 8, "algorithm": {}, "metrics": {"loss": 2.0}})
    assert run() == run() == {"loss": 2.0, "eval/reward": 0.5}
    assert evaluated == [4] and [line["step"] for line in read_jsonl(path)] == [4]


def arguments_of(folder, **changes):
    rule = f"function:{Path(__file__).with_name('online_rewards.py')}:even"
    known = {"dataset_name_or_path": "prompts.jsonl", "output_dir": "policy", "scorer": [rule]}
    return Arguments(**{"model_name_or_path": str(folder / "model"), **known, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_target": 6.0, "kl_coef": 0.0}, "`kl_target` with `kl_coef: 0`"),
        ({"min_new_tokens": 4, "correction_clip": 2.0}, "at least 4 tokens"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "`min_new_tokens`: 9 is above `max_new_tokens`, 8"),
        ({"scorer": [], "reward_url": ["http://me:hush@127.0.0.1:1/get_reward"]}, "`reward_url`: an address with a user"),
        ({"scorer": [], "reward_url": ["127.0.0.1:5000"]}, "begins with http://"),
        ({"scorer": ["http:http://127.0.0.1:1/?api_key=hush"]}, "`scorer`: `api_key` in an address"),
        ({"reward_args": "--scorer_api_key hush"}, "`reward_args`: --scorer_api_key would be shown"),
    ],
)
def test_settings_that_would_do_nothing_or_show_a_secret_are_refused(folder, changes, message):
    with pytest.raises(InputError) as refusal:
        check(arguments_of(folder, **changes))
    assert message in str(refusal.value) and "hush" not in str(refusal.value)


def test_openrlhfs_batch_of_samples_needs_the_samples_of_a_prompt():
    assert own_names({"train_batch_size": "128", "n_samples_per_prompt": 4}) == {"K": 4, "prompts_per_update": 32}
    with pytest.raises(InputError, match="`train_batch_size` counts samples"):
        own_names({"train_batch_size": 128})  # K may stand in the other source, and has another default here


def classifier(folder, *outputs):
    """A folder with the configuration of a sequence classifier with these outputs, and empty files of the rest."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForSequenceClassification"],
        "num_labels": len(outputs),
        "id2label": dict(enumerate(outputs)),
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).touch()
    return folder


def test_what_reward_args_say_of_a_models_outputs_counts_and_other_kinds_of_models_are_refused(folder, tmp_path):
    several, one = classifier(tmp_path / "several", "help", "brief"), classifier(tmp_path / "one", "LABEL_0")
    given = arguments_of(folder, scorer=[f"bt:{several}"], reward_args="--heads help brief=0.5 --dtype float32")
    check(given)
    assert heads_of(given) == ["help", "brief=0.5"] and critic_of(given) == given.model_name_or_path
    assert critic_of(arguments_of(folder, scorer=[f"bt:{one}"])) == str(one)
    for scorer, message in ((f"bt:{several}", "say with --heads"), (f"process:{one}", "not a process reward model")):
        with pytest.raises(InputError, match=message):
            check(arguments_of(folder, scorer=[scorer]))


def test_a_judges_rubric_and_other_files_of_the_rewards_count_by_their_content(folder, tmp_path):
    judge = {"scorer": ["tone=judge:http://127.0.0.1:1/v1"]}
    assert scorer_inputs(arguments_of(folder, **judge)) == {"scorer tone: rubric": DEFAULT_RUBRIC} and DEFAULT_RUBRIC.is_file()
    rubric, template = tmp_path / "lr=1e-6.txt", tmp_path / "chat.jinja"
    rubric.write_text("Is it kind?")
    template.write_text("")
    words = f"--judge_model small --rubric {rubric} --chat_template={template}"
    found = scorer_inputs(arguments_of(folder, **judge, reward_args=words))
    assert found == {"scorer tone: rubric": rubric, "chat template of the rewards": template}
    with pytest.raises(InputError, match=r"--rubric .*nowhere.txt: no such file"):
        scorer_inputs(arguments_of(folder, **judge, reward_args="--rubric nowhere.txt"))


def test_a_functions_file_and_those_that_it_imports_count_by_their_content(folder, tmp_path):
    rules, beside = tmp_path / "rules.py", tmp_path / "beside.py"
    rules.write_text("import beside\ndef brevity(prompts, responses, records): ...\n")
    beside.write_text("")
    given = arguments_of(folder, scorer=[f"brief=function:{rules}:brevity"])
    check(given)
    assert scorer_inputs(given) == {"scorer brief": rules, "scorer brief: beside.py": beside}
    with pytest.raises(InputError, match="defines no function brevty, only: brevity"):
        check(arguments_of(folder, scorer=[f"function:{rules}:brevty"]))


def test_a_merged_adapter_keeps_what_it_learnt(folder):
    assert arguments_of(folder, use_peft=True).export_dtype == "float32"
    assert arguments_of(folder).export_dtype == arguments_of(folder, use_peft=True, export_dtype="checkpoint").export_dtype


def test_a_reward_model_may_have_more_tokens_than_the_policy_but_no_others():
    policy, padded, other = (
        SimpleNamespace(get_vocab=dict(vocabulary).copy)
        for vocabulary in ({"a": 0, "b": 1}, {"a": 0, "b": 1, "<pad>": 2}, {"a": 1, "b": 0})
    )
    assert same_tokens(policy, padded) is None
    assert same_tokens(padded, policy) == "token '<pad>' is 2 and None" and "'a' is 0 and 1" in same_tokens(policy, other)


def test_a_checkpoint_of_zero_says_with_what_it_goes_on(folder, tmp_path):
    learner = learner_of(folder, critic=False)
    learner.updates, learner.frozen_updates = 5, 2
    checkpoints.save(learner, tmp_path, 3, {"taken": 4})
    learner.updates = learner.frozen_updates = 0
    assert checkpoints.load(learner, tmp_path)["taken"] == 4
    assert (learner.updates, learner.frozen_updates) == (5, 2)
    file = tmp_path / "checkpoint-3" / checkpoints.STATE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"spread": "under ZeRO-2 in 2 processes"}))
    with pytest.raises(InputError, match="written under ZeRO-2 in 2 processes, and this run is without ZeRO and FSDP"):
        checkpoints.load(learner, tmp_path)


def test_a_checkpoint_is_on_the_disk_before_the_older_one_is_deleted(folder, tmp_path, monkeypatch):
    synced, older = set(), tmp_path / "checkpoint-1"
    older.mkdir()
    monkeypatch.setattr(os, "fsync", lambda number: older.exists() and synced.add(os.fstat(number).st_ino))
    checkpoints.save(learner_of(folder, critic=False), tmp_path, 2, {})
    files = [path for path in (tmp_path / "checkpoint-2").rglob("*") if path.is_file()]
    assert len(files) > 2 and {path.stat().st_ino for path in files} <= synced and not older.exists()


class Mute(BaseHTTPRequestHandler):
    """A server that names a model and never answers a request for responses."""

    def do_GET(self):
        body = json.dumps({"data": [{"id": "model", "max_model_len": 99}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.server.asked.set()
        time.sleep(30)


def test_what_ends_a_training_does_not_wait_for_rollouts(folder, tmp_path):
    class Interrupted:
        """Ctrl-C while a step trains, when the servers have been asked for the next one."""

        def step(self, records, samples, step):
            server.asked.wait(10)
            raise KeyboardInterrupt

    with ThreadingHTTPServer(("127.0.0.1", 0), Mute) as server:
        server.asked, server.daemon_threads, server.block_on_close = threading.Event(), True, False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Rollouts([f"http://127.0.0.1:{server.server_port}"], None) as rollouts:
            prompts = Prompts([{"record": '{"id": "1", "prompt": "Hello"}', "prompt_token_ids": [1]}], 0)
            jsonl.write(tmp_path / "rollouts/step000001.jsonl", [{**rollout(random.Random(0), 0), TAKEN: 1}])
            how = HowToSample(1, 1, {"max_tokens": 8}, seed=0)
            loop = Loop(
                learner=learner_of(folder, critic=False), algorithm=Interrupted(), folder=tmp_path,
                metrics_path=tmp_path / "metrics.jsonl", total_steps=2, save_steps=1, eval_steps=1, staleness=1,
                engines=SimpleNamespace(take=lambda weights, version, last: bool(list(weights))),
                collector=Collector(tmp_path / "rollouts", prompts, rollouts, Rewards([]), how), shares_gpus=False,
                evaluate=None, warn=None,
            )  # fmt: skip
            rollouts.servers.is_usable = None  # it knows no versions of weights
            begun = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                loop.run()
            assert server.asked.is_set() and time.monotonic() - begun < 8
        server.shutdown()


class Hanging(Mute):
    """A reward service that answers nobody until the test is over."""

    def do_POST(self):
        self.server.asked.set()
        self.server.over.wait(30)


@pytest.mark.parametrize("url", ["hanging", "http://127.0.0.1:9/nobody"])
def test_what_ends_a_training_does_not_wait_for_rewards(folder, tmp_path, url):
    """Neither for one that does not come, nor for the next try where nobody is there."""

    class Interrupted:
        def step(self, records, samples, step):
            server.asked.wait(2)
            raise KeyboardInterrupt

    with ThreadingHTTPServer(("127.0.0.1", 0), Hanging) as server:
        server.asked, server.over, server.block_on_close = threading.Event(), threading.Event(), False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        rewards = Rewards([f"http://127.0.0.1:{server.server_port}" if url == "hanging" else url], tries=20)
        asked = Asked(None)
        asked.cancel = lambda: None
        prompts = Prompts([{"record": '{"id": "1", "prompt": "Hello"}', "prompt_token_ids": [1]}], 0)
        jsonl.write(tmp_path / "rollouts/step000001.jsonl", [{**rollout(random.Random(0), 0), TAKEN: 1}])
        loop = Loop(
            learner=learner_of(folder, critic=False), algorithm=Interrupted(), folder=tmp_path,
            metrics_path=tmp_path / "metrics.jsonl", total_steps=2, save_steps=1, eval_steps=1, staleness=1,
            engines=SimpleNamespace(take=lambda weights, version, last: bool(list(weights))),
            collector=Collector(tmp_path / "rollouts", prompts, asked, rewards, HowToSample(1, 1, {}, seed=0)),
            shares_gpus=False, evaluate=None, warn=None,
        )  # fmt: skip
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            loop.run()
        assert asked.seeds and time.monotonic() - begun < 10
        server.over.set()
        server.shutdown()


def test_rollouts_ahead_whose_servers_die_are_sampled_from_the_next_weights(folder, tmp_path):
    """With a staleness of 1, the servers die while they sample step 2 and step 1 trains."""

    class Dying:
        """In the place of a collector: its first call for step 2 finds no server."""

        def __init__(self):
            self.asked = []

        def collect(self, step, taken, version):
            self.asked.append((step, taken, version))
            if step == 2 and version == 0:
                raise FailuresListed("no server is alive")
            jsonl.write(tmp_path / f"rollouts/step{step:06}.jsonl", [{**rollout(random.Random(0), 0), TAKEN: step}])
            return {}

    class Nothing:
        def step(self, records, samples, step):
            return {"loss": 0.0}

        def state(self):
            return {}

    learner, collector, sent = learner_of(folder, critic=False), Dying(), []
    engines = SimpleNamespace(
        take=lambda weights, version, last: sent.append((version, len(list(weights)) > 0)) or True, restart_dead=lambda: True
    )
    Loop(
        learner=learner, algorithm=Nothing(), folder=tmp_path, metrics_path=tmp_path / "metrics.jsonl", engines=engines,
        collector=collector, total_steps=3, save_steps=9, eval_steps=9, staleness=1, shares_gpus=False, evaluate=None,
        warn=lambda *_: None,
    ).run()  # fmt: skip
    assert collector.asked == [(1, 0, 0), (2, 1, 0), (2, 1, 1), (3, 2, 1)]
    assert sent == [(0, True), (1, True), (2, True)]


class Asked:
    """In the place of servers, notes the seeds and gives one response each; in that of a service, gives `scored`."""

    def __init__(self, scored):
        self.seeds, self.scored = [], scored

    def sample(self, prompts, n, sampling, seeds, version):
        self.seeds += seeds
        return ((place, Sampled([[1]], ["stop"], [[0.0]], ["text"])) for place in range(len(prompts)))

    def score(self, record):
        return self.scored


def test_a_prompt_that_comes_twice_in_a_step_is_sampled_with_two_seeds_and_asked_again_where_that_may_help(tmp_path):
    dataset = [{"record": '{"id": "only one", "prompt": "Hello"}', "prompt_token_ids": [1]}]
    for _ in range(2):
        asked = Asked(Scored(None, {}, "no answer", again=True))
        collector = Collector(tmp_path, Prompts(dataset, 0), asked, asked, HowToSample(2, 1, {}, seed=0))
        with pytest.raises(FailuresListed, match="none can be trained on: no answer"):
            collector.collect(1, 0, 0)
        assert len(set(asked.seeds)) == 2


class SlowFor(BaseHTTPRequestHandler):
    """A reward service that gives up on prompts that begin with "slow"."""

    def do_POST(self):
        prompts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompts"]
        slow = prompts[0].startswith("slow")
        body = b'{"detail": "took longer than 60 s"}' if slow else json.dumps({"rewards": [1.0] * len(prompts)}).encode()
        self.send_response(408 if slow else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing on the test's terminal."""


def test_prompts_whose_rewards_take_too_long_are_left_out_of_their_step(tmp_path, caplog):
    names = ["slow 1", "slow 2", "slow 3", "slow 4", "quick"]
    dataset = [{"record": json.dumps({"id": name, "prompt": name}), "prompt_token_ids": [1]} for name in names]
    with ThreadingHTTPServer(("127.0.0.1", 0), SlowFor) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        rewards = Rewards([f"http://127.0.0.1:{server.server_port}"], tries=1)
        Collector(tmp_path, Prompts(dataset, 0), Asked(None), rewards, HowToSample(5, 1, {}, seed=0)).collect(1, 0, 0)
        server.shutdown()
    assert [record["id"] for record in rollouts_of(tmp_path, 1)] == ["quick"]
    assert "left out, 4 of 5 prompts" in caplog.text and "took longer than 60 s" in caplog.text


def test_a_step_in_which_all_rewards_are_equal_does_not_end_a_training_that_draws_others_for_such_prompts(tmp_path):
    dataset = [{"record": f'{{"id": "{number}", "prompt": "Hello"}}', "prompt_token_ids": [1]} for number in range(9)]
    asked = Asked(Scored([1.0], {}))
    counts = Collector(tmp_path, Prompts(dataset, 0), asked, asked, HowToSample(2, 1, {}, seed=0, most_drawn=5)).collect(
        1, 0, 0
    )
    assert (counts["prompts_drawn"], counts["prompts_left_out"]) == (5.0, 3.0)
    assert [record[TAKEN] for record in rollouts_of(tmp_path, 1)] == [5, 5]


def test_a_death_while_rollouts_are_written_costs_none_of_them(tmp_path, monkeypatch):
    dataset = [{"record": f'{{"id": "{number}", "prompt": "Hello"}}', "prompt_token_ids": [1]} for number in range(2)]
    first, second = Asked(Scored([1.0], {})), Asked(Scored([1.0], {}))
    collectors = [Collector(tmp_path, Prompts(dataset, 0), of, of, HowToSample(2, 1, {}, seed=0)) for of in (first, second)]
    with monkeypatch.context() as death, pytest.raises(KeyboardInterrupt):
        death.setattr(jsonl, "dump", Mock(side_effect=KeyboardInterrupt))
        collectors[0].collect(1, 0, 0)
    collectors[1].collect(1, 0, 0)
    assert len(first.seeds) == 2 and not second.seeds
    assert len(list(rollouts_of(tmp_path, 1))) == 2 and len(list(tmp_path.iterdir())) == 1


def test_a_server_of_our_own_that_died_stops_no_change_of_turns_but_one_that_lives_and_fails_does(monkeypatch, tmp_path):
    monkeypatch.setenv("BATON_SERVERS", str(tmp_path))
    server = own.OwnServer(own.Wanted("a model", ()), port=9, starter=None)  # nothing listens there
    with closing(Transfer([server.url], None)) as transfer:
        Engines(None, None, transfer, [server], None).wake()
        with pytest.raises(FailuresListed, match="/sleep"):
            Engines(None, None, transfer, [], None).sleep()


def test_a_sample_is_kept_as_arrays_and_loses_nothing_on_disk():
    logps = torch.randn(50, generator=torch.Generator().manual_seed(0)).tolist()  # float32, as the servers compute them
    record = with_samples({"id": "1"}, Sampled([list(range(50))], ["stop"], [logps], ["text"]), 3)
    assert record["response_logps"][0].nbytes == record["response_token_ids"][0].nbytes == 200
    line = jsonl.dump(record)
    read = json.loads(line)
    assert torch.tensor(read["response_logps"]).equal(torch.tensor([logps])) and read["weight_versions"] == [3]
    assert read["response_token_ids"] == [list(range(50))]
    assert len(line) < 0.7 * len(jsonl.dump(record | {"response_logps": [logps]}))
    sent = request_body({**record, "prompt": "Hello", "prompt_token_ids": [1], "label": 7}, "")
    assert sent["records"] == [{"id": "1", "finish_reasons": ["stop"], "label": 7}]


def test_what_ends_a_step_ends_the_rewards_that_have_not_begun(tmp_path):
    class Ending(Asked):
        def sample(self, prompts, n, sampling, seeds, version):
            yield from super().sample(prompts, n, sampling, seeds, version)
            raise FailuresListed("no server is alive")

        def score(self, record):
            self.seen.append(record["id"])
            time.sleep(0.05)
            return self.scored

    asked = Ending(Scored([1.0], {}))
    asked.seen = []
    dataset = [{"record": f'{{"id": "{number}", "prompt": "Hello"}}', "prompt_token_ids": [1]} for number in range(99)]
    with pytest.raises(FailuresListed, match="no server is alive"):
        Collector(tmp_path, Prompts(dataset, 0), asked, asked, HowToSample(99, 1, {}, seed=0)).collect(1, 0, 0)
    assert len(asked.seen) < 50


def test_a_server_that_dies_of_each_try_at_a_step_is_not_started_anew_for_ever(folder):
    class Dying:
        tries = 0

        def collect(self, step, taken, version):
            self.tries += 1
            raise FailuresListed("no server is alive")

    engines = SimpleNamespace(restart_dead=lambda: True, take=lambda weights, version, last: bool(list(weights)))
    loop = Loop(
        learner=learner_of(folder, critic=False), algorithm=None, folder=None, metrics_path=None, engines=engines,
        collector=Dying(), total_steps=1, save_steps=1, eval_steps=1, staleness=0, shares_gpus=False, evaluate=None, warn=None,
    )  # fmt: skip
    with ThreadPoolExecutor(1) as background, pytest.raises(FailuresListed, match="no server is alive"):
        loop._collected(background, loop._collect(background, 1, 0, 0), 1, 0, 0)
    assert loop.collector.tries == 4


def test_an_evaluation_goes_on_with_new_servers_where_one_dies(folder, tmp_path):
    tried, sent = [], []

    def evaluate(step):
        tried.append(step)
        if len(tried) == 1:
            raise FailuresListed("no server is alive")
        return {"reward": 0.5}

    engines = SimpleNamespace(
        restart_dead=lambda: True, take=lambda weights, version, last: sent.append((version, last)) or bool(list(weights))
    )
    loop = Loop(
        learner=learner_of(folder, critic=False), algorithm=None, folder=None, metrics_path=None, engines=engines,
        collector=None, total_steps=4, save_steps=1, eval_steps=2, staleness=0, shares_gpus=False, evaluate=evaluate, warn=None,
    )  # fmt: skip
    assert loop._evaluate(2) == {"eval/reward": 0.5}
    assert tried == [2, 2] and sent == [(2, True)]


def test_held_out_prompts_without_a_reward_are_counted(tmp_path, caplog):
    class Picky(Asked):
        def score(self, record):
            return Scored([1.0], {}) if record["id"] == "2" else Scored(None, {}, "refused by the service, status 422")

    asked = Picky(None)
    held_out = [{"id": str(number), "prompt": "Hello", "prompt_token_ids": [1]} for number in range(3)]
    collector = Collector(tmp_path, None, asked, asked, HowToSample(3, 1, {}, seed=0))
    assert evaluate(collector, held_out, 4) == {"reward": 1.0, "length": 1.0, "without_reward": 2.0}
    assert "without a reward, 2 of 3 held-out prompts: refused by the service, status 422 (prompt 0)" in caplog.text
    assert evaluate(collector, held_out[2:], 5) == {"reward": 1.0, "length": 1.0}


def test_servers_that_share_the_gpus_sleep_while_a_checkpoint_is_loaded(folder, tmp_path, monkeypatch):
    learner, order, load = learner_of(folder, critic=False), [], checkpoints.load
    checkpoints.save(learner, tmp_path, 4, {"taken": 8, "algorithm": {}, "metrics": {}})
    monkeypatch.setattr(checkpoints, "load", lambda *of: order.append("load") or load(*of))
    engines = SimpleNamespace(
        sleep=lambda: order.append("sleep"), wake=lambda: order.append("wake"),
        take=lambda weights, version, last: order.append("weights") or bool(list(weights)),
    )  # fmt: skip
    Loop(
        learner=learner, algorithm=SimpleNamespace(load=lambda state: None), folder=tmp_path,
        metrics_path=tmp_path / "metrics.jsonl", engines=engines, collector=None, total_steps=4, save_steps=2, eval_steps=2,
        staleness=0, shares_gpus=True, evaluate=None, warn=None,
    ).run()  # fmt: skip
    assert order == ["sleep", "load", "wake", "weights"]


def test_an_optimizer_leaves_the_gpu_but_for_its_numbers_of_steps_which_never_were_there(folder, records):
    learner = learner_of(folder, critic=False)
    algorithm_of(folder, learner, advantage_estimator="rloo").step(records, Samples.of(records), 1)
    learner.move_optimizer("meta")
    states = list(learner.optimizer.state.values())
    assert states and all(state["exp_avg"].is_meta and state["exp_avg_sq"].is_meta for state in states)
    assert all(state["step"].item() == 1 for state in states)


def learner_size():
    from baton.training.dealing import ModelSize

    return ModelSize(10_000, 2_000, 96)
