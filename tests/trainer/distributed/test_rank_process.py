"""A rank's exit: the status, the line, and no process group left."""

import signal
import sys

import pytest
import torch.distributed as dist

from cluster.env import RankEnv
from configs.errors import UserError
from configs.schema import ParallelConfig
from trainer.distributed.interruption import Interrupted
from trainer.distributed.rank_process import run_to_the_end
from trainer.engine import init_distributed


def ending_with(error: Exception | None) -> None:
    init_distributed(RankEnv(), ParallelConfig())
    if error is not None:
        raise error


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (None, 0, ""),
        (UserError("no space"), 2, "error: no space\n"),
        (Interrupted(signal.SIGUSR2, 7), 140, "interrupted by SIGUSR2 after step 7; saved; the same command goes on"),
        (Interrupted(signal.SIGTERM, 7), 143, "interrupted by SIGTERM after step 7; saved; the same command goes on"),
    ],
)
def test_the_end_of_a_rank(error: Exception | None, status: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_to_the_end(lambda: ending_with(error), RankEnv()) == status
    assert not dist.is_initialized()
    assert capsys.readouterr().err.startswith(line)


def test_debugging_shows_the_traceback_of_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_to_the_end(lambda: ending_with(UserError("no space")), RankEnv(), debug=True) == 1
    assert "Traceback" in capsys.readouterr().err


def test_our_own_faults_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_to_the_end(lambda: 1 / 0, RankEnv())


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer [10.0.0.1]:9. This is typically"),
            75,
        ),
        (RuntimeError("[gloo] Timed out waiting 1000ms for recv operation to complete"), 75),
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error\nncclRemoteError"), 75),
        (dist.DistBackendError("NCCL error: invalid usage\nDuplicate GPU detected"), None),
        (dist.DistBackendError("NCCL error: unhandled cuda error (run with NCCL_DEBUG=INFO for details)"), None),
        (ConnectionResetError("Connection reset by peer"), None),  # of a shard that comes over the network
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    ],
)
def test_only_the_loss_of_a_rank_is_worth_another_try(
    error: Exception, status: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    env = RankEnv(rank=1, world=2)
    if status is None:
        with pytest.raises(type(error)):
            run_to_the_end(fail, env)
        return
    assert run_to_the_end(fail, env) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert "gloo" not in line
    assert "the same command goes on from the last checkpoint" in line


def test_where_there_are_gpus_a_rank_that_lost_another_does_not_wait_for_its_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise RuntimeError("Connection closed by peer")

    module = "trainer.distributed.rank_process"
    monkeypatch.setattr(f"{module}.torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(f"{module}.close_distributed", lambda: pytest.fail("waits"))
    monkeypatch.setattr(f"{module}.end_at_once", sys.exit)
    with pytest.raises(SystemExit) as ended:
        run_to_the_end(fail, RankEnv(rank=1, world=2))
    assert ended.value.code == 75
