"""What holds for all tests.

Where pytest-xdist runs them in several processes (`make test`), those of a file stay together: they share what it sets
up.

Models are tiny: a second thread costs more than it brings, and much more where other programs run. And no test fails
for its time: hypothesis sets no deadline.
"""

import os
import signal
from typing import Any

import hypothesis
import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# A shell that starts the tests in the background lets them ignore Ctrl-C, and so would everything that they start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("modsquad", deadline=None)
hypothesis.settings.load_profile("modsquad")

# Files that one process runs, for the results of ranks that they share (`tests.trainer.worlds.launched`).
TOGETHER = (
    "tests/trainer/test_engine.py",
    "tests/trainer/checkpoint/test_reading.py",
    "tests/trainer/checkpoint/test_saving.py",
)
# The longest, begun first: no process is to be left with one of them at the end. With the marker `faults`, too.
LONG = (
    "tests/cluster/test_launch.py",
    "tests/cluster/test_launch_interruptions.py",
    "tests/test_readme.py",
    "tests/trainer/checkpoint/test_relayout.py",
    "tests/trainer/cli/test_bench.py",
    "tests/trainer/test_parity.py",
    "tests/trainer/test_quickstart.py",
)


def pytest_runtest_setup() -> None:
    torch.manual_seed(0)  # which is another one in every process otherwise


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.nodeid.partition("::")[0] not in LONG)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Schedule by file, as `--dist loadfile` does, and the files of `TOGETHER` as one."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return TOGETHER[0] if file in TOGETHER else file

    return Scheduling(config, log)
