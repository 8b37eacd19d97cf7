"""Models of tests are tiny: a second thread costs more than it brings, and much more where other programs run."""

import os

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
