"""The place of a process in the world, from the variables of each launcher."""

import pytest

from cluster.env import RankEnv, choose_gpu, detect
from configs.errors import UserError

LAUNCHER_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID",
    "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_STEP_NODELIST",
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_there_is_one_rank_with_a_free_port() -> None:
    env = detect()
    assert (env.rank, env.world, env.is_main) == (0, 1, True)
    assert env.master_port > 0


def test_torchrun_variables_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = RankEnv(rank=3, world=4, local_rank=1, master_addr="10.0.0.1", master_port=29400)
    for name, value in expected.variables().items():
        monkeypatch.setenv(name, value)
    assert detect() == expected


def test_slurm_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "MASTER_ADDR": "node1",
        "MASTER_PORT": "23456",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    env = detect()
    assert (env.rank, env.world, env.local_rank, env.master_addr) == (5, 8, 1, "node1")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("a-2,b[1-9]", "a-2"), ("rack1-n[003-007,12],b", "rack1-n003"), ("n[7,9]-ib", "n7-ib")],
)
def test_ranks_of_srun_alone_meet_on_its_first_node(monkeypatch: pytest.MonkeyPatch, nodes: str, first: str) -> None:
    for name, value in {
        "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": nodes,
        "SLURM_JOB_ID": "123456789",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    env = detect()
    assert (env.rank, env.world, env.master_addr) == (1, 2, first)
    assert env.master_port == detect().master_port == 26789


def test_a_batch_script_of_many_tasks_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    assert (detect().rank, detect().world) == (0, 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"MASTER_PORT": None}, "MASTER_PORT is not"),
        ({"WORLD_SIZE": "two"}, "not a number"),
        ({"RANK": "2"}, "does not fit"),
    ],
)
def test_incomplete_or_wrong_variables_are_named(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, str | None], message: str
) -> None:
    for name, value in {**RankEnv(world=2, master_port=29400).variables(), **changed}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        detect()


def test_each_rank_gets_its_gpu_also_where_it_sees_no_other() -> None:
    assert [choose_gpu(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert choose_gpu(3, 1) == 0
    with pytest.raises(UserError, match="start at most 2 ranks"):
        choose_gpu(2, 2)
