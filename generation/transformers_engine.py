"""Sampling with Transformers where vLLM cannot run: slow, for small models."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from threading import Event
from typing import Any

from baton import program
from baton.errors import InputError
from baton.models.templates import response_text
from baton.sampling import seed_from
from generation.sampling import Completion, Task, prompt_seed

SEQUENCES = 32  # responses sampled at once, if --max_num_seqs does not say


class Sampler:
    """A loaded model: called with tasks, it yields each with its K completions, batch after batch."""

    def __init__(self, model: Any, tokenizer: Any, arguments: Any):
        self.model, self.tokenizer, self.arguments = model, tokenizer, arguments
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.context = arguments.max_model_len or limit
        eos = model.generation_config.eos_token_id
        known = [eos] if isinstance(eos, int) else list(eos or ())
        self.ends = sorted({*known, *arguments.eos_ids, tokenizer.eos_token_id} - {None})
        # A model's own settings may hold a min-p, a repetition penalty and more, which nobody has asked for.
        model.generation_config = type(model.generation_config)()

    def __call__(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, list[Completion]]]:
        arguments, tasks = self.arguments, iter(tasks)
        # One prompt at a time where its random numbers must not depend on its neighbours.
        size = 1 if arguments.reproducible else max(1, (arguments.max_num_seqs or SEQUENCES) // arguments.K)
        while batch := list(islice(tasks, size)):
            for part in self._parts(batch):
                yield from zip(part, self._sample(part), strict=True)

    def stream(self, task: Task, seed: int) -> Iterator[str | Completion]:
        """Sample one response: yields its text piece by piece, and last of all the completion."""
        import torch
        from transformers import TextIteratorStreamer

        torch.manual_seed(seed)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        given_up = Event()
        with ThreadPoolExecutor(1) as thread:
            sampling = thread.submit(
                self._sample, [task], streamer, [lambda ids, *_, **__: ids.new_tensor([given_up.is_set()]).bool()]
            )
            sampling.add_done_callback(lambda _: streamer.text_queue.put(streamer.stop_signal))  # also where it failed
            try:
                yield from until_stop(streamer, [] if self.arguments.min_new_tokens else self.arguments.stop)
                yield sampling.result()[0][0]
            except BaseException:  # Ctrl-C, or the answer is not read to its end
                given_up.set()
                raise

    def _parts(self, batch: list[Task]) -> list[list[Task]]:
        """The tasks that have room for a whole response, together, and each other one alone: a batch ends where it has to."""
        room = (self.context or 1 << 30) - self.arguments.max_new_tokens
        fitting = [task for task in batch if len(task.token_ids) <= room]
        others = [[task] for task in batch if len(task.token_ids) > room]
        return [fitting, *others] if fitting else others

    def _sample(self, batch: list[Task], streamer: Any = None, watching: Sequence[Any] = ()) -> list[list[Completion]]:
        """K completions for each task of a batch, prompts padded on the left.

        `streamer` and the stopping criteria `watching` are Transformers', for one response that is read while it is sampled.
        """
        import torch

        arguments = self.arguments
        if arguments.reproducible:
            torch.manual_seed(prompt_seed(arguments, batch[0].record))
        length = max(len(task.token_ids) for task in batch)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.ends[0]
        ids = torch.tensor([[pad] * (length - len(t.token_ids)) + t.token_ids for t in batch])  # (B, T)
        mask = torch.tensor([[0] * (length - len(t.token_ids)) + [1] * len(t.token_ids) for t in batch])
        logps = SampledLogps() if arguments.response_logps else None
        sampled = self.model.generate(  # (B * K, T + new)
            input_ids=ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            num_return_sequences=arguments.K,
            max_new_tokens=min(arguments.max_new_tokens, self.context - length if self.context else 1 << 30),
            pad_token_id=pad,
            eos_token_id=self.ends,
            min_new_tokens=arguments.min_new_tokens,
            stopping_criteria=[*self._stopping(length), *watching],
            streamer=streamer,
            do_sample=arguments.temperature > 0,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            logits_processor=[*_warpers(arguments), *([logps] if logps else [])],
        )
        kept = logps.of(sampled).tolist() if logps else [None] * len(sampled)
        rows = enumerate(zip(sampled[:, length:].tolist(), kept, strict=True))
        completions = [self._completion(batch[place // arguments.K], *row) for place, row in rows]
        return [completions[i : i + arguments.K] for i in range(0, len(completions), arguments.K)]

    def _completion(self, task: Task, row: list[int], logps: list[float] | None) -> Completion:
        """A row of new tokens, cut after its end-of-turn token or at its stop string; the text is that which vLLM writes."""
        end = next((place for place, id_ in enumerate(row) if id_ in self.ends), None)
        ids = row[:end]
        text = response_text(self.tokenizer, task.token_ids, ids)
        if places := self._stops(task, ids, text):
            while self._stops(task, ids[:-1], response_text(self.tokenizer, task.token_ids, ids[:-1])):
                ids = ids[:-1]
            return Completion(text[: min(places)], ids, "stop", logps and logps[: len(ids)])
        if end is None:
            return Completion(text, ids, "length", logps)
        return Completion(text, row[: end + 1], "stop", logps and logps[: end + 1])

    def _stops(self, task: Task, ids: list[int], text: str) -> list[int]:
        """Where in the text of `ids` each stop string that it holds begins; the least number of tokens is not searched."""
        if not self.arguments.stop:
            return []
        start = len(response_text(self.tokenizer, task.token_ids, ids[: self.arguments.min_new_tokens or 0]))
        return [place for stop in self.arguments.stop if (place := text.find(stop, start)) >= 0]

    def _stopping(self, length: int) -> list["StopStrings"]:
        """The criterion for stop strings, if there are any, in what follows `length` tokens of the prompt."""
        start = length + (self.arguments.min_new_tokens or 0)
        return [StopStrings(self.tokenizer, self.arguments.stop, start)] if self.arguments.stop else []


def start(arguments: Any, tokenizer: Any, already_done: int) -> Sampler:
    """Load the model on the GPU, or on the CPU where there is none, and log what it runs on."""
    import torch
    from transformers import AutoModelForCausalLM

    if arguments.tensor_parallel_size > 1:
        raise InputError("--backend hf does not support --tensor_parallel_size")
    if arguments.quantization:
        raise InputError("--backend hf does not support --quantization")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            arguments.model_name_or_path, dtype=arguments.dtype, trust_remote_code=arguments.trust_remote_code
        )
    except ValueError as error:  # it needs code of its own, or is no language model
        raise InputError(f"{arguments.model_name_or_path}: cannot be loaded: {error}") from None
    model.to(device).eval()
    torch.manual_seed(seed_from(arguments.seed, arguments.iter, arguments.local_index, already_done))
    program.log_what_runs(
        backend="transformers",
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        dtype=str(model.dtype).removeprefix("torch."),
        attention=model.config._attn_implementation,
    )
    return Sampler(model, tokenizer, arguments)


def _warpers(arguments: Any) -> list[Any]:
    """What turns the model's logits into those that are sampled from; transformers' own would run after `SampledLogps`."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers: list[Any] = []
    if arguments.temperature == 0:
        return warpers
    if arguments.temperature != 1:
        warpers.append(TemperatureLogitsWarper(arguments.temperature))
    if arguments.top_k > 0:
        warpers.append(TopKLogitsWarper(arguments.top_k))
    if arguments.top_p < 1:
        warpers.append(TopPLogitsWarper(arguments.top_p))
    return warpers


