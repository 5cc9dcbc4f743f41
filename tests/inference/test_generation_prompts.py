"""Which prompts a generation takes: mixtures, windows, system prompts; and reproducible sampling of them."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import InputError
from baton.mixing import Selection, parse_probs, select_rows
from baton.prompts import PromptSet
from tests.inference.tiny_policy import make_tiny_policy
from tests.programs import run_program, write_jsonl

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def weights(count: int) -> tuple[float, ...]:
    return tuple((i + 1) / sum(range(1, count + 1)) for i in range(count))


@given(lengths)
def test_without_a_choice_every_prompt_is_taken_in_order(lengths):
    assert select_rows(lengths, Selection()).tolist() == list(range(sum(lengths)))


@given(lengths, st.integers(1, 100), st.booleans())
def test_max_samples_bounds_the_prompts_and_each_source_gives_its_first(lengths, most, mixed):
    rows = select_rows(lengths, Selection(max_samples=most, probs=weights(len(lengths)) if mixed else None))
    assert 1 <= len(rows) <= min(most, sum(lengths))
    assert mixed or len(rows) == min(most, sum(lengths))
    for start, length in zip(np.cumsum([0, *lengths[:-1]]), lengths, strict=True):
        own = rows[(rows >= start) & (rows < start + length)] - start
        assert own.tolist() == list(range(len(own)))


@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 5))
def test_windows_of_consecutive_rounds_take_every_prompt_once_an_epoch(total, size, seed):
    rounds = -(-total // size) * size  # after so many rounds, whole epochs are over
    taken = np.concatenate([select_rows([total], Selection(iteration=i, batch_size=size, seed=seed)) for i in range(rounds)])
    counts = np.bincount(taken, minlength=total)
    assert counts.sum() == rounds * size
    assert counts.max() - counts.min() <= 1


@given(st.integers(2, 50), st.integers(0, 5))
def test_rounds_within_an_epoch_share_no_prompt(total, seed):
    size = total // 2
    first, second = (select_rows([total], Selection(iteration=i, batch_size=size, seed=seed)) for i in (0, 1))
    assert not set(first) & set(second)


def test_an_epoch_has_its_own_order_and_a_seed_too():
    def window(iteration: int, seed: int) -> list[int]:
        return select_rows([100], Selection(iteration=iteration, batch_size=50, seed=seed)).tolist()

    assert window(0, 1) == window(0, 1)
    assert window(0, 1) != window(2, 1)
    assert window(0, 1) != window(0, 2)


def test_mixing_draws_from_the_sources_at_their_rates_until_one_is_used_up():
    rows = select_rows([10_000, 500], Selection(probs=(0.8, 0.2)))
    small = int((rows >= 10_000).sum())
    assert small == 500
    assert len(rows) - small == pytest.approx(2000, rel=0.15)


@pytest.mark.parametrize(
    ("text", "message"),
    [("0.5", "1 numbers for 2"), ("a,b", "numbers with commas"), ("0.5,0.6", "sum to 1"), ("1,0", "above 0")],
)
def test_bad_weights_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_probs(text, 2)


def write(path: Path, name: str, count: int) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"{name} {n}", "n": n}) + "\n" for n in range(count)))
    return path


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 3))
def test_shards_of_a_window_over_two_files_hold_each_of_its_prompts_once(tmp_path_factory, shards, size, iteration):
    folder = tmp_path_factory.mktemp("mixed")
    source = f"{write(folder / 'a.jsonl', 'a', 5)},{write(folder / 'b.jsonl', 'b', 4)}"
    prompts = PromptSet(source, selection=Selection(iteration=iteration, batch_size=size))
    ids = [record["id"] for i in range(shards) for _, _, record, _ in prompts.shard(i, shards)]
    assert ids == [prompts.id(position) for position in range(size)]
    assert len(set(ids)) == size


def test_a_system_prompt_stands_before_conversations_that_have_none(tmp_path):
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "b"}]
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": own}) + "\n")
    prompts = PromptSet(str(path), system_prompt="yours")
    first, second = (record["prompt"] for _, _, record, _ in prompts.shard(0, 1))
    assert first == [{"role": "system", "content": "yours"}, {"role": "user", "content": "a"}]
    assert second == own


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return make_tiny_policy(tmp_path_factory.mktemp("policy"))


def generate(policy: Path, prompts: object, output: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    command = ["generation/get_hf2.py", "--model_name_or_path", policy]
    return run_program(*command, "--dataset_name_or_path", prompts, "--output_dir", output, *flags)


def responses(*paths: Path) -> dict[str, list[str]]:
    records = [json.loads(line) for path in paths for line in path.read_bytes().splitlines()]
    return {record["id"]: record["responses"] for record in records}


def test_reproducible_responses_do_not_depend_on_shards_resumes_or_neighbours(policy, tmp_path):
    prompts = write(tmp_path / "p.jsonl", "film", 20)
    flags = ["--K", 4, "--max_new_tokens", 32, "--reproducible", "--seed", 5, "--dtype", "float32"]
    whole = generate(policy, prompts, tmp_path / "whole", *flags)
    assert whole.returncode == 0, whole.stderr
    wanted = responses(tmp_path / "whole0.jsonl")
    lines = (tmp_path / "whole0.jsonl").read_bytes().splitlines()

    shard = generate(policy, prompts, tmp_path / "part", *flags, "--my_world_size", 3, "--local_index", 1)
    assert shard.returncode == 0, shard.stderr
    got = responses(tmp_path / "part1.jsonl")
    assert len(got) == 7
    assert got == {id_: wanted[id_] for id_ in got}

    # As if killed after two prompts, and gone on with two responses at a time.
    manifest = json.loads((tmp_path / "whole0.jsonl.manifest.json").read_text())
    (tmp_path / "again.partial.manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "again.partial0-of-1").write_bytes(b"[3,%b]\n[7,%b]\n" % (lines[3], lines[7]))
    again = generate(policy, prompts, tmp_path / "again", *flags, "--max_num_seqs", 2)
    assert again.returncode == 0, again.stderr
    assert "going on where it stopped" in again.stderr
    assert responses(tmp_path / "again0.jsonl") == wanted


def test_more_prompt_tokens_than_a_step_takes_are_sampled_reproducibly(policy, tmp_path):
    """On a CPU vLLM takes 4,096 tokens a step; a prompt that it computed in two parts ended it where requests have seeds."""
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"{n} " + "film " * 200} for n in range(24)])
    done = generate(policy, prompts, tmp_path / "gen", "--K", 1, "--max_new_tokens", 2, "--reproducible")
    assert done.returncode == 0, done.stderr
    assert len(responses(tmp_path / "gen0.jsonl")) == 24


def test_transformers_samples_where_vllm_does_not(policy, tmp_path):
    from transformers import AutoTokenizer

    prompts = write(tmp_path / "p.jsonl", "film", 5)
    flags = ["--backend", "hf", "--K", 3, "--max_new_tokens", 40, "--stop", "joy"]
    result = generate(policy, prompts, tmp_path / "gen", *flags)
    assert result.returncode == 0, result.stderr
    assert "backend=transformers" in result.stderr
    tokenizer = AutoTokenizer.from_pretrained(policy)
    records = [json.loads(line) for line in (tmp_path / "gen0.jsonl").read_bytes().splitlines()]
    assert [record["n"] for record in records] == list(range(5))
    for record in records:
        samples = zip(record["responses"], record["response_token_ids"], record["finish_reasons"], strict=True)
        for text, ids, reason in samples:
            assert "joy" not in text
            assert tokenizer.decode(ids, skip_special_tokens=True).startswith(text)
            assert reason == "stop" or (len(ids) == 40 and tokenizer.eos_token_id not in ids)


def test_transformers_reproduces_a_prompt_whatever_its_shard(policy, tmp_path):
    prompts = write(tmp_path / "p.jsonl", "film", 4)
    flags = ["--backend", "hf", "--K", 2, "--max_new_tokens", 16, "--reproducible"]
    assert generate(policy, prompts, tmp_path / "whole", *flags).returncode == 0
    assert generate(policy, prompts, tmp_path / "part", *flags, "--my_world_size", 2, "--local_index", 1).returncode == 0
    whole, part = responses(tmp_path / "whole0.jsonl"), responses(tmp_path / "part1.jsonl")
    assert len(part) == 2
    assert part == {id_: whole[id_] for id_ in part}


BAD_CHOICES = {
    "weights for the wrong number of datasets": (["--dataset_probs", "0.5,0.5"], "2 numbers for 1 datasets"),
    "a round without its size": (["--iter", "1"], "--iter 1 needs --rollout_batch_size"),
    "greedy, several": (["--temperature", "0", "--K", "4"], "--temperature 0 is greedy"),
    "an empty stop string": (["--stop", ""], "--stop: an empty string"),
    "a missing second dataset": (["--dataset_name_or_path", "./a.jsonl,./b.jsonl"], "a.jsonl: no such file"),
    "no prompts at all": (["--max_samples", "0"], "`max_samples`"),
    "a negative round": (["--iter", "-1"], "`iter`"),
    "an unknown engine": (["--backend", "tgi"], "`backend`.*hf"),
}


@pytest.mark.parametrize(("flags", "message"), BAD_CHOICES.values(), ids=BAD_CHOICES)
def test_bad_choices_are_refused(policy, tmp_path, flags, message):
    result = generate(policy, write(tmp_path / "p.jsonl", "film", 2), tmp_path / "gen", *flags)
    assert result.returncode == 2, result.stderr
    assert message.replace(".*hf", "") in result.stderr
    assert not (tmp_path / "gen0.jsonl").exists()
