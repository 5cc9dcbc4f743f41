"""Talk to a model in a terminal.

    python generation/chat.py MODEL                        a folder or hub name: vLLM on a GPU, Transformers on a CPU
    python generation/chat.py --url http://host:8000       a running server; before --url may stand the model's name there

A line is a question, and an answer is shown while it is sampled. Several lines are one question between two lines of three
quotation marks. Ctrl-C stops an answer, Ctrl-D ends. Without a terminal, questions are read from stdin too, and answers alone
are written to stdout. Commands:

    /retry            sample the last answer again
    /compare MODEL2   have a second model, or a server's URL, answer the last question too; the conversation stays as it is
    /system TEXT      another system message; none without TEXT
    /reset            forget all turns
    /save FILE        add the conversation to a JSON Lines file, as a record with `messages`
    /help   /exit
"""

import logging
import os
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import SecretStr

from baton import program
from baton.arguments import option, parse
from baton.errors import FailuresListed, InputError
from baton.launch import gpus
from baton.program import harmless
from baton.sampling import seed_from
from baton.servers.pool import base_url
from baton.sources import check_hub, check_model_path, template_input
from generation import engine, get_hf2
from generation.arguments import QUANTIZATION, TRUST_REMOTE_CODE, SamplingArguments, check_sampling
from generation.chat_models import LocalModel, ServedModel, TooLong
from generation.conversation import Conversation, Turn, append_record
from generation.sampling import Completion

log = logging.getLogger("baton")

Model = LocalModel | ServedModel

QUOTES = '"""'
BOLD, PLAIN = "\033[1m", "\033[0m"


class Arguments(SamplingArguments):
    model_name_or_path: str | None = option(None, "the model: a folder or hub name; with --url its name at the server")
    url: str | None = option(None, "the address of a server with the OpenAI API, such as http://host:8000/v1")
    api_key: SecretStr | None = option(None, "the server's API key; $VLLM_API_KEY if not given")
    backend: Literal["vllm", "hf"] | None = option(None, "the engine; if not given, vllm on a GPU, hf (Transformers) on a CPU")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto", "of weights and arithmetic; auto: the checkpoint's, but float32 on a CPU without bfloat16"
    )
    max_model_len: int | None = option(None, "tokens of conversation and answer; the model's context if not given", ge=2)
    tensor_parallel_size: int = option(1, "GPUs that share one copy of the model", ge=1)
    gpu_memory_utilization: float = option(0.9, "share of a GPU's memory", gt=0, le=1)
    quantization: str | None = option(None, QUANTIZATION)
    trust_remote_code: bool = option(False, TRUST_REMOTE_CODE)


def main() -> None:
    engine.prepare_environment()
    words = sys.argv[1:]
    if words and not words[0].startswith("-") and not words[0].endswith((".yaml", ".yml")):
        words = ["--model_name_or_path", *words]
    arguments = parse(Arguments, __doc__ or "", words)
    check(arguments)
    if arguments.check:
        log.info("would talk to %s", arguments.url or f"{arguments.model_name_or_path} in {backend_of(arguments)}")
        return
    os.register_at_fork(after_in_child=os.setpgrp)  # Ctrl-C is for this process, not for an engine's
    Chat(arguments, sys.stdin.isatty() and sys.stdout.isatty()).run()


def check(arguments: Arguments) -> None:
    """Raise InputError for settings that contradict each other, and for a model that is not there."""
    check_sampling(arguments)
    template_input(arguments.chat_template)
    if arguments.url:
        base_url(arguments.url)
        if arguments.chat_template:
            raise InputError("--chat_template: a server applies its own; start it with that template")
        return
    if not arguments.model_name_or_path:
        raise InputError("which model? python generation/chat.py MODEL, or --url http://host:8000")
    check_model_path(arguments.model_name_or_path)
    check_hub(arguments.model_name_or_path, ahead=arguments.check)
    if backend_of(arguments) == "vllm":
        gpus.check_vllm()


