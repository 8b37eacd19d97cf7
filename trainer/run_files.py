"""What a run folder holds, read back: configuration, logged steps, evaluations, routing ledgers, gradient conflicts.

Whatever is absent is None or empty, so that a caller can name it as missing. Files that exist but do not parse are user
errors with the file's name: they were edited or torn. Evaluations, ledgers and conflicts are one file per step, named
here, and removed here when the step is no longer part of the run.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from configs.atomic import cannot_write
from configs.errors import UserError
from configs.load import load_config
from configs.schema import RunConfig
from model.routing_stats import RoutingLedger

_EVALUATION, _ROUTING, _CONFLICT = "evaluation", "routing", "conflict"

# JSON has no NaN: writers put null where a number could not be computed.
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


class Record(BaseModel):
    """Base of what is read from a run folder; keys that a reader does not need are left aside."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    @classmethod
    def from_values(cls, values: Any, where: str) -> Self:
        """Return the record that `values` (parsed JSON) describe.

        Raises:
            UserError: a key is missing or of the wrong type; starts with `where`.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"])) or "top level"
            raise UserError(f"{where}: {key}: {first['msg']}") from None


RecordT = TypeVar("RecordT", bound=Record)


class StepRecord(Record):
    """One line of metrics.jsonl.

    `images` counts those used since the start of the run, `step_seconds` is the mean wall time of one step since the
    line before.
    """

    step: int
    images: int
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


Part = Literal["patches", "attention", "mlp"]
WeightKind = Literal["experts", "shared"]
"""Weights of an expert layer's experts; weights that serve every token."""


class ConflictLayer(Record):
    """The gradients of T tasks in one kind of weights of one layer.

    Attributes:
        block: number of its block; None for the patch embedding.
        part: which layer of the block, its norm included.
        kind: which of its weights.
        sees_task: False where it runs once per image, before tasks part.
        weights: how many.
        norms: (T,) length of each task's gradient.
        cosine: (T, T) cosine of each pair of gradients; NaN where one of them is 0.
    """

    block: int | None
    part: Part
    kind: WeightKind
    sees_task: bool
    weights: int
    norms: tuple[Number, ...]
    cosine: tuple[tuple[Number, ...], ...]


class ConflictRecord(Record):
    """One file of conflict/: gradients over `images` training images at the weights of `step`."""

    step: int
    images: int
    tasks: tuple[str, ...]
    layers: tuple[ConflictLayer, ...]


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
    complete = read_text(path).rpartition("\n")[0]
    records = []
    for number, line in enumerate(complete.splitlines(), start=1):
        records.append(parse(StepRecord, line, f"{path}, line {number}"))
    return records


def evaluation_path(run_dir: Path, step: int, split: str) -> Path:
    """Return `RUN/evaluation/step_XXXXXXXX_<split>.json`."""
    return run_dir / _EVALUATION / f"{_step_name(step)}_{split}.json"


def ledger_path(run_dir: Path, step: int) -> Path:
    """Return `RUN/routing/step_XXXXXXXX.json`."""
    return run_dir / _ROUTING / f"{_step_name(step)}.json"


def conflict_path(run_dir: Path, step: int) -> Path:
    """Return `RUN/conflict/step_XXXXXXXX.json`."""
    return run_dir / _CONFLICT / f"{_step_name(step)}.json"


def _step_name(step: int) -> str:
    return f"step_{step:08d}"


def remove_later_files(run_dir: Path, step: int) -> None:
    """Remove evaluations, routing ledgers and gradient conflicts of later steps than `step`.

    Raises:
        UserError: one of them cannot be removed.
    """
    for folder in (_EVALUATION, _ROUTING, _CONFLICT):
        for path in (run_dir / folder).glob("step_" + "[0-9]" * 8 + "*.json"):
            if int(path.name.removeprefix("step_")[:8]) > step:
                try:
                    path.unlink()
                except OSError as error:
                    raise cannot_write(path, error) from error


def read_latest_evaluation(run_dir: Path, split: str = "val") -> EvaluationRecord | None:
    """Return the evaluation of the highest step on `split`, or None.

    Raises:
        UserError: the file does not parse.
    """
    files = sorted((run_dir / _EVALUATION).glob(f"step_*_{split}.json"))
    return parse(EvaluationRecord, read_text(files[-1]), str(files[-1])) if files else None


def read_latest_ledger(run_dir: Path) -> tuple[int, RoutingLedger] | None:
    """Return the highest evaluated step and its routing ledger, or None.

    Raises:
        UserError: the file does not parse, or has another format version.
    """
    path = max((run_dir / _ROUTING).glob("step_*.json"), default=None)
    return None if path is None else (int(path.stem.removeprefix("step_")), _read_ledger(path))


def read_ledger(run_dir: Path, step: int) -> RoutingLedger | None:
    """Return the routing ledger of an evaluation of `step`, or None.

    Raises:
        UserError: see `read_latest_ledger`.
    """
    path = ledger_path(run_dir, step)
    return _read_ledger(path) if path.is_file() else None


def _read_ledger(path: Path) -> RoutingLedger:
    values = parse_json(read_text(path), str(path))
    try:
        return RoutingLedger.from_json(values)
    except KeyError as error:
        raise UserError(f"{path}: key {error} is missing; evaluate the run again") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (AttributeError, IndexError, OverflowError, RuntimeError, TypeError, ValueError):
        raise UserError(f"{path} is damaged; evaluate the run again") from None


def read_latest_conflict(run_dir: Path) -> ConflictRecord | None:
    """Return the gradient conflict measured at the highest step, or None.

    Raises:
        UserError: the file does not parse.
    """
    path = max((run_dir / _CONFLICT).glob("step_*.json"), default=None)
    return parse(ConflictRecord, read_text(path), str(path)) if path else None


def parse(kind: type[RecordT], text: str, where: str) -> RecordT:
    """Return the record that a JSON text describes.

    Raises:
        UserError: not JSON, or a key is missing or of the wrong type; starts with `where`.
    """
    return kind.from_values(parse_json(text, where), where)


def read_text(path: Path) -> str:
    """Return the content of a text file.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged (byte {error.start} is not UTF-8): restore it, or make it again") from None


def parse_json(text: str, where: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        UserError: not JSON; starts with `where`.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "a number or a nesting beyond all bounds"
        raise UserError(f"{where}: not valid JSON ({reason}); was it edited or cut short?") from None