def until_stop(pieces: Iterator[str], stop: list[str]) -> Iterator[str]:
    """The text of `pieces` up to the first stop string; what may be the beginning of one is held back."""
    held, longest = "", max(map(len, stop), default=0)
    for piece in pieces:
        held += piece
        places = [place for each in stop if (place := held.find(each)) >= 0]
        if places:
            yield held[: min(places)]
            return
        ready = max(0, len(held) - max(0, longest - 1))
        yield held[:ready]
        held = held[ready:]
    yield held


class StopStrings:
    """As a stopping criterion: whether a row's text holds a stop string by now, special tokens left out as in its response.

    Transformers' own criterion reads special tokens too, so that it stops rows, and pads them, where no response ends.
    """

    def __init__(self, tokenizer: Any, stop: list[str], start: int):
        self.tokenizer, self.stop, self.start = tokenizer, stop, start
        self.window = 4 * (1 + max(map(len, stop)))  # tokens that hold the latest stop string: a character is 4 bytes at most

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """Takes ids (B, T); returns bool (B,)."""
        latest = input_ids[:, max(self.start, input_ids.shape[1] - self.window) :]
        texts = self.tokenizer.batch_decode(latest, skip_special_tokens=True)
        return input_ids.new_tensor([any(stop in text for stop in self.stop) for text in texts]).bool()


class SampledLogps:
    """As the last of the logits processors: the log-probability of each token that was sampled.

    A step's token is known at the next one, so the scores of a single step are held.
    """

    def __init__(self) -> None:
        self.scores, self.logps = None, []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Takes ids (B, T) and scores (B, vocabulary) of the next token, and leaves the scores as they are."""
        self._add(input_ids)
        self.scores = scores
        return scores

    def of(self, sampled: Any) -> Any:
        """The log-probabilities (B, new) of all sampled tokens; `sampled` are the finished ids (B, T + new)."""
        import torch

        self._add(sampled)
        return torch.stack(self.logps, dim=1)

    def _add(self, input_ids: Any) -> None:
        if self.scores is not None:
            chosen = self.scores.gather(1, input_ids[:, -1:])[:, 0]
            self.logps.append(chosen - self.scores.logsumexp(1))
