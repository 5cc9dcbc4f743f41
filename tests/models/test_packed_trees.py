"""The packed forward pass gives each sequence's numbers alone: log-probabilities, gradients, other scores."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import distribute_tensor
from torch.distributed.utils import _apply_to_tensors
from transformers import (
    AutoModelForCausalLM,
    BertGenerationConfig,
    CohereConfig,
    DogeConfig,
    GraniteConfig,
    HyperCLOVAXConfig,
    JetMoeConfig,
    LlamaConfig,
    ModernBertDecoderConfig,
    NemotronConfig,
    Phi3Config,
    PhimoeConfig,
    Qwen2MoeConfig,
)

from baton.errors import InputError
from baton.models.attention import NAME
from baton.models.forward import attention, computes_on, obstacle, score, share_prefixes
from baton.models.scoring import Packing
from baton.models.trees import pack, with_prompts
from tests.models.tiny_models import FAMILIES, LENGTH_LIMIT, SHAPE, VOCABULARY, model_of, random_pairs

tokens = st.integers(3, VOCABULARY - 1)
prompts = st.lists(tokens, min_size=1, max_size=LENGTH_LIMIT // 2)
responses = st.lists(tokens, min_size=1, max_size=LENGTH_LIMIT // 2)


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request):
    return model_of(request.param)


def logps_alone(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log-probabilities of the response's tokens by the model's own forward pass on this one sequence."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1)


def logps_packed(model, sequences, tokens_per_row=None) -> list[torch.Tensor]:
    with attention(model, NAME):
        scores, slices = score(model, sequences, tokens_per_row)
    return [scores.log_probs[part] for part in slices]


def test_a_model_whose_weights_fsdp_keeps_in_memory_computes_on_the_gpu_of_its_process(monkeypatch):
    model = torch.nn.Linear(2, 2, bias=False)
    assert computes_on(model).type == "cpu"
    torch.distributed.init_process_group(store=torch.distributed.HashStore(), rank=0, world_size=1, backend="gloo")
    try:
        mesh = DeviceMesh("cpu", [0])
        model.weight = torch.nn.Parameter(distribute_tensor(model.weight.detach(), mesh))
        assert computes_on(model).type == "cpu"
        monkeypatch.setattr(mesh, "_device_type", "cuda")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        assert model.weight.device.type == "cpu" and computes_on(model) == torch.device("cuda:3")
    finally:
        torch.distributed.destroy_process_group()


# Packing


def test_copies_of_a_layout_as_fsdp_makes_them_share_their_masks():
    ((row,), _) = pack([([3], [4, 5])], None)
    assert _apply_to_tensors(torch.clone, row).layout.masks is row.layout.masks


@given(
    st.lists(
        st.tuples(st.lists(tokens, min_size=1, max_size=6), st.lists(tokens, max_size=6)),
        min_size=1,
        max_size=12,
    ),
    st.none() | st.integers(1, 30),
    st.booleans(),
)
def test_every_response_token_is_scored_once_at_its_place(sequences, tokens_per_row, whole):
    rows, places = pack(sequences, tokens_per_row, whole)
    for (_, response), place in zip(sequences, places, strict=True):
        assert place.length == len(response)
        scored = rows[place.row].targets[place.start : place.start + place.length]
        assert scored.tolist() == list(response)
    for (prompt, response), place in zip(sequences, places, strict=True):
        ids = [*prompt, *response] if whole else [*prompt, *response[:-1]]
        row = rows[place.row]
        assert (row.input_ids[place.last], row.position_ids[place.last]) == (ids[-1], len(ids) - 1)
    distinct = {(tuple(prompt), tuple(response)) for prompt, response in sequences}
    assert sum(len(row.targets) for row in rows) == sum(len(response) for _, response in distinct)


@given(
    st.lists(
        st.tuples(st.lists(tokens, min_size=1, max_size=6), st.lists(tokens, max_size=6)),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 30),
    st.booleans(),
)
def test_rows_keep_to_the_token_budget_unless_one_sequence_exceeds_it(sequences, tokens_per_row, whole):
    rows, _ = pack(sequences, tokens_per_row, whole)
    for row in rows:
        assert len(row.input_ids) == row.layout.length
        alone = len(row.layout.trees) == 1 and len(row.layout.trees[0][1]) == 1
        assert len(row.input_ids) <= tokens_per_row or alone


def test_a_prompt_is_laid_down_once_for_all_its_responses():
    (row,), _ = pack([([5, 6, 7], [8, 9]), ([5, 6, 7], [10]), ([5, 6, 7], [8, 9])], None)
    assert row.input_ids.tolist() == [5, 6, 7, 8]
    assert row.position_ids.tolist() == [0, 1, 2, 3]
    assert row.targets.tolist() == [8, 9, 10]
    assert row.predictors.tolist() == [2, 3, 2]


@given(st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=6), min_size=1, max_size=4))
def test_a_prompt_is_the_longest_beginning_that_all_sequences_share(sequences):
    cut = with_prompts(sequences)
    assert [[*prompt, *response] for prompt, response in cut] == sequences
    shared = max(n for n in range(min(map(len, sequences)) + 1) if len({tuple(ids[:n]) for ids in sequences}) == 1)
    assert [len(prompt) for prompt, _ in cut] == [shared or len(ids) for ids in sequences]


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="sequence 1 has an empty prompt"):
        pack([([3], [4]), ([], [4])], None)


# Log-probabilities


@settings(max_examples=15)
@given(data=st.data())
def test_packed_logps_are_those_of_each_sequence_alone(model, data):
    some_prompts = data.draw(st.lists(prompts, min_size=1, max_size=3))
    sequences = data.draw(st.lists(st.tuples(st.sampled_from(some_prompts), responses), min_size=1, max_size=6))
    tokens_per_row = data.draw(st.none() | st.integers(10, 120))
    with torch.no_grad():
        packed = logps_packed(model, sequences, tokens_per_row)
        for (prompt, response), logps in zip(sequences, packed, strict=True):
            torch.testing.assert_close(logps, logps_alone(model, prompt, response), atol=2e-5, rtol=1e-4)


TAKEN = {
    "cohere": CohereConfig(**SHAPE, logit_scale=0.5),
    "granite": GraniteConfig(**SHAPE, logits_scaling=2.0),
    "hyperclovax": HyperCLOVAXConfig(**SHAPE, logits_scaling=2.0),
    "jetmoe": JetMoeConfig(**SHAPE, num_local_experts=4, kv_channels=8, ffn_hidden_size=48),
    "phimoe": PhimoeConfig(**SHAPE, sliding_window=LENGTH_LIMIT),
    "qwen2_moe": Qwen2MoeConfig(**SHAPE, moe_intermediate_size=16, num_experts=4, sliding_window=5),
}
IN_MASK = "its attention is limited by its mask alone"
QWEN2_MOE = Qwen2MoeConfig(**SHAPE, moe_intermediate_size=16, num_experts=4, sliding_window=5, use_sliding_window=True)
REFUSED = [
    (DogeConfig(**SHAPE), IN_MASK),
    (PhimoeConfig(**SHAPE, sliding_window=5), IN_MASK),
    (QWEN2_MOE, IN_MASK),
    (NemotronConfig(**SHAPE), "its layers do not pass on to their attention where the trees lie"),
    (ModernBertDecoderConfig(**SHAPE), "it has weights between its body and its head: lm_head.dense.weight"),
    (BertGenerationConfig(**SHAPE), "its attention is not causal"),
]


@pytest.mark.parametrize("family", TAKEN)
def test_a_family_that_differs_from_llama_has_its_own_logps(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TAKEN[family]).eval()
    assert obstacle(model) is None
    sequences = [(row["prompt_ids"], row[side]) for row in random_pairs(4) for side in ("chosen_ids", "rejected_ids")]
    with torch.no_grad():
        for sequence, logps in zip(sequences, logps_packed(model, sequences), strict=True):
            torch.testing.assert_close(logps, logps_alone(model, *sequence), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=lambda of: getattr(of, "model_type", ""))
def test_a_family_whose_packed_logps_would_be_others_is_refused(config, message):
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=message):
        share_prefixes(model)


FREQUENCIES = {"rope_theta": 10_000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 3.0}


@pytest.mark.parametrize(
    ("config_class", "settings"),
    [
        (Phi3Config, {"rope_type": "longrope", "original_max_position_embeddings": 16}),
        (LlamaConfig, {"rope_type": "dynamic"}),
    ],
)
def test_sequences_of_a_length_that_changes_all_positions_of_their_row_are_refused(config_class, settings):
    original = settings.get("original_max_position_embeddings", LENGTH_LIMIT)
    more = {"original_max_position_embeddings": original} if config_class is Phi3Config else {}
    config = config_class(**SHAPE, **more, rope_parameters=FREQUENCIES | settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    short, longest = ([3, 4], [5, 6, 7]), ([3, 4], [5] * (original - 1))  # a response's last token is no input
    with torch.no_grad():
        for sequence, logps in zip((short, longest), logps_packed(model, [short, longest]), strict=True):
            alone = logps_alone(model, sequence[0], sequence[1][:-1])
            torch.testing.assert_close(logps[:-1], alone, atol=2e-5, rtol=1e-4)
        with pytest.raises(InputError, match=f"a sequence of {original + 1} tokens: .*; cut texts to {original} tokens"):
            logps_packed(model, [short, ([3, 4], [5] * original)])
    assert not Packing(model).holds


def test_gradients_are_those_of_the_sequences_alone(model):
    sequences = [(row["prompt_ids"], row[side]) for row in random_pairs(4) for side in ("chosen_ids", "rejected_ids")]
    weights = torch.linspace(-1, 1, len(sequences))
    parameters = list(model.parameters())

    packed = logps_packed(model, sequences, 60)
    gradients = torch.autograd.grad(sum(w * p.sum() for w, p in zip(weights, packed, strict=True)), parameters)
    alone = [logps_alone(model, *sequence) for sequence in sequences]
    expected = torch.autograd.grad(sum(w * p.sum() for w, p in zip(weights, alone, strict=True)), parameters)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert (gradient - wanted).norm() <= 1e-4 * wanted.norm() + 1e-6


def test_generation_and_plain_calls_are_untouched():
    model = model_of("gemma2")
    ids = torch.tensor([[3, 4, 5, 6]])
    logits = model(ids).logits
    generated = model.generate(ids, max_new_tokens=8, do_sample=False)
    share_prefixes(model)
    assert torch.equal(model(ids).logits, logits)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), generated)
