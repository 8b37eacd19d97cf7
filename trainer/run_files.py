"""What a run folder holds, read back: configuration, logged steps, evaluations, routing ledgers, squads.

Only reads; whatever is absent is None or empty, so that a caller can name it as missing. Files that exist but do not
parse are user errors with the file's name: they were edited or torn.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from configs.errors import UserError
from configs.load import load_config
from configs.schema import RunConfig

# JSON has no NaN: writers put null where a number could not be computed.
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


class Record(BaseModel):
    """Base of what is read from a run folder; keys that a reader does not need are left aside."""

    model_config = ConfigDict(frozen=True, extra="ignore")


RecordT = TypeVar("RecordT", bound=Record)


class StepRecord(Record):
    """One line of metrics.jsonl.

    `step_seconds` is the mean wall time of one step since the line before.
    """

    step: int
    loss: Number
    task_loss: dict[str, Number]
    mutual_information: dict[str, Number]
    learning_rate: Number
    step_seconds: Number
    bad_steps: int


class TaskScore(Record):
    """One task's row of an evaluation."""

    metric: str
    higher_is_better: bool
    value: Number
    constant: Number
    beats_constant: bool | None


class EvaluationRecord(Record):
    """One file of evaluation/."""

    step: int
    split: str
    images: int
    tasks: dict[str, TaskScore]


def read_config(run_dir: Path) -> RunConfig:
    """Return the resolved configuration of a run.

    Raises:
        UserError: the folder is no run, or its config.yaml does not fit.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no config.yaml (`modsquad train` writes one)")
    return load_config(path)


def read_steps(run_dir: Path) -> list[StepRecord]:
    """Return the logged steps in order; empty without metrics.jsonl.

    A last line without its newline is a write that a crash cut short and is left out.

    Raises:
        UserError: a line does not parse; names file and line.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return []
    complete = path.read_text(encoding="utf-8").rpartition("\n")[0]
    lines = enumerate(complete.splitlines(), start=1)
    return [parse(StepRecord, line, f"{path}, line {number}") for number, line in lines if line.strip()]


def read_latest_evaluation(run_dir: Path, split: str = "val") -> EvaluationRecord | None:
    """Return the evaluation of the highest step on `split`, or None.

    Raises:
        UserError: the file does not parse.
    """
    files = sorted((run_dir / "evaluation").glob(f"step_*_{split}.json"))
    return parse(EvaluationRecord, files[-1].read_text(encoding="utf-8"), str(files[-1])) if files else None


def latest_ledger_file(run_dir: Path) -> Path | None:
    """Return the routing ledger of the highest evaluated step, or None."""
    return max((run_dir / "routing").glob("step_*.json"), default=None)


def parse(kind: type[RecordT], text: str, where: str) -> RecordT:
    """Return `text` (JSON) as a `kind`.

    Raises:
        UserError: not JSON, or a key is missing or of the wrong type; starts with `where`.
    """
    try:
        values: Any = json.loads(text)
        return kind.model_validate(values)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg}); was it edited or cut short?") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "top level"
        raise UserError(f"{where}: {key}: {first['msg']}") from None
