"""What a search of `modsquad tune` keeps in its folder, so that the same command goes on from there.

`search.json` says what is searched for which run. `trials.jsonl` has a line when a trial starts and another one when
it is over; of each trial the last line counts. `trials/NNN/` are the trials' run folders.
"""

import json
from pathlib import Path
from typing import Literal

from cluster.tune_space import Value
from configs.atomic import write_text_atomically
from configs.errors import UserError
from configs.load import differing_keys
from configs.schema import RunConfig
from trainer.journal import append_lines
from trainer.run_files import Record, parse, read_text

SEARCH_FILE, TRIALS_FILE, TRIALS_FOLDER = "search.json", "trials.jsonl", "trials"
Status = Literal["started", "done", "stopped", "failed"]


class TrialRecord(Record):
    """One trial.

    Attributes:
        trial: its number, from 0.
        values: key -> value of what is searched.
        status: done: all steps were measured; stopped: clearly slower than the best; failed: see `reason`.
        images_per_second: of all ranks, at the median step.
        step_seconds: the median step.
        data_wait_seconds: mean of a step.
        peak_bytes: of every rank.
        device: what a rank ran on.
        reason: why it failed.
    """

    trial: int
    values: dict[str, Value]
    status: Status
    images_per_second: float | None = None
    step_seconds: float | None = None
    data_wait_seconds: float | None = None
    peak_bytes: tuple[int, ...] = ()
    device: str = ""
    reason: str = ""

    @property
    def most_bytes(self) -> int:
        """Peak memory of the rank that holds most."""
        return max(self.peak_bytes, default=0)


class SearchRecord(Record):
    """What is searched: for which run, on how many ranks, how each trial is measured, and among which values."""

    config: RunConfig
    ranks: int
    steps: int
    warmup_steps: int
    values: dict[str, tuple[Value, ...]]


class TrialLog:
    """The trials of a folder."""

    def __init__(self, folder: Path, search: SearchRecord) -> None:
        """Open the folder; begin there if it is new.

        Raises:
            UserError: it holds another search, a file of it does not parse, or it cannot be written.
        """
        self.folder = folder
        self._path = folder / TRIALS_FILE
        place = folder / SEARCH_FILE
        if place.is_file():
            _check_same(parse(SearchRecord, read_text(place), str(place)), search, folder)
        else:
            write_text_atomically(place, json.dumps(search.model_dump(mode="json"), indent=1) + "\n")
        self._trials: dict[int, TrialRecord] = {}
        if self._path.is_file():
            complete, _, torn = read_text(self._path).rpartition("\n")
            for number, line in enumerate(complete.splitlines(), start=1):
                record = parse(TrialRecord, line, f"{self._path}, line {number}")
                self._trials[record.trial] = record
            if torn:  # a crash cut it short; what follows must not be glued to it
                write_text_atomically(self._path, f"{complete}\n" if complete else "")

    @property
    def trials(self) -> list[TrialRecord]:
        """All trials in order, each as it was last noted."""
        return [self._trials[number] for number in sorted(self._trials)]

    def note(self, record: TrialRecord) -> None:
        """Append a trial's new state, at once and to the disk."""
        append_lines(self._path, [record.model_dump(mode="json")])
        self._trials[record.trial] = record

    def trial_folder(self, number: int) -> Path:
        """Return the run folder of a trial."""
        return self.folder / TRIALS_FOLDER / f"{number:03d}"


def _check_same(old: SearchRecord, new: SearchRecord, folder: Path) -> None:
    differing = differing_keys(old.config, new.config)
    differing += [f"--{name}" for name in ("ranks", "steps") if getattr(old, name) != getattr(new, name)]
    if old.values != new.values:
        keys = old.values.keys() | new.values.keys()
        differing += [f"--search {key}" for key in sorted(keys) if old.values.get(key) != new.values.get(key)]
    if differing:
        raise UserError(
            f"{folder} holds another search (it differs in {', '.join(differing)}): choose another --out, or remove it"
        )
