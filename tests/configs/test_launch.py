"""Cluster profiles: time limits as sbatch reads them, profiles with overrides on top, errors that name the key."""

from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from configs.launch import PROFILES, LaunchConfig, load_launch, minutes_of


@pytest.mark.parametrize(
    ("time", "minutes"),
    [("30", 30), ("30:01", 31), ("1:00:00", 60), ("24:00:00", 1440), ("2-0", 2880), ("1-12:30:00", 2190), ("0:01", 1)],
)
def test_times_are_those_of_sbatch(time: str, minutes: int) -> None:
    assert minutes_of(time) == minutes


@pytest.mark.parametrize("time", ["", "0", "1 day", "1:2:3:4", "-1", "1:x", "1-"])
def test_other_times_are_refused(time: str) -> None:
    with pytest.raises(ValueError, match="time"):
        minutes_of(time)


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_profile_loads_and_says_how_it_is_used(path: Path) -> None:
    assert load_launch(path.stem, {}) == load_launch(path, {})
    assert f"--profile {path.stem}" in path.read_text()


def test_overrides_win_and_options_of_sbatch_add_up(tmp_path: Path) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text("nodes: 2\npartition: gpu\nslurm: {exclusive: true, nice: 5}\nsetup: [module load cuda]\n")
    plain = load_launch(profile, {"partition": None, "slurm": {}, "setup": None})
    assert (plain.nodes, plain.partition, plain.slurm) == (2, "gpu", {"exclusive": True, "nice": 5})
    launch = load_launch(profile, {"nodes": 3, "slurm": {"nice": 7}, "setup": ["ulimit -n 4096"]})
    assert launch.nodes == 3
    assert launch.slurm == {"exclusive": True, "nice": 7}
    assert launch.setup == ("module load cuda", "ulimit -n 4096")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gpu_per_node": 8}, "unknown key 'gpu_per_node', did you mean 'gpus_per_node'"),
        ({"gpus_per_node": 8, "ranks_per_node": 4}, "ranks_per_node 4 differs from gpus_per_node 8"),
        ({"container_mounts": ["/a:/a"]}, "container_mounts needs container_image"),
        ({"time": "soon"}, "time 'soon' is not of the form"),
        ({"nodes": 0}, "nodes: Input should be greater than 0"),
    ],
)
def test_mistakes_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_launch(None, values)


@pytest.mark.parametrize("given", [{}, {"setup": ["x"], "slurm": {"nice": 7}}])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("setup: module load cuda", r"mine.yaml: setup: .* \(got 'module load cuda'\)"),
        ("setup:", r"mine.yaml: setup: .* \(got None\)"),
        ("slurm:", r"mine.yaml: slurm: .* \(got None\)"),
        ("slurm: [exclusive]", r"mine.yaml: slurm: .* \(got \['exclusive'\]\)"),
    ],
)
def test_what_a_profile_says_wrongly_is_named_whatever_is_added_to_it(
    tmp_path: Path, text: str, message: str, given: dict[str, Any]
) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text(text)
    with pytest.raises(UserError, match=message):
        load_launch(profile, given)


def test_an_unknown_profile_names_the_nearest() -> None:
    with pytest.raises(UserError, match="no cluster profile at 'gpu9': did you mean 'gpu8'"):
        load_launch("gpu9", {})


def test_ranks_follow_from_gpus() -> None:
    assert LaunchConfig().ranks == 1
    assert LaunchConfig(gpus_per_node=8).ranks == 8
    assert LaunchConfig(ranks_per_node=3).ranks == 3
