"""Token in, token out with the three common kinds of tokenizer; what a template writes after a response ends its turn."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from baton.errors import InputError
from baton.models.templates import (
    FOREIGN,
    SAMPLED,
    decodes_to,
    end_token_id,
    prompt_token_ids,
    response_pieces,
    response_text,
    response_token_ids,
    sampled_or_tokenised,
)
from tests.programs import ROOT

TEXT = [
    "A warm film, and a lovely story at sea.",
    "The plot drags; it's a dull mess, 90 minutes of it.",
    "Où est-il? Übel, 中文.",
]
PROMPT = [{"role": "user", "content": "A film?"}]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>' + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' </s>' }}{% endif %}{% endfor %}"
)
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def chat(core, template=CHATML, end="<|im_end|>"):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in ("<|im_start|>", end)])
    tokenizer.chat_template = template
    return tokenizer


def trained(core, size, specials, alphabet=()):
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, initial_alphabet=list(alphabet), show_progress=False
    )
    core.train_from_iterator(TEXT * 3, trainer)
    return core


def metaspace(**options):
    """As the tokenizer.json of Llama 2: a space before each text, which the decoder strips, and bytes for other characters."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for training alone
    trained(core, 420, ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256))], "▁")
    core.pre_tokenizer = None
    file = json.loads(core.to_str())
    file["added_tokens"] = [token for token in file["added_tokens"] if not token["content"].startswith("<0x")]
    return chat(Tokenizer.from_str(json.dumps(file)), **options)


def byte_level(**options):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return chat(trained(core, 420, ["<s>", "</s>", "<pad>"], pre_tokenizers.ByteLevel.alphabet()), **options)


def tiktoken(**options):
    core = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    unused = [f"<|unused_{n}|>" for n in range(7)]
    return chat(trained(core, 380, ["<pad>", "</s>", "<s>", *unused], pre_tokenizers.ByteLevel.alphabet()), **options)


KINDS = {"metaspace": metaspace(), "byte-level": byte_level(), "tiktoken": tiktoken()}
END = "<|im_end|>"


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(request):
    return KINDS[request.param]


def id_of(tokenizer, token):
    return tokenizer.convert_tokens_to_ids(token)


@given(data=st.data())
def test_sampled_ids_are_known_by_the_text_of_the_engine_and_by_that_of_a_decoder(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=12))
    in_context = response_text(tokenizer, prompt_token_ids(tokenizer, PROMPT, "here"), ids)
    alone = tokenizer.decode(ids, skip_special_tokens=True)
    for text in (in_context, alone, response_text(tokenizer, [], ids)):
        assert decodes_to(tokenizer, ids, text)
        assert decodes_to(tokenizer, [*ids, id_of(tokenizer, END)], text)


