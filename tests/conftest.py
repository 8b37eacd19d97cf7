"""What holds for all tests.

Where pytest-xdist runs them in several processes (`make test`), tests of a file stay together, since they share what it
sets up, and so do files with a mark `xdist_group` in common.

Models are tiny: a second thread costs more than it brings, and much more where other programs run. And no test fails
for its time: hypothesis sets no deadline.
"""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

hypothesis.settings.register_profile("modsquad", deadline=None)
hypothesis.settings.load_profile("modsquad")

# The longest, begun first: no process is to be left with one of them at the end. With the marker `faults`, too.
LONG = [
    "cluster/test_launch.py",
    "test_readme.py",
    "test_own_data.py",
    "trainer/checkpoint/test_relayout.py",
    "cluster/test_launch_interruptions.py",
]


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    here = Path(__file__).parent
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: str(item.path.relative_to(here)) not in LONG)
