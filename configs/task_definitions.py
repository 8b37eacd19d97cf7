"""A user's own tasks: rows that derive from those of the task table, as `define_tasks` of a YAML file says.

    define_tasks:
      lanes: {like: semseg, class_names: [road, lane, curb]}
      far_depth: {like: depth_zbuffer, codes_per_metre: 64}

A definition keeps all of its row that it does not override, and what it may override follows from the row's target.
Definitions travel with the data and the models: in recipes, in descriptions of folders, in the index of shards, in
config.yaml of a run and in the files of models. There is no registry: each of them gives a table of its own
(`derive_tasks`).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from keyword import iskeyword
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    StrictStr,
    ValidationError,
    model_serializer,
    model_validator,
)

from configs.errors import UserError
from configs.section import Section
from configs.tasks import GROUPS, TASKS, LossKind, MetricKind, TargetKind, TaskSpec, TaskTable, get_task
from configs.yaml_files import explain

DEFINITIONS_KEY = "define_tasks"
MOST_TASKS = 64
"""Rows of a table: the labels that a sample has are bits of one number (`data_pipeline.planning.labels`)."""
RESERVED_MEMBERS = frozenset({"rgb", "mask_valid", "meta"})
"""Members of a sample in shards that are no labels."""
# Heads are modules and outputs of graphs named by their task: neither can be called as the input of graphs, nor as an
# attribute that a container of modules has already.
RESERVED_WORDS = frozenset({
    "images", "add_module", "apply", "bfloat16", "buffers", "call_super_init", "children", "clear", "compile", "cpu",
    "cuda", "double", "dump_patches", "eval", "extra_repr", "float", "forward", "get_buffer", "get_extra_state",
    "get_parameter", "get_submodule", "half", "ipu", "items", "keys", "load_state_dict", "modules", "mtia",
    "named_buffers", "named_children", "named_modules", "named_parameters", "parameters", "pop",
    "register_backward_hook", "register_buffer", "register_forward_hook", "register_forward_pre_hook",
    "register_full_backward_hook", "register_full_backward_pre_hook", "register_load_state_dict_post_hook",
    "register_load_state_dict_pre_hook", "register_module", "register_parameter", "register_state_dict_post_hook",
    "register_state_dict_pre_hook", "requires_grad_", "set_extra_state", "set_submodule", "share_memory", "state_dict",
    "to", "to_empty", "train", "training", "type", "update", "values", "xpu", "zero_grad",
})  # fmt: skip

_NAME = re.compile(r"[a-z][a-z0-9_]{0,47}")

_LARGEST = {"uint8": 2**8 - 1, "uint16": 2**16 - 1}
_NUMBERS: tuple[MetricKind, ...] = ("l1", "mse")
_DIFFERENCES: tuple[LossKind, ...] = ("l1", "l2")
# Target -> keys that a definition may give beside `loss` and `metrics`, the losses and the metrics that fit.
_FITTING: Mapping[TargetKind, tuple[frozenset[str], tuple[LossKind, ...], tuple[MetricKind, ...]]] = {
    "log_depth": (frozenset({"codes_per_metre", "invalid"}), _DIFFERENCES, ("abs_rel", "rmse_m", *_NUMBERS)),
    "unit_range": (frozenset({"scale", "clip", "blur_fraction", "invalid"}), _DIFFERENCES, _NUMBERS),
    "unit_vector": (frozenset(), ("cosine", *_DIFFERENCES), ("mean_angle_deg",)),
    "standardise": (frozenset({"mean", "std"}), _DIFFERENCES, _NUMBERS),
    "region_boundary": (frozenset({"blur_fraction"}), _DIFFERENCES, _NUMBERS),
    "class_logits": (frozenset({"class_names"}), ("soft_cross_entropy",), ("accuracy", "cross_entropy")),
    "class_probabilities": (frozenset({"class_names"}), ("soft_cross_entropy",), ("accuracy", "cross_entropy")),
    "class_ids": (frozenset({"class_names", "invalid"}), ("cross_entropy",), ("miou",)),
    "binary": (frozenset({"scale"}), ("balanced_bce",), ("max_f", "ods_f")),
}


class TaskDefinition(Section):
    """How a task differs from the row that it is like; None: not at all."""

    like: str
    """Name of a row of the task table."""
    class_names: tuple[StrictStr, ...] | None = None
    """The classes, in the order of their ids; the channels follow."""
    scale: float | None = Field(None, gt=0)
    """Stored value of the upper end, or of "certainly yes" for yes or no."""
    clip: bool | None = None
    """Whether values above `scale` count as `scale`."""
    mean: tuple[float, ...] | None = None
    """Per channel, of stored values; they are standardised by (v - mean) / std."""
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """Per channel, of stored values."""
    codes_per_metre: float | None = Field(None, gt=0)
    """Stored units of depth in one metre; 65534 of them are the farthest depth."""
    blur_fraction: float | None = Field(None, ge=0, le=0.5)
    """Standard deviation of the Gaussian blur of the target, as a share of the image's height."""
    invalid: int | None = Field(None, ge=0)
    """Stored value that means unknown."""
    loss: LossKind | None = None
    """Training loss."""
    metrics: tuple[MetricKind, ...] | None = Field(None, min_length=1)
    """What evaluation reports, the main one first."""

    @model_validator(mode="after")
    def _check(self) -> "TaskDefinition":
        row = get_task(self.like)
        keys, losses, metrics = _FITTING[row.target]
        for key in self.given():
            if key not in keys | {"loss", "metrics"}:
                takes = ", ".join(sorted(keys | {"loss", "metrics"}))
                raise ValueError(f"{key} has no meaning for a task like {self.like}: it takes {takes}")
        if self.loss is not None and self.loss not in losses:
            raise ValueError(f"loss {self.loss} does not fit a task like {self.like}: use {' or '.join(losses)}")
        for metric in self.metrics or ():
            if metric not in metrics:
                raise ValueError(f"metric {metric} does not fit a task like {self.like}: use {', '.join(metrics)}")
        if len(set(self.metrics or ())) < len(self.metrics or ()):
            raise ValueError("metrics: name each one once")
        _check_classes(self.class_names)
        _check_numbers(self, row)
        return self

    @model_serializer(mode="wrap")
    def _without_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        return {key: value for key, value in values.items() if value is not None}

    def given(self) -> dict[str, Any]:
        """Return what is overridden, by key."""
        values = {key: getattr(self, key) for key in type(self).model_fields if key != "like"}
        return {key: value for key, value in values.items() if value is not None}