def test_a_first_space_is_part_of_a_response_where_the_decoder_strips_it():
    tokenizer = KINDS["metaspace"]
    ids = [*tokenizer("warm film", add_special_tokens=False)["input_ids"], id_of(tokenizer, END)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "warm film"
    assert response_text(tokenizer, prompt_token_ids(tokenizer, PROMPT, "here"), ids) == " warm film"
    assert sampled_or_tokenised(tokenizer, PROMPT, " warm film", ids, "stop", "here") == (ids, SAMPLED)
    assert not decodes_to(tokenizer, ids, "  warm film") and not decodes_to(tokenizer, ids, " warm fil")


def test_a_character_cut_at_the_end_is_left_out_of_the_text_and_no_other(tokenizer):
    marks = tokenizer("中文", add_special_tokens=False)["input_ids"]
    whole = "A film" + "中"
    cut = [*tokenizer("A film", add_special_tokens=False)["input_ids"]]
    if tokenizer is KINDS["metaspace"]:
        cut += [id_of(tokenizer, f"<0x{byte:02X}>") for byte in "中文".encode()[:-1]]
    else:
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("中文")[0][0]
        cut += [id_of(tokenizer, letter) for letter in letters[:-1]]
    assert marks and response_text(tokenizer, prompt_token_ids(tokenizer, PROMPT, "here"), cut).strip() == whole
    assert decodes_to(tokenizer, cut, whole) and decodes_to(tokenizer, cut, " " + whole)


def test_a_stop_string_is_left_out_of_the_text_and_not_after_an_end_of_turn(tokenizer):
    ids = tokenizer("A warm film; it's dull", add_special_tokens=False)["input_ids"]
    assert decodes_to(tokenizer, ids, "A warm film")
    assert not decodes_to(tokenizer, [*ids, id_of(tokenizer, END)], "A warm film")
    assert not decodes_to(tokenizer, ids, "A warm film; it's dull and more")


def test_an_empty_response_is_that_of_tokens_without_a_word(tokenizer):
    assert decodes_to(tokenizer, [id_of(tokenizer, END)], "")
    assert not decodes_to(tokenizer, tokenizer("film", add_special_tokens=False)["input_ids"], "")
    assert not decodes_to(tokenizer, [], "film") and not decodes_to(tokenizer, [10**6], "")


words = st.lists(st.sampled_from("A warm film story plot dull mess lovely sea 90 it's The".split()), min_size=2, max_size=8)


@given(words.map(" ".join))
@example("A film")
def test_ids_of_another_tokenizer_are_foreign(text):
    for name, sampler in KINDS.items():
        ids = sampler(text, add_special_tokens=False)["input_ids"]
        for other, reader in KINDS.items():
            _, source = sampled_or_tokenised(reader, PROMPT, text, ids, "length", "here")
            assert source == (SAMPLED if name == other else FOREIGN)


TURNS = {
    "a mark and a line break": (CHATML, "<|im_end|>"),
    "a mark that is not the tokenizer's end": (CHATML.replace("<|im_end|>\n", "<|eot_id|>"), "<|eot_id|>"),
    "two marks": (CHATML.replace("<|im_end|>\n'", "<|im_end|>\n</s>'"), "<|im_end|>"),
    "the end of a text": (LLAMA_2, " </s>"),
    "ordinary text": (CHATML.replace("<|im_end|>\n", "\n[END OF TURN]\n"), "\n[END OF TURN]"),
    "a line break": (CHATML.replace("<|im_end|>", ""), "\n"),
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("response", ["A film.", "<", "Response0"])
def test_a_response_ends_with_what_its_template_writes_and_a_cut_one_without(tokenizer, turn, response):
    template, end = TURNS[turn]
    own = chat(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), template, "<|eot_id|>")
    stopped, cut = (response_token_ids(own, PROMPT, response, stopped, "here") for stopped in (True, False))
    assert own.decode(stopped).strip(" ") == (response + end).strip(" ")
    assert own.decode(cut).strip(" ") == response
    token = end.strip()
    expected = id_of(own, token) if token.startswith("<") else None
    assert end_token_id(own, [*PROMPT, {"role": "assistant", "content": response}], "here") == expected


def test_inner_turns_learn_up_to_the_end_token_and_the_rest_stays_in_the_input(tokenizer):
    said = [{"role": "assistant", "content": "A sea."}, *PROMPT, {"role": "assistant", "content": "A story."}]
    pieces = response_pieces(tokenizer, [*PROMPT, *said], "here", stopped=False)
    learnt = [tokenizer.decode(ids).strip(" ") for ids, is_learnt in pieces if is_learnt]
    assert learnt == ["A sea.<|im_end|>", "A story."]
    ids = [id_ for ids, _ in pieces for id_ in ids]
    written = tokenizer(tokenizer.apply_chat_template([*PROMPT, *said], tokenize=False), add_special_tokens=False)["input_ids"]
    assert ids == written[: len(ids)] and tokenizer.decode(written[len(ids) :]).replace(" ", "") == "<|im_end|>\n"
    assert pieces[0][0] == prompt_token_ids(tokenizer, PROMPT, "here")


def test_a_response_is_tokenised_as_it_stands_after_its_prompt(tokenizer):
    """A tokenizer that puts a space before each text must not put one before a response."""
    whole = tokenizer(CHATML_TEXT, add_special_tokens=False)["input_ids"]
    prompt = prompt_token_ids(tokenizer, PROMPT, "here")
    assert prompt + response_token_ids(tokenizer, PROMPT, "A warm film.", True, "here") == whole


CHATML_TEXT = "<|im_start|>user\nA film?<|im_end|>\n<|im_start|>assistant\nA warm film.<|im_end|>"


def test_the_template_for_llama_3_writes_its_format():
    path = ROOT / "configs/llama3.jinja"
    own = chat(Tokenizer.from_str(KINDS["tiktoken"].backend_tokenizer.to_str()), path.read_text(), "<|eot_id|>")
    turns = [{"role": "system", "content": "Be brief."}, *PROMPT, {"role": "assistant", "content": " A sea.\n"}]
    answered = (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nA film?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA sea.<|eot_id|>"
    )
    assert own.apply_chat_template(turns, tokenize=False) == answered
    asked = answered.removesuffix("A sea.<|eot_id|>")
    assert own.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True) == asked
    assert end_token_id(own, turns, "here") == id_of(own, "<|eot_id|>")


def test_a_template_that_hides_the_response_is_refused():
    tokenizer = chat(Tokenizer.from_str(KINDS["tiktoken"].backend_tokenizer.to_str()), "{% for m in messages %}x{% endfor %}")
    with pytest.raises(InputError, match="here: the chat template writes message 2 differently once it is answered"):
        response_token_ids(tokenizer, PROMPT, "A film.", True, "here")
