"""Online training on real vLLM servers: what is trained is what samples, and a death anywhere costs nothing but time."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from baton.servers import own, processes
from tests.programs import read_jsonl, run_program, start

REWARD = f"function:{Path(__file__).with_name('online_rewards.py')}:even"
STEPS = 3
SIZES = {
    "rollout_batch_size": 6, "K": 3, "max_prompt_length": 64, "max_new_tokens": 16, "total_steps": STEPS,
    "learning_rate": 2e-3, "gradient_checkpointing": "false", "save_steps": 1, "prompts_per_update": 3, "num_ppo_epochs": 2,
    "critic_learning_rate": 2e-3, "server_dtype": "float32", "reproducible": "true", "staleness": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def engines(task, tmp_path_factory):
    """Words that name a vLLM server of `base` and a reward server, both of which all tests share."""
    settings = {
        "dtype": "float32", "max_model_len": 80, "logprobs_mode": "processed_logprobs", "max_num_seqs": 1,
        "enable_prefix_caching": False,
    }  # fmt: skip
    policy = own.policy_servers(task / "base", [[]], settings, weights=True, api_key="key")
    reward = own.reward_server(["--scorer", REWARD])
    before = os.environ.get("BATON_SERVERS")
    with own.running([*policy, reward], tmp_path_factory.mktemp("servers") / "own") as servers:
        yield ["--vllm_url", servers[0].url, "--vllm_api_key", "key", "--reward_url", f"{servers[1].url}/get_reward"]
    os.environ.pop("BATON_SERVERS") if before is None else os.environ.update(BATON_SERVERS=before)


def words_of(program, task, output, more=(), **changes):
    """The words of an online program on the task's prompts."""
    settings = {name: value for name, value in {**SIZES, **changes}.items() if value is not None}
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    data = ["--model_name_or_path", task / "base", "--dataset_name_or_path", task / "data/prompts_round1.jsonl"]
    return [program, *data, "--output_dir", output, *flags, *more]


@pytest.fixture(scope="module")
def uninterrupted(task, engines, tmp_path_factory):
    """The folder of a finished PPO run, with what it said."""
    output = tmp_path_factory.mktemp("ppo") / "policy"
    held_out = ["--eval_dataset", task / "data/heldout.jsonl", "--eval_steps", "2", "--save_critic"]
    done = run_program(*words_of("ppo/run_ppo.py", task, output, [*engines, *held_out]))
    assert done.returncode == 0, done.stderr
    return output, done.stderr


