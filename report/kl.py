"""Where the KL estimate holds: only where the policy's own distribution was sampled, and the same tokens were scored.

What was done is in the manifests: of the evaluated file, and of the files that it was made from, back to the sampling.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from baton.manifest import read_manifest
from baton.sampling import changes, words
from report.metrics import Round

Manifest = dict[str, Any]

ASSUMED = "KL assumes temperature 1 and top-p 1: no manifest says how the held-out responses were sampled"


def checked(path: Path, prompts: Round) -> tuple[Round, str | None]:
    """One round's prompts, without log-ratios where those estimate no KL, and a sentence about that, or None.

    `path` is the evaluated file that the round was read from.
    """
    manifests = list(history(path))
    reason = obstacle(manifests, any(prompt.by_sampler for prompt in prompts.values()))
    if reason:
        without = {id_: replace(prompt, log_ratio=None) for id_, prompt in prompts.items()}
        return without, f"KL is left out: {reason}"
    measured = any(prompt.log_ratio is not None for prompt in prompts.values())
    return prompts, ASSUMED if measured and not any(map(sampled, manifests)) else None


def obstacle(manifests: Sequence[Manifest], by_sampler: bool) -> str | None:
    """Why log-ratios of responses with this history estimate no KL, or None.

    `by_sampler`: whether the policy's log-probabilities are those that sampling kept.
    """
    generations = [manifest for manifest in manifests if sampled(manifest)]
    for manifest in generations:
        if changed := changes(manifest["arguments"]):
            return f"the held-out responses were sampled at {words(changed)}"
    scorings = [manifest for manifest in manifests if manifest["stage"] == "logps"]
    templates = {manifest["inputs"].get("chat_template", {}).get("hash") for manifest in (*generations, *scorings)}
    if generations and scorings and len(templates) > 1:
        return "the held-out responses were sampled with one --chat_template and scored with another"
    again = sum(facts["responses"] for m in scorings for note, facts in m.get("noted", {}).items() if "tokenised again" in note)
    if by_sampler and again:
        return f"get_logps.py tokenised {again} responses again, so the tokens that it scored are not those that were sampled"
    return None


def sampled(manifest: Manifest) -> bool:
    """Whether a manifest is of sampling: of a shard, or of responses of servers."""
    return manifest["stage"].startswith("generate")


def history(output: Path) -> Iterator[Manifest]:
    """Yield the manifest of a file, then those of the files that it was made from; nothing where there is none.

    A file that is no longer at its path, as in a run's folder that was moved, is looked for beside its successor. A gold scorer
    that is no stage leaves no manifest: what it was given is beside its output.
    """
    output = output.resolve()
    manifest = read_manifest(output)
    if manifest is None:
        if output.name == "data_with_gold.jsonl":
            yield from history(output.with_name("data_with_logps.jsonl"))
        return
    yield manifest
    for name, known in manifest["inputs"].items():
        if name == "dataset" or name.startswith("shard"):
            path = Path(known["path"]).resolve()
            source = path if path.exists() else output.with_name(path.name)
            if source != output:
                yield from history(source)


def notes(sentences: Sequence[str | None], rounds: Sequence[dict[str, Any]]) -> list[str]:
    """What the report says of the KL, from a sentence or None for each round, and the rounds' summaries."""
    said = []
    for sentence in dict.fromkeys(filter(None, sentences)):
        numbers = [str(number) for number, other in enumerate(sentences) if other == sentence]
        some = f" (round {words(numbers)})" if len(numbers) < len(sentences) else ""
        said.append(f"{sentence}{some}.")
    if rounds[0]["kl"] is not None:
        said.append(f"KL: method's error: {rounds[0]['kl']:.2g} nats at round 0, whose policy is the model compared with.")
    return said
