"""Ranks that meet where there are GPUs: each has its own, or all end with one line."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed

from cluster.env import RankEnv, free_port
from cluster.places import Place
from configs.errors import UserError
from tests.fake_gpus import python_path_with_gpus
from trainer.distributed.process_groups import join_world

ROOT = Path(__file__).parents[3]

# gloo in NCCL's place: the GPUs are none.
PROGRAM = """
import os, sys
import torch.distributed as dist
from cluster.env import detect
from trainer.distributed import process_groups
from trainer.distributed.rank_process import run_to_the_end

init = dist.init_process_group
dist.init_process_group = lambda backend, **options: init("gloo", **options)

def meet():
    for _ in range(2):
        process_groups.join_world(detect(), 60.0)
        print(os.environ["LOCAL_RANK"])

sys.exit(run_to_the_end(meet, detect()))
"""


def start(local_ranks: list[int], gpus: int, folder: Path) -> list[tuple[int, str, str]]:
    """Return the status, output and errors of ranks that meet."""
    port, path = free_port(), python_path_with_gpus(folder / "site", gpus)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            cwd=ROOT,
            env={
                **os.environ,
                **RankEnv(rank=rank, world=len(local_ranks), local_rank=local_rank, master_port=port).variables(),
                "PYTHONPATH": path,
                "DS_ACCELERATOR": "cpu",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, local_rank in enumerate(local_ranks)
    ]
    ended = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, out, err) for process, (out, err) in zip(processes, ended, strict=True)]


def test_a_rank_that_sees_its_own_gpu_alone_keeps_it(tmp_path: Path) -> None:
    ((status, printed, _),) = start([3], 1, tmp_path)
    assert (status, printed) == (0, "0\n0\n")


def test_two_ranks_on_one_gpu_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "trainer.distributed.process_groups"
    places = [Place("a", {0}, "GPU-1"), Place("a", {0}, "GPU-1")]
    monkeypatch.setattr(f"{module}.Meeting", lambda *_: mock.Mock(store=torch.distributed.HashStore()))
    monkeypatch.setattr(f"{module}._meeting", [])
    monkeypatch.setattr(f"{module}.dist.init_process_group", mock.Mock())
    monkeypatch.setattr(f"{module}.gather_places", lambda gpu: places)
    with (
        pytest.raises(UserError, match="ranks 0 and 1 have the same GPU of a: start one rank per GPU"),
        mock.patch.dict(os.environ),
    ):
        join_world(RankEnv(rank=1, world=2, local_rank=1), 1.0)


def test_each_rank_has_a_gpu_of_its_own(tmp_path: Path) -> None:
    assert [(status, printed) for status, printed, _ in start([0, 1], 2, tmp_path)] == [(0, "0\n0\n"), (0, "1\n1\n")]