def test_what_samples_is_what_was_trained_in_every_step(uninterrupted):
    output, _ = uninterrupted
    lines = read_jsonl(f"{output}.metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    # The policy moves, and the servers with it: embedding and head of this model are one tensor.
    assert all(line["kl_to_sampler"] < 1e-4 for line in steps) and steps[-1]["kl"] > 0.01
    assert [line["step"] for line in lines if "eval/reward" in line] == [0, 2, 3]
    assert len(read_jsonl(f"{output}.heldout/step000002.jsonl")) == 8


def test_rollouts_are_records_that_every_stage_reads(uninterrupted):
    output, _ = uninterrupted
    for step in range(1, STEPS + 1):
        records = read_jsonl(f"{output}.rollouts/step{step:06}.jsonl")
        assert len(records) == SIZES["rollout_batch_size"]
        for record in records:
            assert record["weight_versions"] == [step - 1] * SIZES["K"]
            for name in ("responses", "rewards", "response_token_ids", "response_logps", "finish_reasons"):
                assert len(record[name]) == SIZES["K"]
    pairs = run_program("annotate_data/post_process.py", "--help")
    assert pairs.returncode == 0


def test_the_policy_and_the_critic_are_plain_folders(uninterrupted, task):
    output, said = uninterrupted
    before, after = (load_file(folder / "model.safetensors") for folder in (task / "base", output))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert "score.weight" in load_file(output / "critic/model.safetensors")
    assert (output / "tokenizer.json").exists() and not list(output.glob("*checkpoint*"))
    assert "48 in, 48 out" in said


def test_a_finished_run_is_up_to_date(uninterrupted, task, engines):
    held_out = ["--eval_dataset", task / "data/heldout.jsonl", "--eval_steps", "2", "--save_critic"]
    done = run_program(*words_of("ppo/run_ppo.py", task, uninterrupted[0], [*engines, *held_out]))
    assert done.returncode == 0 and "up to date" in done.stderr


def test_a_run_that_was_killed_ends_with_the_same_weights_to_the_bit(uninterrupted, task, engines, tmp_path):
    whole, _ = uninterrupted
    output = tmp_path / "policy"
    words = words_of("ppo/run_ppo.py", task, output, engines)
    process = start(*words, output=tmp_path)
    wait_for((tmp_path / "policy.partial/checkpoint-1").exists, process, tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    again = run_program(*words)
    assert again.returncode == 0, again.stderr
    assert "going on from" in again.stderr
    for step in range(1, STEPS + 1):
        ours, theirs = (read_jsonl(f"{of}.rollouts/step{step:06}.jsonl") for of in (output, whole))
        assert [record["response_token_ids"] for record in ours] == [record["response_token_ids"] for record in theirs]
    ours, theirs = (load_file(of / "model.safetensors") for of in (output, whole))
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name


def test_online_dpo_learns_from_pairs_and_servers_that_die_are_started_anew(task, tmp_path):
    """One of two policy servers dies when it has half of the first step's weights, and the reward server with it."""
    output = tmp_path / "policy"
    words = words_of(
        "dpo_iteration/run_online_dpo.py", task, output, ["--scorer", REWARD], K=4, prompts_per_update=None,
        num_ppo_epochs=None, critic_learning_rate=None, total_steps=3, pairs_per_update=3,
        num_servers=2, reproducible="false", sync_megabytes=0.01,
    )  # fmt: skip
    process = start(*words, output=tmp_path, env={**os.environ, "REWARD_API_KEY": "of another service"})
    folder = tmp_path / "policy.servers"
    wait_for((tmp_path / "policy.partial/rollouts/step000001.jsonl").exists, process, tmp_path)
    os.environ["BATON_SERVERS"], before = str(folder), os.environ.get("BATON_SERVERS")
    policies, rewards = [], []
    for server in processes.known():
        (policies if str(task / "base") in server.model else rewards).append(server)
    assert len(policies) == 2 and len(rewards) == 1
    # A bucket goes out when both servers have the one before it: the other one, stopped most of the time, holds them up.
    other = psutil.Process(policies[1].process.pid)

    def has_some():
        other.suspend()
        time.sleep(0.05)
        come = policies[0].log.read_text().count("new weights come") == 2  # the weights of the start have come before
        if not come:
            other.resume()
        return come

    wait_for(has_some, process, tmp_path, pause=0.005)
    for server in (policies[0], rewards[0]):
        os.kill(server.process.pid, signal.SIGKILL)
    assert policies[0].log.read_text().count("new weights are complete") == 1
    other.resume()
    os.environ.pop("BATON_SERVERS") if before is None else os.environ.update(BATON_SERVERS=before)
    process.join(300)
    said = (tmp_path / "stderr").read_text()
    assert process.exitcode == 0, said
    for server in (policies[0], rewards[0]):
        assert f"the server on port {server.port} starts anew" in said
    assert f"port {policies[1].port} starts anew" not in said
    for step in range(1, 4):
        records = read_jsonl(f"{output}.rollouts/step{step:06}.jsonl")
        assert {version for record in records for version in record["weight_versions"]} == {step - 1}
    lines = [line for line in read_jsonl(f"{output}.metrics.jsonl") if "pairs" in line]
    assert len(lines) == 3 and all(line["pairs"] > 0 for line in lines)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({}, [], "what scores the responses?"),
        ({}, ["--scorer", REWARD, "--prompts_per_update", "4"], "`prompts_per_update`: 4 does not divide the 6 prompts"),
        ({}, ["--scorer", REWARD, "--top_p", "0.9", "--correction_clip", "2"], "leaves tokens out with top-p 0.9"),
        ({}, ["--scorer", REWARD, "--n_samples_per_prompt", "4"], "`n_samples_per_prompt` and `K` are two names"),
        ({}, ["--scorer", REWARD, "--micro_train_batch_size", "4"], "`tokens_per_row` bounds the memory"),
        ({"K": 1}, ["--scorer", REWARD, "--advantage_estimator", "grpo"], "grpo compares the samples of a prompt"),
        ({}, ["--scorer", REWARD, "--rollout_batch", "4"], "unknown setting `rollout_batch`: did you mean"),
        ({}, ["--scorer", REWARD, "--tensor_parallel_size", "2"], "`tensor_parallel_size`: 2, but there is no GPU"),
        ({}, ["--scorer", REWARD, "--save_critic", "--advantage_estimator", "rloo"], "only `advantage_estimator: gae`"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_starts(task, tmp_path, changes, more, message):
    done = run_program(*words_of("ppo/run_ppo.py", task, tmp_path / "policy", more, **changes))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr


def test_a_reward_service_that_is_away_and_other_tokenizers_are_bad_input(task, engines, tmp_path):
    away = [*engines[:4], "--reward_url", "http://127.0.0.1:9/get_reward"]
    done = run_program(*words_of("ppo/run_ppo.py", task, tmp_path / "policy", away))
    assert done.returncode == 2 and "http://127.0.0.1:9/get_reward" in done.stderr, done.stderr
    long = [*engines, "--max_new_tokens", "4096"]
    done = run_program(*words_of("ppo/run_ppo.py", task, tmp_path / "policy", long, max_new_tokens=None))
    assert done.returncode == 2 and "4160 tokens together" in done.stderr, done.stderr
    other = ["--critic_model", "tests/nothing"]
    done = run_program(*words_of("ppo/run_ppo.py", task, tmp_path / "policy", [*engines, *other]))
    assert done.returncode == 2 and "tests/nothing" in done.stderr


def wait_for(condition, process, folder, seconds=300, pause=0.05):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.exitcode is None and time.monotonic() < deadline, (folder / "stderr").read_text()
        time.sleep(pause)
