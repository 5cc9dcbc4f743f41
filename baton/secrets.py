"""Settings that hold a secret, which no manifest, log or command line may show."""

import re
from collections.abc import Iterable

ENDINGS = ("api_key", "password", "secret")
# Names like `eos_token` are those of a tokenizer's tokens.
TOKENIZER_TOKENS = {f"{kind}_token" for kind in "pad eos bos unk mask sep cls image".split()}
QUOTED_KEY = re.compile(r"""["']([\w-]+)["']\s*:""")


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret, spelled with `_` or `-`.

    Names that end in api_key, password or secret do, and those whose last word is token, but for a tokenizer's tokens.
    """
    name = name.lower().replace("-", "_")
    if name.endswith(ENDINGS):
        return True
    return name.rpartition("_")[2] == "token" and name not in TOKENIZER_TOKENS


def secret_among(words: Iterable[str]) -> str | None:
    """The first flag on a command line, or key in a flag's JSON value, that holds a secret; None if none does."""
    for word in words:
        flag = word.partition("=")[0]
        if flag.startswith("--") and is_secret(flag[2:]):
            return flag
        for key in QUOTED_KEY.findall(word):
            if is_secret(key):
                return f'"{key}"'
    return None
