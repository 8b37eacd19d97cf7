"""The YAML file that describes a dataset in a folder or a table: typed, and checked against the task table on load.

`root`, `table` and lists of samples are the user's own settings: relative to the file, or absolute. All other paths are
patterns below the root and never leave it.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator

from configs.errors import UserError
from configs.section import Section
from configs.task_definitions import Definitions, defined_in, derive_tasks
from configs.tasks import TargetKind, TaskTable, get_task
from configs.yaml_files import explain, read_mapping
from data_pipeline.sources.folder_labels import (
    BinaryLabel,
    ClassesLabel,
    CodesLabel,
    DepthLabel,
    FileLabel,
    NormalLabel,
    RegionsLabel,
)
from data_pipeline.sources.folder_vectors import VectorLabel
from data_pipeline.sources.path_patterns import Pattern
from data_pipeline.sources.squares import Fit

MASK = "mask_valid"
REST = "train"
"""The part of samples that no fraction takes."""

_KINDS: Mapping[TargetKind, type[FileLabel | VectorLabel]] = {
    "log_depth": DepthLabel,
    "unit_vector": NormalLabel,
    "class_ids": ClassesLabel,
    "binary": BinaryLabel,
    "region_boundary": RegionsLabel,
    "unit_range": CodesLabel,
    "standardise": CodesLabel,
    "class_logits": VectorLabel,
    "class_probabilities": VectorLabel,
}


class SplitRule(Section):
    """How samples are parted, in one of three ways."""

    field: str | None = None
    """Field (column, or part of a file's name) whose value is the part."""
    lists: dict[str, str] = Field(default_factory=dict)
    """Part -> text file with one sample per line, by its name or the path of its image."""
    fractions: dict[str, float] = Field(default_factory=dict)
    """Part -> share of the samples, chosen by a hash of their names, so that it stays when others come; the rest is
    `train`."""
    by: tuple[str, ...] = ()
    """Fields that are hashed instead of the name, such as the scene: samples that agree in them stay together."""

    @field_validator("by", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return value if isinstance(value, list | tuple) else [value]

    @model_validator(mode="after")
    def _check(self) -> "SplitRule":
        if (self.field is not None) + bool(self.lists) + bool(self.fractions) != 1:
            raise ValueError("give one of `field`, `lists` and `fractions`")
        if self.by and not self.fractions:
            raise ValueError("`by` says what `fractions` hash: give fractions")
        if REST in self.fractions:
            raise ValueError(f"'{REST}' is what the other fractions leave: leave it out")
        if self.fractions and not (min(self.fractions.values()) > 0.0 and sum(self.fractions.values()) < 1.0):
            raise ValueError("fractions must be positive, and below 1 together")
        return self


class FolderSpec(Section):
    """A dataset: where images and labels are, and what their values mean."""

    root: str = "."
    """Folder below which everything lies, relative to the YAML file or absolute."""
    table: str | None = None
    """CSV or TSV file with a header and one sample per line, whose columns are the fields; without it, fields are what
    the names of the images say."""
    delimiter: str | None = Field(None, min_length=1, max_length=1)
    """Between the table's cells; default: a tab in .tsv files, else a comma."""
    rgb: str
    """Pattern of the images."""
    name: str | None = None
    """Pattern of the samples' names, from fields; default: the fields of `rgb` joined by `/`, with a table the image's
    path without its suffix."""
    define_tasks: Definitions = Field(default_factory=dict)
    """Tasks beside those of the table, each by how it differs from a row of it."""
    labels: dict[str, SerializeAsAny[FileLabel | VectorLabel]] = Field(min_length=1)
    """Task -> its label; what it may say depends on the task's kind."""
    mask_valid: BinaryLabel | None = None
    """Where the geometry is known; default: where a depth label is."""
    fit: Fit = "centre"
    """What of an image becomes the square."""
    split: SplitRule | None = None
    """How samples are parted; `--split` then says which part to take."""

    @model_validator(mode="after")
    def _check(self) -> "FolderSpec":
        for place, text in self.patterns().items():
            try:
                pattern = Pattern(text)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
            if pattern.wild and self.table is not None:
                raise ValueError(f"{place}: '*' has no meaning with a table: name a column")
        if self.name is not None and Pattern(self.name).wild:
            raise ValueError("name: '*' has no meaning in a name: name a field")
        if self.table is None and self.delimiter is not None:
            raise ValueError("delimiter: is that of a table, but there is none")
        if self.mask_valid is not None and self.mask_valid.boundaries:
            raise ValueError(f"{MASK}: boundaries are no mask")
        return self

    @property
    def task_table(self) -> TaskTable:
        """All tasks that the description knows."""
        return derive_tasks(self.define_tasks)

    def patterns(self) -> dict[str, str]:
        """Return the pattern of the images, of each label in files, and of the mask, by key."""
        found = {"rgb": self.rgb}
        found |= {f"labels.{task}.path": label.path for task, label in self.labels.items() if label.path is not None}
        return found | ({} if self.mask_valid is None else {f"{MASK}.path": self.mask_valid.path})


def load_spec(path: Path) -> FolderSpec:
    """Read a description.

    Raises:
        UserError: the file cannot be read, an unknown task or key (names the nearest), or a value that does not fit.
    """
    try:
        values = read_mapping(path)
    except UserError as error:
        hint = " (patterns with braces need quotes inside { })" if "not valid YAML" in str(error) else ""
        raise UserError(f"{error}{hint}") from None
    if isinstance(values.get("rgb"), dict):
        raise UserError(f"{path}: rgb: a pattern that begins with a brace needs quotes")
    labels = values.get("labels")
    if isinstance(labels, dict):
        task_table = defined_in(values, str(path))
        values["labels"] = {task: _label(path, task_table, task, given) for task, given in labels.items()}
    if MASK in values:
        values[MASK] = _written_out(values[MASK])
    try:
        return FolderSpec.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, FolderSpec, str(path))) from None


def unknown_field(name: str, known: list[str]) -> str:
    """Say that there is no such field, and which one is nearest."""
    near = get_close_matches(name, known, n=1, cutoff=0.0)
    hint = f", did you mean '{near[0]}'?" if near else ""
    return f"there is no field '{name}'{hint} Known: {', '.join(known) or 'none'}"


def _label(path: Path, task_table: TaskTable, task: Any, given: Any) -> FileLabel | VectorLabel:
    where = f"{path}: labels.{task}"
    try:
        spec = get_task(str(task), task_table)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if not isinstance(given, str | dict):
        raise UserError(f"{where}: give the pattern of its files, or keys and values (got {given!r})")
    kind = _KINDS[spec.target]
    try:
        label = kind.model_validate(_written_out(given))
        label.check_task(spec)
    except ValidationError as error:
        raise UserError(explain(error, kind, where)) from None
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    return label


def _written_out(given: Any) -> Any:
    """A pattern alone is short for a mapping with nothing but it."""
    return {"path": given} if isinstance(given, str) else given
