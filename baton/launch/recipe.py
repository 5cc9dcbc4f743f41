"""A recipe of scripts/run_loop.sh: what can be wrong with its variables, said before any stage starts."""

import difflib
import os
import re
from collections.abc import Collection, Sequence

from baton.errors import InputError
from baton.launch.unit import refuse_secrets

# Flags that have a variable of the recipe, which gives them to all stages that need them.
VARIABLES = {
    "--chat_template": "CHAT_TEMPLATE",
    "--system_prompt": "SYSTEM_PROMPT",
    "--dataset_key": "DATASET_KEY",
    "--rollout_batch_size": "ROLLOUT_BATCH_SIZE",
    "--K": "K or HELDOUT_K",
    "--seed": "SEED",
    "--scorer": "SCORERS",
    "--weights": "WEIGHTS",
    "--reward_name_or_path": "REWARD_MODEL",
}
# Flags that choose prompts: in GENERATE_ARGS they would cut the held-out set too.
CHOOSE_PROMPTS = ("--max_samples", "--dataset_probs", "--dataset_split", "--iter", "--data_seed")
OF_THE_SHELL = re.compile(r"BASH.*|PIPESTATUS|MAPFILE|OPTARG|OPTIND|REPLY|FUNCNAME|LINENO|_")


def check(recipe: str, words: Sequence[tuple[str, str]], known: Collection[str], new: Collection[str]) -> None:
    """Raise InputError for a variable that there is not, or a word that cannot be what was meant.

    Args:
        recipe: its path, for messages.
        words: (variable, word) of every variable of flags.
        known: the variables that a recipe may set.
        new: all shell variables that the recipe has set. Names in lower case are its own, unless in upper case they are
            known; exported ones are for programs.
    """
    for name in new:
        own = name.islower() and name.upper() not in known
        if name not in known and name not in os.environ and not own and not OF_THE_SHELL.fullmatch(name):
            near = difflib.get_close_matches(name.upper(), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise InputError(
                f"{recipe}: unknown variable {name}: {hint} (settings of sampling, scoring and training go into GENERATE_ARGS, "
                "REWARD_ARGS and DPO_ARGS, as flags; a variable of the recipe's own is written in lower case, one for programs "
                "is exported)"
            )
    refuse_secrets(recipe, [word for _, word in words])
    for name, word in words:
        flag, _, _ = word.partition("=")
        if re.match(r"--\w+\s", word):
            raise InputError(f"{recipe}: {name}: '{word}' is one word: write {name}=({word}), with parentheses and no quotes")
        if flag in VARIABLES and not (name == "REWARD_ARGS" and flag == "--chat_template"):
            raise InputError(f"{recipe}: {name}: instead of {flag}, set {VARIABLES[flag]}, which all stages get")
        if name == "GENERATE_ARGS" and flag in CHOOSE_PROMPTS:
            raise InputError(
                f"{recipe}: GENERATE_ARGS: {flag} would choose among the held-out prompts too: put it into PROMPT_ARGS, or "
                "into HELDOUT_ARGS for those"
            )
