"""Memory that is available on a CPU: the least of what the machine has and the control groups of the process allow."""

from pathlib import Path
from unittest import mock

from trainer.footprint.memory import available_bytes

GIB = 2**30
MACHINE = 64


def available_gib(root: Path, *membership: str) -> float:
    """Return what is available to a process of these groups on a machine that has 64 GiB."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(f"MemTotal: 999 kB\nMemAvailable: {MACHINE * 2**20} kB\n")
    (root / "proc" / "self" / "cgroup").write_text("".join(f"{line}\n" for line in membership))
    with mock.patch("torch.cuda.is_available", return_value=False):
        return available_bytes(root) / GIB


def group(folder: Path, limit: int | None, used: int, cache: int) -> None:
    """Make a group of version 2, in GiB."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text("max\n" if limit is None else f"{limit * GIB}\n")
    (folder / "memory.current").write_text(f"{used * GIB}\n")
    (folder / "memory.stat").write_text(f"anon {(used - cache) * GIB}\nfile 7\ninactive_file {cache * GIB}\n")


def group_1(folder: Path, limit: int | None, used: int, cache: int) -> None:
    """Make a group of version 1, in GiB."""
    folder.mkdir(parents=True, exist_ok=True)
    # No limit is written as the greatest number of pages.
    (folder / "memory.limit_in_bytes").write_text(f"{2**63 - 4096 if limit is None else limit * GIB}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used * GIB}\n")
    (folder / "memory.stat").write_text(f"cache 1\ninactive_file 0\ntotal_inactive_file {cache * GIB}\n")


def test_page_cache_that_can_be_let_go_of_is_available(tmp_path: Path) -> None:
    group(tmp_path / "sys/fs/cgroup", limit=16, used=15, cache=13)
    assert available_gib(tmp_path, "0::/") == 14


def test_the_least_of_all_groups_around_the_process_counts(tmp_path: Path) -> None:
    top = tmp_path / "sys/fs/cgroup"
    group(top / "slurm" / "job_3" / "user", limit=None, used=3, cache=0)
    group(top / "slurm" / "job_3", limit=8, used=4, cache=1)
    group(top / "slurm", limit=48, used=30, cache=10)
    group(top / "slurm" / "job_4", limit=1, used=1, cache=0)  # of others
    assert available_gib(tmp_path, "0::/slurm/job_3/user") == 5


def test_groups_of_version_1(tmp_path: Path) -> None:
    top = tmp_path / "sys/fs/cgroup/memory"
    group_1(top / "slurm" / "job_3", limit=8, used=7, cache=4)
    group_1(top / "slurm", limit=None, used=9, cache=4)
    assert available_gib(tmp_path, "5:cpu,cpuacct:/other", "4:hugetlb,memory:/slurm/job_3", "0::/slurm") == 5


def test_a_container_that_sees_its_own_group_as_the_top(tmp_path: Path) -> None:
    group_1(tmp_path / "sys/fs/cgroup/memory", limit=4, used=1, cache=0)
    assert available_gib(tmp_path, "4:memory:/docker/0123") == 3


def test_without_a_limit_it_is_the_machine_s(tmp_path: Path) -> None:
    group(tmp_path / "sys/fs/cgroup" / "user.slice", limit=None, used=90, cache=1)
    assert available_gib(tmp_path, "0::/user.slice/session") == MACHINE
    assert available_gib(tmp_path / "other") == MACHINE
