"""A search with trials that take no time: what is asked of them, what is noted, where it goes on; table and files."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from cluster.tune_space import Space, search_space
from configs.errors import UserError
from configs.launch import LaunchConfig
from configs.load import load_config
from configs.schema import RunConfig
from configs.watching import TrackersConfig
from trainer.footprint.plan import GIB, RESERVED_GIB
from trainer.run_files import read_config
from trainer.tune.files import TRIALS_FILE, SearchRecord, TrialRecord
from trainer.tune.place import slurm_job, this_machine
from trainer.tune.report import PICTURE_FILE, describe_trial, pareto_front, tuning_table, write_tuning
from trainer.tune.runs import Stopped, Trial
from trainer.tune.search import CLEARLY_SLOWER, Tuning, fits_memory, tune
from trainer.tune.trial import TrialFigures, read_request

STEPS, RANKS = 6, 2
CONFIG = RunConfig.model_validate(
    {
        "train": {"images_per_step": 8, "micro_batch": 2, "steps": 4},
        "optim": {"warmup_steps": 2},
        "trackers": {"tensorboard": True, "csv": True, "wandb_project": "squads", "wandb_team": "us"},
    }
)
WANTED = {
    "train.micro_batch": [1, 2, 4],
    "parallel.zero_stage": [0, 1],
    "parallel.ep_size": [1],
    "parallel.bucket_elements": [50_000_000],
    "train.activation_checkpointing": ["none"],
    "data.workers": [1],
}


def space() -> Space:
    return search_space(CONFIG, RANKS, gpus=False, cores_per_rank=1, parameters=10**6, wanted=WANTED)


def record(config: RunConfig = CONFIG) -> SearchRecord:
    return SearchRecord(config=config, ranks=RANKS, steps=STEPS, warmup_steps=2, values=dict(space().values))


class PretendedTrials:
    """A runner whose trials take as long as their micro-batch says; those of 4 images run out of memory."""

    def __init__(self, at_once: int = 1, killed_at: int | None = None) -> None:
        self.at_once, self.killed_at = at_once, killed_at
        self.batches: list[list[str]] = []
        self.limits: list[float | None] = []

    def __call__(self, trials: Sequence[Trial], finished: Callable[[int, str | None], None]) -> None:
        self.batches.append([trial.folder.name for trial in trials])
        for place, trial in enumerate(trials):
            if len(self.limits) == self.killed_at:
                raise Stopped(143)
            (trial.folder / "config.yaml").write_text(trial.config)
            config = read_config(trial.folder)
            assert config.run_dir == str(trial.folder)
            assert config.train.images_per_step == CONFIG.train.images_per_step
            assert config.telemetry.port is None
            assert config.trackers == TrackersConfig()
            assert config.train.steps >= STEPS
            request = read_request(trial.folder)
            assert (request.steps, request.warmup_steps) == (STEPS, 2)
            self.limits.append(request.slowest_seconds)
            if config.train.micro_batch == 4:
                finished(place, "out of memory")
                continue
            seconds = 1.0 / (config.train.micro_batch or 1) + config.parallel.zero_stage / 10
            figures = TrialFigures(
                step_seconds=(seconds, 9.0, seconds),
                data_wait_seconds=seconds / 4,
                peak_bytes=(2**30, (2 + config.parallel.zero_stage) * 2**30),
                stopped=request.slowest_seconds is not None and seconds > request.slowest_seconds,
                loss=1.0,
                device="an abacus",
            )
            (trial.folder / "trial.json").write_text(figures.model_dump_json())
            finished(place, None)


def run(out: Path, runner: PretendedTrials, budget: int = 20) -> Tuning:
    return tune(record(), space(), runner, out=out, budget=budget, tell=lambda trial: None)


def test_all_is_tried_and_the_fastest_is_found(tmp_path: Path) -> None:
    runner = PretendedTrials()
    found = run(tmp_path, runner)
    assert len(found.trials) == len(space().points) == 6
    assert found.as_configured is found.trials[0]
    assert found.trials[1].values == {**found.trials[0].values, "train.micro_batch": 4}, "the largest"
    assert found.best is not None
    assert found.best.values == {"train.micro_batch": 2, "parallel.zero_stage": 0}
    assert found.best.images_per_second == 8 / 0.5, "at the median step"
    statuses = {tuple(trial.values.values()): trial.status for trial in found.trials}
    assert {values: status for values, status in statuses.items() if values[0] == 4} == {
        (4, 0): "failed",
        (4, 1): "failed",
    }
    assert statuses[1, 0] == statuses[1, 1] == "stopped"
    assert runner.limits[:2] == [None, 0.6 * CLEARLY_SLOWER], "the best so far times what is clearly slower"
    assert {trial.reason for trial in found.trials if trial.status == "failed"} == {"out of memory"}


def test_it_goes_on_where_it_was_ended(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(tmp_path, PretendedTrials(killed_at=2))
    torn = tmp_path / TRIALS_FILE
    torn.write_text(torn.read_text() + '{"trial": 3, "val')
    under_way = json.loads(torn.read_text().splitlines()[-2])
    assert (under_way["trial"], under_way["status"]) == (2, "started")
    runner = PretendedTrials()
    found = run(tmp_path, runner, budget=5)
    assert [batch[0] for batch in runner.batches] == ["002", "003", "004"]
    assert found.trials[2].values == under_way["values"]
    assert len({tuple(trial.values.values()) for trial in found.trials}) == 5
    lines = [json.loads(line) for line in torn.read_text().splitlines()]
    assert [line["trial"] for line in lines if line["status"] != "started"] == [0, 1, 2, 3, 4]
    more = PretendedTrials()
    assert len(run(tmp_path, more).trials) == 6
    assert more.batches == [["005"]], "a larger budget goes on"


def test_several_at_once_are_asked_for_before_the_first_is_told(tmp_path: Path) -> None:
    runner = PretendedTrials(at_once=4)
    assert len(run(tmp_path, runner).trials) == 6
    assert runner.batches == [["000", "001", "002", "003"], ["004", "005"]]


def test_another_search_is_refused(tmp_path: Path) -> None:
    run(tmp_path, PretendedTrials(), budget=1)
    other = record(CONFIG.model_copy(update={"seed": 5})).model_copy(update={"steps": 9})
    with pytest.raises(UserError, match=r"another search \(it differs in seed, --steps\): choose another --out"):
        tune(other, space(), PretendedTrials(), out=tmp_path, budget=1, tell=lambda trial: None)


def test_memory_leaves_settings_out() -> None:
    one, four = ({"train.micro_batch": images} for images in (1, 4))
    assert fits_memory(CONFIG, RANKS, 2**40, four)
    between = 200 * 2**20
    assert fits_memory(CONFIG, RANKS, between, one)
    assert not fits_memory(CONFIG, RANKS, between, four)


def test_tuned_yaml_holds_the_tuned_keys_and_what_was_measured(tmp_path: Path) -> None:
    found = run(tmp_path, PretendedTrials())
    tuned = write_tuning(found, record(), tmp_path)
    assert tuned is not None
    text = tuned.read_text()
    assert text.startswith(
        "# 16 images/s (as configured: 13.33), 2 GiB on the fullest rank.\n# Median of 4 steps on 2 ra"
    )
    assert "each on an abacus;\n# the best of 6 trials among 6 settings, 20" in text
    assert text.endswith("train:\n  micro_batch: 2\nparallel:\n  zero_stage: 0\n")
    (tmp_path / "recipe.yaml").write_text("train: {images_per_step: 8, micro_batch: 1}\n")
    assert load_config(tmp_path / "recipe.yaml", [str(tuned)]).train.micro_batch == 2
    assert (tmp_path / PICTURE_FILE).read_bytes().startswith(b"\x89PNG")


def test_without_a_trial_to_the_end_nothing_is_tuned(tmp_path: Path) -> None:
    wanted = {**WANTED, "train.micro_batch": [4]}
    small = search_space(CONFIG, RANKS, gpus=False, cores_per_rank=1, parameters=10**6, wanted=wanted)
    found = tune(record(), small, PretendedTrials(), out=tmp_path, budget=2, tell=lambda trial: None)
    assert found.best is None
    assert write_tuning(found, record(), tmp_path) is None


def test_the_table_names_every_trial(tmp_path: Path) -> None:
    console = Console(width=100, record=True)
    console.print(tuning_table(run(tmp_path, PretendedTrials())))
    rows = [line.split() for line in console.export_text().splitlines()]
    assert ["0", "2", "1", "13.33", "3.00", "25%", "configured"] in rows
    assert sum(row[-1:] == ["failed"] for row in rows) == 2
    assert sum(row[-1:] == ["stopped"] for row in rows) == 2


def test_the_pareto_front_has_no_trial_that_another_beats() -> None:
    def trial(number: int, speed: float, memory: int) -> TrialRecord:
        return TrialRecord(trial=number, values={}, status="done", images_per_second=speed, peak_bytes=(memory, 1))

    trials = [trial(0, 10, 5), trial(1, 20, 5), trial(2, 15, 7), trial(3, 30, 9), trial(4, 5, 2)]
    assert [one.trial for one in pareto_front(trials)] == [4, 1, 3]


def test_a_trial_is_described_in_one_line() -> None:
    failed = TrialRecord(trial=7, values={"parallel.bucket_elements": 50_000_000}, status="failed", reason="no shard")
    assert describe_trial(failed) == "trial 7: failed (no shard): bucket_elements=50M"


def test_ranks_and_memory_of_a_job_are_those_of_its_profile() -> None:
    gpus = slurm_job(LaunchConfig(nodes=2, gpus_per_node=4, cpus_per_rank=6), 80.0)
    assert (gpus.ranks, gpus.gpus, gpus.cores_per_rank) == (8, True, 6)
    assert gpus.memory_bytes == (80 - RESERVED_GIB) * GIB
    assert slurm_job(LaunchConfig(gpus_per_node=4, mem_gb=64), None).memory_bytes is None, "of a GPU nothing is known"
    cpus = slurm_job(LaunchConfig(nodes=2, ranks_per_node=4, mem_gb=64), None)
    assert (cpus.ranks, cpus.gpus, cpus.memory_bytes) == (8, False, 16 * GIB)


def test_this_machine_shares_its_memory_among_ranks() -> None:
    one, four = this_machine(1, None), this_machine(4, None)
    assert one.memory_bytes is not None
    assert four.memory_bytes is not None
    assert 0 < four.memory_bytes < one.memory_bytes / 2
    assert this_machine(2, 1.5).ranks == 2
