import os
import signal

import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for its background jobs
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
torch.set_num_threads(1)  # the models of the tests are too small to gain from more


@pytest.fixture(autouse=True, scope="session")
def separate_cache(tmp_path_factory):
    """Keep the user's cache of converted images apart from that of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def same_seed_for_every_test():
    """Random draws of a test do not depend on which tests ran before it."""
    torch.manual_seed(0)
