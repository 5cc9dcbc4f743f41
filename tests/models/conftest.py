"""For the tests of models: one thread. Models this small are slower on several, much slower on a busy machine."""

from tests.models.tiny_models import one_thread

__all__ = ["one_thread"]
