"""What holds for all tests.

Models are tiny: a second thread costs more than it brings, and much more where other programs run. And no test fails
for its time: hypothesis sets no deadline.
"""

import os

import hypothesis
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

hypothesis.settings.register_profile("modsquad", deadline=None)
hypothesis.settings.load_profile("modsquad")
