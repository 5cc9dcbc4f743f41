"""Settings that hold a secret, which no manifest, log or command line may show."""

NAMES = {"token", "hub_token", "push_to_hub_token", "use_auth_token"}
ENDINGS = ("api_key", "password", "secret")


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret."""
    return name in NAMES or name.endswith(ENDINGS)
