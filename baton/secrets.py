"""What no manifest, log or command line may show: settings that hold a secret, and credentials in addresses."""

import re
from typing import Any

NAMES = {"token", "hub_token", "push_to_hub_token", "use_auth_token"}
ENDINGS = ("api_key", "password", "secret")


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret."""
    return name in NAMES or name.endswith(ENDINGS)


def without_credentials(value: Any) -> Any:
    """A text, or a list of them, without the user and password that an address in it may hold."""
    if isinstance(value, list):
        return [without_credentials(inner) for inner in value]
    return re.sub(r"://[^/@\s]+@", "://", value) if isinstance(value, str) else value
