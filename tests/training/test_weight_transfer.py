"""A real vLLM server in the inference environment takes weights from this, the training environment, while it serves."""

import time
from contextlib import closing
from types import SimpleNamespace

import httpx
import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from baton.errors import FailuresListed, InputError
from baton.servers import own, processes
from baton.servers.rollouts import Rollouts
from baton.servers.weights import Transfer, TransferFailed
from tests.inference.tiny_policy import make_tiny_policy

END = 4  # <|end|>
PROMPT = list(range(10, 90))  # several blocks of the prefix cache
TIMEOUT = 20.0


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("online")
    policy = with_a_shared_head(make_tiny_policy(folder / "policy"))
    settings = {"dtype": "float32", "logprobs_mode": "processed_logprobs"}
    wanted = own.policy_servers(str(policy), [[]], settings, weights=True)
    with own.running(wanted, folder / "servers") as (server,), own.free_ports(1) as (port,):
        transfer = Transfer([server.url], server.api_key, bucket_bytes=100_000, timeout=TIMEOUT)
        dead = f"http://127.0.0.1:{port}"
        with Rollouts([server.url, dead], server.api_key, patience=1.0) as rollouts:
            yield SimpleNamespace(folder=folder, policy=policy, server=server, dead=dead, transfer=transfer, rollouts=rollouts)
        transfer.close()


def with_a_shared_head(policy):
    """The model with its embedding as output head, as most small models have it: vLLM treats such a head in its own way."""
    config = AutoConfig.from_pretrained(policy)
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(policy)
    return policy


def changed(world, seed):
    """The policy with so much noise that a token's log-probability changes by nats."""
    model = AutoModelForCausalLM.from_pretrained(world.policy, dtype=torch.float32)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return model


def logps_of(model, prompt, response):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


def sample(world, count=1, n=1, version=None, **sampling):
    prompts = [[*PROMPT, 100 + index] for index in range(count)]
    found = dict(world.rollouts.sample(prompts, n, sampling, range(count), version))
    return prompts, [found[index] for index in range(count)]


def assert_sampled_from(model, prompts, sampled):
    for prompt, responses in zip(prompts, sampled, strict=True):
        for ids, logps in zip(responses.token_ids, responses.logps, strict=True):
            torch.testing.assert_close(torch.tensor(logps), logps_of(model, prompt, ids), atol=2e-3, rtol=0)


