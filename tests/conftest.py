"""For all tests: no random input has a time limit, since tests do not assert speed and machines are busy; imports are fast."""

from hypothesis import settings

from baton.program import start_faster, started

start_faster()

settings.register_profile("baton", deadline=None)
settings.load_profile("baton")


def pytest_collection_finish():
    started()