def _check_all(definitions: dict[str, TaskDefinition]) -> dict[str, TaskDefinition]:
    for name in definitions:
        if name in TASKS or name in GROUPS:
            raise ValueError(f"'{name}' is in the task table already: choose another name")
        if name in RESERVED_MEMBERS | RESERVED_WORDS or iskeyword(name):
            raise ValueError(f"'{name}' means something else in shards or models: choose another name")
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!a} cannot name a member of shards: use a letter and up to 47 of a-z, 0-9 and '_'")
    if len(TASKS) + len(definitions) > MOST_TASKS:
        raise ValueError(f"{len(definitions)} definitions: there may be {MOST_TASKS - len(TASKS)}")
    return definitions_of(derive_tasks(definitions).values())


Definitions = Annotated[dict[str, TaskDefinition], AfterValidator(_check_all)]
"""Name -> definition in its shortest form, so that equal tasks are defined alike; names are checked on validation."""


class _Defining(Section):
    define_tasks: Definitions


def derive_tasks(definitions: Mapping[str, TaskDefinition]) -> TaskTable:
    """Return the rows of the task table and those that are defined, in this order."""
    return {**TASKS, **{name: _derive(name, definition) for name, definition in definitions.items()}}


def defined_in(values: Mapping[str, Any], where: str) -> TaskTable:
    """Return the table that the `define_tasks` of a YAML file gives.

    Args:
        values: keys and values of the file; all others are left aside.
        where: the file, for messages.

    Raises:
        UserError: a definition is wrong; one line, naming file and key.
    """
    try:
        return derive_tasks(_Defining.model_validate({DEFINITIONS_KEY: values.get(DEFINITIONS_KEY) or {}}).define_tasks)
    except ValidationError as error:
        raise UserError(explain(error, _Defining, where)) from None


