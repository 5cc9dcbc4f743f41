"""What an online program has before its first step: configuration, tokenizer, prompts, servers, models, and their loop."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from baton import jsonl, program
from baton.errors import InputError
from baton.mixing import Selection
from baton.models.templates import load_tokenizer, prompt_token_ids, response_token_ids
from baton.online import setup
from baton.online.arguments import OnlineArguments, steps_of
from baton.online.collect import Collector, HowToSample, step_file, why_none
from baton.online.engines import Engines, engines, shares_gpus
from baton.online.learner import Learner
from baton.online.loop import Algorithm, Loop
from baton.online.models import same_tokens
from baton.online.prompts import Prompts, tokenised_prompts
from baton.online.samples import Samples
from baton.prompts import PromptSet, read_records
from baton.sources import loading
from baton.stage import Stage

log = logging.getLogger("baton")


class Start:
    """Everything but the algorithm. Raises InputError where settings, prompts and models do not fit each other."""

    def __init__(self, arguments: OnlineArguments, stage: Stage, metrics_path: Path, critic: str | None = None):
        self.arguments, self.stage, self.metrics_path = arguments, stage, metrics_path
        self.config = setup.configuration(arguments, stage)
        setup.factor_of(arguments.lr_scheduler_type, arguments.warmup_steps, 1)  # refuses what it does not know
        self.accelerator = setup.accelerator_of(arguments, self.config, str(metrics_path.parent))
        self.tokenizer = tokenizer_of(arguments, critic)
        self.prompts, self.drops = self._tokenised(arguments.dataset_name_or_path, "prompts", arguments.max_samples)
        self.held_out = self._tokenised(arguments.eval_dataset, "held_out", None)[0] if arguments.eval_dataset else None
        self.steps = steps_of(arguments, len(self.prompts))

    def _tokenised(self, source: str, name: str, most: int | None) -> Any:
        arguments = self.arguments
        found = PromptSet(
            source, arguments.dataset_key, arguments.dataset_split, Selection(max_samples=most), arguments.system_prompt
        )
        return tokenised_prompts(found, self.tokenizer, arguments.max_prompt_length, self.config, name, arguments.seed)

    @contextmanager
    def engines(self) -> Iterator[Engines | None]:
        """Context in which the servers run; they are those of process 0, and None in the others."""
        if program.rank() != 0:
            yield None
            return
        context = self.arguments.max_prompt_length + self.arguments.max_new_tokens
        self._check_context(context)
        folder = Path(f"{self.stage.output}.servers")
        with engines(self.arguments, context, folder, self.accelerator.device.type) as running:
            yield running

    def _check_context(self, context: int) -> None:
        """Raise InputError where the policy has fewer positions than a prompt and a response may take."""
        model = self.arguments.model_name_or_path
        limit = getattr(AutoConfig.from_pretrained(model).get_text_config(), "max_position_embeddings", None)
        if limit is not None and context > limit:
            raise InputError(
                f"`max_prompt_length` and `max_new_tokens`: {context} tokens together, and {model} has {limit} positions"
            )

    def learner(self, critic: str | None = None, **more: float) -> Learner:
        """As `setup.learner_of`."""
        with loading(self.arguments.model_name_or_path):
            return setup.learner_of(self.arguments, self.config, self.accelerator, critic, **more)

    def reference(self) -> Any | None:
        """As `setup.reference_of`."""
        return setup.reference_of(self.arguments, self.config)

    def demonstrations(self, source: str | None) -> Samples | None:
        """Demonstrations as samples, of which the last response is learnt; None without a source."""
        if source is None:
            return None
        return Samples.of([self._demonstration(where, record) for where, record in read_records(source)])

    def _demonstration(self, where: str, record: jsonl.Record) -> jsonl.Record:
        messages = record.get("messages")
        if not isinstance(messages, list) or len(messages) < 2 or messages[-1].get("role") != "assistant":
            raise InputError(f"{where}: `messages` must be a conversation that ends with the assistant")
        *prompt, last = messages
        ids = response_token_ids(self.tokenizer, prompt, last["content"], True, where)
        return {
            "prompt_token_ids": prompt_token_ids(self.tokenizer, prompt, where), "responses": [last["content"]],
            "response_token_ids": [ids], "response_logps": [[0.0] * len(ids)], "finish_reasons": ["stop"], "rewards": [0.0],
        }  # fmt: skip

    def loop(self, learner: Learner, algorithm: Algorithm, running: Engines | None, warn: Any) -> Loop:
        """The loop of these parts."""
        arguments = self.arguments
        collector = self.collector(running, "rollouts", self.prompts, arguments.K, arguments.rollout_batch_size)
        return Loop(
            learner=learner,
            algorithm=algorithm,
            folder=self.stage.partial_folder,
            metrics_path=self.metrics_path,
            engines=running,
            collector=collector,
            total_steps=self.steps,
            save_steps=arguments.save_steps,
            eval_steps=arguments.eval_steps,
            staleness=arguments.staleness,
            shares_gpus=shares_gpus(arguments),
            evaluate=self.evaluation(running),
            warn=warn,
        )

    def collector(self, running: Engines | None, name: str, prompts: Prompts, K: int, size: int) -> Collector | None:
        """What collects rollouts into the folder `name`: in process 0, None in the others."""
        if running is None:
            return None
        arguments, most = self.arguments, int(self.arguments.dynamic_sampling * size)
        how = HowToSample(size, K, sampling(arguments), arguments.seed, most)
        return Collector(self.stage.partial_folder / name, prompts, running.rollouts, running.rewards, how)

    def evaluation(self, running: Engines | None) -> Any:
        """A function that samples and scores the held-out prompts and returns metrics; None where there are none."""
        if self.held_out is None:
            return None
        size = len(self.held_out)
        collector = self.collector(running, "heldout", self.held_out, self.arguments.eval_K, size)
        return partial(evaluate, collector, [self.held_out.first(number) for number in range(size)])


def evaluate(collector: Collector, records: list[jsonl.Record], step: int) -> dict[str, float]:
    """Sample and score `records` after a step, into a file; returns the mean reward and length.

    And how many have no reward, where some have none.
    """
    scored = dict(collector.annotated(records, range(len(records)), 0, step))
    path = step_file(collector.folder, step)
    jsonl.write(path, (scored[place] for place in range(len(records))))
    rewards = [reward for record in scored.values() for reward in record.get("rewards", ())]
    lengths = [len(ids) for record in scored.values() for ids in record["response_token_ids"]]
    without = [record for record in scored.values() if "rewards" not in record]
    if not rewards:
        raise InputError(f"{path}: no held-out response has a reward: {why_none(without)}")
    if without:
        log.warning(
            "step %d: without a reward, %d of %d held-out prompts: %s", step, len(without), len(scored), why_none(without)
        )
    more = {"without_reward": float(len(without))} if without else {}
    return {"reward": sum(rewards) / len(rewards), "length": sum(lengths) / len(lengths)} | more


def sampling(arguments: OnlineArguments) -> dict[str, Any]:
    """vLLM's settings of the sampling."""
    settings = {name: getattr(arguments, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    return {**settings, "min_tokens": arguments.min_new_tokens, "max_tokens": arguments.max_new_tokens}


def tokenizer_of(arguments: OnlineArguments, critic: str | None) -> Any:
    """The policy's tokenizer. Raises InputError where a model that reads its token ids has another one."""
    model = arguments.model_name_or_path
    tokenizer = load_tokenizer(model, arguments.chat_template)
    for other in {arguments.ref_model, critic} - {None, model}:
        if difference := same_tokens(tokenizer, load_tokenizer(other, arguments.chat_template)):
            raise InputError(f"{other}: reads the policy's token ids, but its tokenizer is not that of {model}: {difference}")
    return tokenizer