def backend_of(arguments: Arguments) -> str:
    """The engine that a model in this process runs in."""
    return arguments.backend or ("vllm" if gpus.visible() else "hf")


def open_model(name: str | None, arguments: Arguments) -> Model:
    """The model of a server where `name` is its address, else one of this process. Raises InputError where there is none."""
    if name and name.startswith(("http://", "https://")):
        return served(name, None, arguments)
    backend, dtype = backend_of(arguments), arguments.dtype
    if dtype == "auto" and not gpus.visible() and not program.cpu_has_bfloat16():
        dtype = "float32"
    shared = {each: getattr(arguments, each) for each in get_hf2.Arguments.model_fields if hasattr(arguments, each)}
    shared |= {"model_name_or_path": name, "backend": backend, "dtype": dtype, "max_num_seqs": 1}
    return LocalModel(get_hf2.Arguments(**shared, dataset_name_or_path="", output_dir="", K=1))


def served(url: str, name: str | None, arguments: Arguments) -> ServedModel:
    """The model called `name`, or the first, of a server. The key of one server is sent to no other host."""
    key = arguments.api_key.get_secret_value() if arguments.api_key else os.environ.get("VLLM_API_KEY")
    if urlsplit(url).netloc != urlsplit(arguments.url or url).netloc:
        key = None
    return ServedModel(base_url(url), name, arguments, key)


class Chat:
    """A conversation with a model: reads questions and commands, shows answers."""

    def __init__(self, arguments: Arguments, on_terminal: bool):
        self.arguments, self.on_terminal = arguments, on_terminal
        self.conversation = Conversation(arguments.system_prompt)
        name = arguments.model_name_or_path
        self.model: Model = served(arguments.url, name, arguments) if arguments.url else open_model(name, arguments)
        if isinstance(self.model, LocalModel):
            self.model.load()
        self.others: dict[str, Model] = {self.model.name: self.model}
        self.sampled = 0  # answers so far: each has random numbers of its own
        self.failures: list[str] = []

    def run(self) -> None:
        """Answer every question. Raises FailuresListed at the end where there is no terminal and one was not answered."""
        sys.stdin.reconfigure(errors="replace")
        sys.stdout.reconfigure(errors="backslashreplace")
        if self.on_terminal:
            import readline  # what `input` edits lines with

            readline.set_auto_history(True)
            tell(f"{self.model.name}: ask; /help lists commands, Ctrl-D ends")
        for text in questions(self.on_terminal):
            try:
                if self.obey(text):
                    break
            except InputError as error:
                self.failures.append(str(error))
                tell(str(error))
        if self.failures and not self.on_terminal:
            raise FailuresListed(f"{len(self.failures)} of the lines were not answered, the first: {self.failures[0]}")

    def obey(self, text: str) -> bool:
        """Carry out a command, or answer a question; returns whether to end."""
        if not text.startswith("/"):
            self.ask(text.strip())
            return False
        word, _, rest = text.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/retry": self.retry,
            "/compare": self.compare,
            "/system": self.set_system,
            "/reset": self.reset,
            "/save": self.save,
            "/help": lambda _: tell((__doc__ or "").partition("Commands:\n\n")[2].rstrip()),
        }
        if word not in ("/exit", "/quit", *commands):
            raise InputError(f"{word}: no command; /help lists them; a question may begin with a space before the /")
        if word in commands:
            commands[word](rest.strip())
        return word not in commands

    def ask(self, question: str) -> None:
        """Answer a question as the conversation's next turn. One that cannot be answered is taken back."""
        self.conversation.turns.append(Turn(question))
        try:
            self.answer_last()
        except InputError:
            self.conversation.turns.pop()
            raise

    def answer_last(self) -> None:
        turn = self.conversation.turns[-1]
        turn.answer = self.shown(self.model, self.conversation)
        turn.model, turn.template = self.model.name, self.model.template

    def shown(self, model: Model, conversation: Conversation) -> Completion:
        """A model's answer to the last question, shown while it is sampled; earlier turns are dropped until there is room."""
        before = list(conversation.turns)
        while True:
            try:
                answer = show(model.answer(conversation.messages(), seed_from(self.arguments.seed, self.sampled)))
                self.sampled += 1
                return answer
            except TooLong as error:
                if len(conversation.turns) == 1:
                    conversation.turns[:] = before
                    raise InputError(f"{error}; ask a shorter question") from None
                question = conversation.turns.pop(0).question
                tell(f"too long for the context of {model.name}: the first turn is dropped ({question[:40]!r})")

    def retry(self, _: str) -> None:
        self.answered("/retry")
        self.answer_last()

    def compare(self, name: str) -> None:
        """Show the last answer again, and then a second model's to the same question."""
        if not name:
            raise InputError("/compare MODEL2: which model? a folder, a hub name, or the URL of a server")
        turn = self.answered("/compare")
        if name not in self.others:
            self.others[name] = open_model(name, self.arguments)
        self.label(turn.model)
        print(visible(turn.answer.text))
        self.label(self.others[name].name)
        self.shown(self.others[name], Conversation(self.conversation.system, list(self.conversation.turns)))

    def set_system(self, text: str) -> None:
        self.conversation.system = text or None
        tell("the system message is changed" if text else "no system message")

    def reset(self, _: str) -> None:
        self.conversation.turns.clear()
        tell("all turns are forgotten")

    def save(self, name: str) -> None:
        if not name:
            raise InputError("/save FILE: which file?")
        append_record(Path(name), self.conversation.record())
        tell(f"{name}: the conversation is added")

    def answered(self, command: str) -> Turn:
        """The last turn. Raises InputError where there is none."""
        if not self.conversation.turns:
            raise InputError(f"{command}: nothing is asked yet")
        return self.conversation.turns[-1]

    def label(self, name: str) -> None:
        """Say whose answer follows."""
        text = f"[{visible(name)}]"
        print(f"{BOLD}{text}{PLAIN}" if self.on_terminal else text, flush=True)


