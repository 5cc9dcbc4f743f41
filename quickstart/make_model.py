"""Make the base model: a byte-level BPE tokenizer trained on the data, a small Llama of random weights.

    python quickstart/make_model.py --output_dir base --seed 0 --text data/sft.jsonl

The output is a plain Hugging Face folder for Transformers, TRL and vLLM. SFT starts from it.
"""

from pathlib import Path

from baton import jsonl, program
from baton.arguments import StageArguments, option, parse
from baton.errors import InputError
from baton.records import prompt_of
from baton.stage import Stage

SPECIAL = PAD, BEGIN, END_OF_TURN, USER, ASSISTANT = (
    "<|pad|>",
    "<|begin|>",
    "<|end_of_turn|>",
    "<|user|>",
    "<|assistant|>",
)

# `generation` marks what is to be learnt of a whole conversation: the assistant's turns, ends included.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message.content }}<|end_of_turn|>{% endgeneration %}"
    "{% else %}"
    "<|user|>{{ message.content }}<|end_of_turn|>"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Arguments(StageArguments):
    output_dir: Path = option(..., "folder of the model; it is made new", changes_result=False)
    text: Path = option(..., "JSONL of demonstrations to train the tokenizer on", changes_result=False)
    seed: int = option(0, "seed of the random weights")
    vocabulary: int = option(1024, "tokens, the 256 bytes and the special tokens included", ge=300)
    hidden_size: int = option(256, "width of the model", ge=32)
    layers: int = option(2, "number of layers", ge=1)
    head_size: int = option(64, "width of a head; vLLM on CPU knows 32, 64, 80, 96, 112, 128, …", ge=8)
    positions: int = option(256, "longest sequence, in tokens", ge=16)


def main() -> None:
    arguments = parse(Arguments, __doc__)
    width, head = arguments.hidden_size, arguments.head_size
    if width % head:
        raise InputError(f"`hidden_size` ({width}) must be a multiple of `head_size` ({head})")
    stage = Stage.begin("make_model", arguments, arguments.output_dir, {"text": arguments.text})
    if stage is None:
        return
    texts = read_texts(arguments.text)
    tokenizer = make_tokenizer(texts, arguments.vocabulary, arguments.positions)
    model = make_model(tokenizer, arguments)
    tokenizer.save_pretrained(stage.partial_folder)
    model.save_pretrained(stage.partial_folder)
    facts = {"vocabulary": len(tokenizer), "parameters": model.num_parameters()}
    stage.finish(records_in=len(texts), records_out=len(texts), **facts)


def read_texts(path: Path) -> list[str]:
    """The text of each demonstration: its prompt's turns and its response, a line each."""
    texts = []
    for where, record in jsonl.read(path):
        turns = [message["content"] for message in prompt_of(record, where)]
        texts.append("\n".join([*turns, record.get("response", "")]))
    if not texts:
        raise InputError(f"{path}: the file is empty; make_data.py makes one")
    return texts


def make_tokenizer(texts: list[str], vocabulary: int, positions: int):
    """A byte-level BPE tokenizer with a chat template; any text can be encoded, and is decoded as it was."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BEGIN,
        eos_token=END_OF_TURN,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer, arguments: Arguments):
    """A Llama of random weights, about 1.8 million parameters by default, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(arguments.seed)
    heads = arguments.hidden_size // arguments.head_size
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,  # a multiple of 64, as matrix kernels like it
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.hidden_size * 11 // 4,
        num_hidden_layers=arguments.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=arguments.positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


if __name__ == "__main__":
    program.run(main)