def test_every_route_but_health_asks_for_the_key(world):
    url, key = world.server.url, world.server.api_key
    assert httpx.get(f"{url}/health").status_code == 200
    for path in ("v1/completions", "collective_rpc", "update_weights", "pause", "weight_checker", "reset_prefix_cache"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": key}):
            assert httpx.post(f"{url}/{path}", json={}, headers=headers).status_code == 401, path
    for path in ("metrics", "docs", "weight_info", "v1/models"):
        assert httpx.get(f"{url}/{path}").status_code == 401, path


def test_the_key_is_in_no_log_and_no_command_line(world):
    found, key = processes.find(world.server.port), world.server.api_key
    assert key not in found.log.read_text()
    leader = psutil.Process(found.process.pid)
    assert not [process for process in (leader, *leader.children(recursive=True)) if key in " ".join(process.cmdline())]
    assert key not in repr(world.server)


def test_what_is_sampled_is_of_the_weights_that_were_sent_last_and_no_old_prefix_is_served(world):
    first, second = changed(world, 1), changed(world, 2)
    world.transfer.send(first.named_parameters(), 1)
    assert_sampled_from(first, *sample(world, count=4, n=2, version=1, max_tokens=8))
    world.transfer.send(second.named_parameters(), 2)
    prompts, sampled = sample(world, count=4, n=2, version=2, max_tokens=8)
    assert_sampled_from(second, prompts, sampled)
    ids, logps = sampled[0].token_ids[0], sampled[0].logps[0]
    assert (torch.tensor(logps) - logps_of(first, prompts[0], ids)).abs().mean() > 1


def test_sent_weights_have_the_checksums_of_an_export_that_is_loaded(world):
    model = changed(world, 3)
    model.save_pretrained(world.folder / "export")
    world.transfer.send(model.named_parameters(), 3)
    sent = world.transfer.checksums()
    world.transfer.send(changed(world, 4).named_parameters(), 4)
    assert world.transfer.checksums() != sent
    world.transfer.reload(world.folder / "export", 5)
    assert world.transfer.checksums() == sent
    assert_sampled_from(model, *sample(world, count=4, version=5, max_tokens=8))


def test_a_response_that_stops_ends_with_the_end_token_and_seeds_say_what_is_sampled(world):
    settings = {"max_tokens": 40, "logit_bias": {str(END): 4.0}}
    _, sampled = sample(world, count=8, n=4, **settings)
    reasons = {reason for each in sampled for reason in each.finish_reasons}
    assert reasons == {"stop", "length"}
    for each in sampled:
        for ids, logps, reason in zip(each.token_ids, each.logps, each.finish_reasons, strict=True):
            assert (ids[-1] == END) == (reason == "stop")
            assert len(logps) == len(ids) <= 40
    assert sample(world, count=8, n=4, **settings)[1] == sampled
    same = dict(world.rollouts.sample([PROMPT] * 2, 4, {"max_tokens": 20}, [0, 1]))
    assert not {tuple(ids) for ids in same[0].token_ids} & {tuple(ids) for ids in same[1].token_ids}


def test_nothing_listens_beyond_this_machine(world):
    world.transfer.send(changed(world, 1).named_parameters(), 6)
    this = psutil.Process()
    listening = [
        connection.laddr.ip
        for process in (this, *this.children(recursive=True))
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 2  # the server and the store
    assert set(listening) == {"127.0.0.1"}


def test_a_dead_server_costs_the_other_nothing(world):
    model = changed(world, 7)
    transfer = Transfer([world.dead, world.server.url], world.server.api_key, timeout=TIMEOUT)
    with pytest.raises(TransferFailed, match=world.dead) as failure:
        transfer.send(model.named_parameters(), 7)
    transfer.close()
    assert failure.value.urls == [world.dead]
    assert_sampled_from(model, *sample(world, count=8, version=7, max_tokens=8))
    world.transfer.send(model.named_parameters(), 8)  # whose connection the other one has replaced
    assert_sampled_from(model, *sample(world, count=8, version=8, max_tokens=8))


def test_a_server_killed_while_weights_are_sent_fails_at_once_and_comes_back(world):
    model, killed = changed(world, 9), []

    def weights():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if index == 10:
                psutil.Process(processes.find(world.server.port).process.pid).kill()
                killed.append(time.monotonic())
            yield name, parameter

    with pytest.raises(TransferFailed, match=world.server.url):
        world.transfer.send(weights(), 9)
    assert time.monotonic() - killed[0] < TIMEOUT / 2
    assert not own.is_alive(world.server)

    own.restart(world.server)
    with pytest.raises(FailuresListed):  # it answers, but has the weights of its beginning
        sample(world, version=9, max_tokens=8)
    world.transfer.send(model.named_parameters(), 9)
    assert_sampled_from(model, *sample(world, count=8, version=9, max_tokens=8))


def test_two_workers_of_one_server_hold_the_weights_that_were_sent_as_a_folder_holds_them(world):
    """Tensor parallelism: each worker takes its part of every tensor, also of the embedding that is the head."""
    settings = {"dtype": "float32", "logprobs_mode": "processed_logprobs", "tensor_parallel_size": 2}
    (wanted,) = own.policy_servers(str(world.policy), [[]], settings, weights=True)
    model = changed(world, 12)
    model.save_pretrained(world.folder / "export of two")
    with own.free_ports(1) as (port,):
        server = own.OwnServer(wanted, port, world.server.starter)
        own.restart(server)
        with (
            closing(Transfer([server.url], server.api_key, bucket_bytes=100_000, timeout=TIMEOUT)) as transfer,
            Rollouts([server.url], server.api_key) as rollouts,
        ):
            transfer.send(model.named_parameters(), 1)
            sent = transfer.checksums()
            two = SimpleNamespace(rollouts=rollouts)
            assert_sampled_from(model, *sample(two, count=4, n=2, version=1, max_tokens=8))
            transfer.send(changed(world, 13).named_parameters(), 2)
            assert transfer.checksums() != sent
            transfer.reload(world.folder / "export of two", 3)
            assert transfer.checksums() == sent
            assert_sampled_from(model, *sample(two, count=4, n=2, version=3, max_tokens=8))
        processes.stop([processes.find(port)])


def test_a_folder_without_a_file_is_refused_and_one_without_its_index_too_costs_a_new_server(world):
    """A file of the index is missing; then the index too, so that only the server can know."""
    model, folder = changed(world, 14), world.folder / "without a file"
    model.save_pretrained(folder, max_shard_size="100KB")
    world.transfer.send(model.named_parameters(), 14)
    index, missing = folder / "model.safetensors.index.json", sorted(folder.glob("*.safetensors"))[1]
    missing.unlink()
    begun = time.monotonic()
    with pytest.raises(InputError, match=missing.name):
        world.transfer.reload(folder, 15)
    assert_sampled_from(model, *sample(world, count=2, version=14, max_tokens=8))

    index.unlink()
    with pytest.raises(TransferFailed, match="no weights, or not all, came for") as failure:
        world.transfer.reload(folder, 15)
    assert failure.value.urls == [world.server.url] and time.monotonic() - begun < TIMEOUT / 2
    own.restart(world.server)
    world.transfer.send(model.named_parameters(), 15)
    assert_sampled_from(model, *sample(world, count=2, version=15, max_tokens=8))


def test_weights_that_are_not_all_there_are_refused_with_what_is_missing(world):
    model = changed(world, 10)
    some = [(name, weight) for name, weight in model.named_parameters() if "layers.1.self_attn.k_proj" not in name]
    with pytest.raises(TransferFailed, match=r"model\.layers\.1\.self_attn\.qkv_proj"):
        world.transfer.send(some, 10)