def definitions_of(specs: Iterable[TaskSpec]) -> dict[str, TaskDefinition]:
    """Return the definitions that give these rows again; rows of the task table need none."""
    return {spec.name: _describe(spec) for spec in specs if spec.like is not None}


def contradiction(ours: TaskSpec, theirs: TaskSpec) -> str | None:
    """Return the key in which two rows of one name disagree about what a stored label means, None if in nothing.

    How a task is trained and judged is no matter of its labels: one may set another loss for shards that are packed.
    """
    return next((key for key, facts in _STORED.items() if facts(ours) != facts(theirs)), None)


# Key of a definition -> what of a row it decides about stored labels.
_STORED: Mapping[str, Callable[[TaskSpec], object]] = {
    "like": lambda spec: (spec.target, spec.dense, spec.encoding.dtype),
    "class_names": lambda spec: (spec.channels, spec.encoding.channels, spec.class_names),
    "invalid": lambda spec: spec.encoding.invalid,
    "codes_per_metre": lambda spec: spec.codes_per_metre,
}


def _derive(name: str, definition: TaskDefinition) -> TaskSpec:
    row = TASKS[definition.like]
    changes = definition.given()
    encoding = row.encoding
    if definition.invalid is not None:
        encoding = replace(encoding, invalid=changes.pop("invalid"))
    if definition.class_names is not None:
        changes["channels"] = len(definition.class_names)
        if not row.dense:
            encoding = replace(encoding, channels=len(definition.class_names))
    # A value that means unknown must not be averaged.
    averaged = row.interpolation == "bilinear" and encoding.invalid is None
    changes["interpolation"] = "nearest" if row.dense and not averaged else row.interpolation
    return replace(row, name=name, like=definition.like, encoding=encoding, **changes)


def _describe(spec: TaskSpec) -> TaskDefinition:
    assert spec.like is not None
    row = TASKS[spec.like]
    values: dict[str, Any] = {"like": spec.like}
    for key in TaskDefinition.model_fields.keys() - {"like", "invalid"}:
        if getattr(spec, key) != getattr(row, key):
            values[key] = getattr(spec, key)
    if spec.encoding.invalid != row.encoding.invalid:
        values["invalid"] = spec.encoding.invalid
    return TaskDefinition.model_validate(values)


def _check_classes(names: tuple[str, ...] | None) -> None:
    if names is None:
        return
    if len(names) < 2:
        raise ValueError(f"class_names holds {len(names)}: a task of classes needs two or more")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"class name '{name}' is there {count} times")
    for name in names:
        if not name or name != name.strip() or not name.isprintable():
            raise ValueError(f"class name {name!a} is empty, or holds spaces at its ends or control characters")
        if name == "void" or (name.isascii() and name.isdecimal()):
            raise ValueError(f"class name '{name}' would be read as a class's number, or as unknown: spell it out")


def _check_numbers(definition: TaskDefinition, row: TaskSpec) -> None:
    """Check values against what the encoding of the row can hold."""
    for key in ("mean", "std"):
        values = getattr(definition, key)
        if values is not None and len(values) != row.channels:
            raise ValueError(f"{key} holds {len(values)} numbers, but {row.name} has {row.channels} channels")
    if row.encoding.dtype == "float32":
        return
    dtype = row.encoding.dtype
    most = _LARGEST[dtype]
    if definition.scale is not None and definition.scale > most:
        raise ValueError(
            f"scale {definition.scale:g} is beyond {most}, the largest {dtype}, which labels are stored as"
        )
    invalid = row.encoding.invalid if definition.invalid is None else definition.invalid
    if invalid is not None and invalid > most:
        raise ValueError(f"invalid {invalid} is beyond {most}, the largest {dtype}, which labels are stored as")
    if row.target == "class_ids":
        classes = row.channels if definition.class_names is None else len(definition.class_names)
        if classes > most:
            raise ValueError(f"{classes} classes are more than the {most} that {dtype} holds beside 'unknown'")
        if invalid is not None and invalid < classes:
            raise ValueError(f"invalid {invalid} is the id of a class: use {classes} to {most}")
