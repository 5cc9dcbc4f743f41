"""For all tests: no random input has a time limit, since tests do not assert speed and machines are busy."""

from hypothesis import settings

settings.register_profile("baton", deadline=None)
settings.load_profile("baton")