def questions(on_terminal: bool) -> Iterator[str]:
    """Yield what is typed: lines that are not empty, and texts of several lines between lines of three quotation marks.

    Ctrl-C forgets what is being typed.
    """
    while True:
        try:
            text = _line("> " if on_terminal else "")
            if text.strip() == QUOTES:
                lines = []
                while (line := _line(". " if on_terminal else "")).strip() != QUOTES:
                    lines.append(line)
                text = " " + "\n".join(lines)  # no command, whatever it begins with
        except EOFError:
            return
        except KeyboardInterrupt:
            if not on_terminal:
                raise
            tell("\nCtrl-D ends")
            continue
        if text.strip():
            yield text


def _line(sign: str) -> str:
    """The next line of stdin. Raises EOFError at its end."""
    if sign:
        return input(sign)
    if not (line := sys.stdin.readline()):
        raise EOFError
    return line.rstrip("\n")


def show(pieces: Generator[str | Completion]) -> Completion:
    """Write an answer to stdout piece by piece; returns it. Ctrl-C stops it: its finish reason is then `abort`."""
    text, answer = "", None
    with closing(pieces):
        try:
            for piece in pieces:
                if isinstance(piece, Completion):
                    answer = piece
                else:
                    text += piece
                    print(visible(piece), end="", flush=True)
        except KeyboardInterrupt:
            tell(" [stopped]")
    print(flush=True)
    return answer or Completion(text, None, "abort")


def visible(text: str) -> str:
    """What a model says, harmless on a terminal, its line breaks and tabs kept."""
    return "".join(c if c in "\n\t" else harmless(c) for c in text)


def tell(text: str) -> None:
    """Say something about the program itself, which is no answer."""
    print(visible(text), file=sys.stderr, flush=True)


if __name__ == "__mp_main__":  # an engine process, started by spawn
    engine.die_with_parent()
    os.setpgrp()

if __name__ == "__main__":
    program.run(main)
