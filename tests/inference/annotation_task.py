"""What the tests of annotation share: tiny random models, generated records, and how a program is run."""

import json
import os
import sys
import tempfile
from pathlib import Path

from tests.programs import ROOT, launch

PROGRAMS = ROOT / "annotate_data"

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

GOOD = {"prompt": "Hello", "responses": ["a", "b"]}


def make_models(folder):
    """Save a tiny random reward model `rm` and language models `lm`, `lm2` over a byte-level tokenizer; returns `folder`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    words = {word: number for number, word in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(words, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        initializer_range=0.2,
    )
    for seed, name in enumerate(["lm", "lm2", "rm"]):
        torch.manual_seed(seed)
        if name == "rm":
            config.num_labels = 1
        model = LlamaForSequenceClassification(config) if name == "rm" else LlamaForCausalLM(config)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def generated(count, K=3):
    """Records with prompts and responses of very different lengths."""
    return [
        {
            "prompt": [{"role": "user", "content": f"Question {i}: " + "why? " * (i * 7 % 11)}],
            "responses": [f"Answer {k} to {i}. " + "Because. " * ((i * 5 + k * 3) % 17) for k in range(K)],
            "source": {"number": i},
        }
        for i in range(count)
    ]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rewards_in(path):
    return [reward for record in read(path) for reward in record["rewards"]]


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OPENAI_API_KEY": ""}


def command(program, **values):
    """The command line of a program of annotation."""
    words = [sys.executable, str(PROGRAMS / program)]
    for name, value in values.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def run(program, processes=1, code=0, **values):
    """Run a program to its end, in all processes with exit code `code`; returns its log."""
    with tempfile.TemporaryDirectory() as folder:
        codes, log = launch(processes, Path(folder), *command(program, **values)[1:], **environment())
    assert set(codes) == {code}, log
    return log
