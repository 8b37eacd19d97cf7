"""The task table: everything the program knows about a task, one row each.

A task is what the model predicts from an image: 13 of Taskonomy (CVPR 2018) and 5 of PASCAL-Context (the PASCAL_MT
layout). Data, losses, metrics, geometry and pictures all follow from the row. A user's own tasks are rows derived from
these (`configs.task_definitions`).

A label exists in two forms. *Stored* is what lies in shards and official folders (uint8, uint16 or float arrays);
`Encoding` describes it. *Target* is the float tensor that losses compare with predictions; `Target` names the mapping,
which `data_pipeline.targets` implements on the device.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from configs.errors import UserError

TargetKind = Literal[
    "log_depth",  # log(1 + d) / log(2^16), d the stored code
    "unit_range",  # stored value / `scale`, clipped to [0, 1] if `clip`, then mapped to [-1, 1]
    "unit_vector",  # 2 v / 255 - 1, normalised to length 1
    "standardise",  # (v - mean) / std per channel
    "region_boundary",  # 1 where a 4-neighbour has another region id, else 0
    "class_logits",  # softmax of stored logits
    "class_probabilities",  # stored probabilities, renormalised
    "class_ids",  # integer class per pixel
    "binary",  # 1 where the stored value is above half of `scale`, else 0
]
LossKind = Literal["l1", "l2", "cosine", "soft_cross_entropy", "cross_entropy", "balanced_bce"]
MetricKind = Literal[
    "l1", "mse", "rmse_m", "abs_rel", "mean_angle_deg", "accuracy", "cross_entropy", "miou", "max_f", "ods_f"
]
Picture = Literal["depth", "rgb_vector", "signed", "heat", "classes", "bars"]

HIGHER_IS_BETTER: frozenset[MetricKind] = frozenset({"accuracy", "miou", "max_f", "ods_f"})


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How a label is stored.

    Attributes:
        dtype: "uint8", "uint16" or "float32" (float16 is accepted when reading vectors).
        channels: channels of the stored array; 1 means (H, W) for dense labels.
        invalid: stored value that marks a pixel as unknown; a pixel of several channels is unknown if all equal it.
            None: no such value.
    """

    dtype: Literal["uint8", "uint16", "float32"]
    channels: int = 1
    invalid: int | None = None


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One row of the task table.

    Attributes:
        name: unique name; also the member name in shards and the folder name in official layouts.
        like: the row of the table that it derives from; None for the table's own rows.
        dense: True for one prediction per pixel, False for one vector per image.
        channels: channels of the prediction (classes, for class tasks).
        encoding: the stored form.
        target: mapping from the stored form to the target.
        scale: stored value that maps to the upper end (`unit_range`), or to "certainly 1" (`binary`).
        clip: whether values above `scale` count as `scale` (`unit_range`).
        mean, std: per channel, for `standardise`.
        codes_per_metre: stored units in one metre, for `log_depth`.
        blur_fraction: standard deviation of a Gaussian blur of the target, as a fraction of the image's height.
        loss: training loss.
        metrics: what evaluation reports; the first one is *the* metric of the task.
        uses_mask_valid: pixels that the sample's `mask_valid` excludes carry no loss and no metric.
        oriented: channels 0 and 1 of the label are a direction in the image, right and down (or left and up), stored as
            bytes: a mirrored image mirrors it, a turned one turns it (normals).
        interpolation: how geometric transforms resample the stored label.
        picture: how reports draw it.
        class_names: names of the classes, where there are few enough to list.
    """

    name: str
    like: str | None = None
    dense: bool = True
    channels: int
    encoding: Encoding
    target: TargetKind
    scale: float = 1.0
    clip: bool = True
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    codes_per_metre: float = 512.0
    blur_fraction: float = 0.0
    loss: LossKind
    metrics: tuple[MetricKind, ...]
    uses_mask_valid: bool = False
    oriented: bool = False
    interpolation: Literal["nearest", "bilinear", "none"] = "nearest"
    picture: Picture
    class_names: tuple[str, ...] = ()

    @property
    def metric(self) -> MetricKind:
        """The metric by which the task is judged."""
        return self.metrics[0]

    @property
    def higher_is_better(self) -> bool:
        """Direction of `metric`."""
        return self.metric in HIGHER_IS_BETTER


VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
HUMAN_PARTS = ("background", "head", "torso", "upper_arm", "lower_arm", "upper_leg", "lower_leg")

_DEPTH = Encoding(dtype="uint16", invalid=65535)
_GRAY16 = Encoding(dtype="uint16")
_RGB8 = Encoding(dtype="uint8", channels=3)
_IDS8 = Encoding(dtype="uint8")

# Encodings and constants of the Taskonomy rows: the official configurations (taskbank) of the Taskonomy repository.
_TASKONOMY = (
    TaskSpec(
        name="class_object",
        dense=False,
        channels=1000,
        encoding=Encoding(dtype="float32", channels=1000),
        target="class_logits",
        loss="soft_cross_entropy",
        metrics=("accuracy", "cross_entropy"),
        interpolation="none",
        picture="bars",
    ),
    TaskSpec(
        name="class_scene",
        dense=False,
        channels=365,
        encoding=Encoding(dtype="float32", channels=365),
        target="class_probabilities",
        loss="soft_cross_entropy",
        metrics=("accuracy", "cross_entropy"),
        interpolation="none",
        picture="bars",
    ),
    TaskSpec(
        name="depth_euclidean",
        channels=1,
        encoding=_DEPTH,
        target="log_depth",
        loss="l1",
        metrics=("abs_rel", "rmse_m", "l1"),
        uses_mask_valid=True,
        picture="depth",
    ),
    TaskSpec(
        name="depth_zbuffer",
        channels=1,
        encoding=_DEPTH,
        target="log_depth",
        loss="l1",
        metrics=("abs_rel", "rmse_m", "l1"),
        uses_mask_valid=True,
        picture="depth",
    ),
    TaskSpec(
        name="edge_occlusion",
        channels=1,
        encoding=_GRAY16,
        target="unit_range",
        scale=0.00625 * 65535,
        # Edges are up to ten times the scale, and thin: blurred unclipped, they are the same at any resolution.
        clip=False,
        blur_fraction=4 / 256,
        loss="l1",
        metrics=("l1",),
        uses_mask_valid=True,
        interpolation="bilinear",
        picture="heat",
    ),
    TaskSpec(
        name="edge_texture",
        channels=1,
        encoding=_GRAY16,
        target="unit_range",
        scale=0.08 * 65535,
        loss="l1",
        metrics=("l1",),
        interpolation="bilinear",
        picture="heat",
    ),
    TaskSpec(
        name="keypoints2d",
        channels=1,
        encoding=_GRAY16,
        target="unit_range",
        scale=0.005 * 65535,
        loss="l1",
        metrics=("l1",),
        interpolation="bilinear",
        picture="heat",
    ),
    TaskSpec(
        name="keypoints3d",
        channels=1,
        encoding=_GRAY16,
        target="unit_range",
        scale=65535.0,
        loss="l1",
        metrics=("l1",),
        uses_mask_valid=True,
        interpolation="bilinear",
        picture="heat",
    ),
    TaskSpec(
        name="normal",
        channels=3,
        encoding=_RGB8,
        target="unit_vector",
        loss="cosine",
        metrics=("mean_angle_deg",),
        uses_mask_valid=True,
        oriented=True,
        picture="rgb_vector",
    ),
    TaskSpec(
        name="principal_curvature",
        channels=2,
        encoding=_RGB8,
        target="standardise",
        mean=(123.572, 120.1),
        std=(31.922, 21.658),
        loss="l2",
        metrics=("mse",),
        uses_mask_valid=True,
        picture="signed",
    ),
    TaskSpec(
        name="reshading",
        channels=1,
        encoding=_RGB8,
        target="unit_range",
        scale=255.0,
        loss="l1",
        metrics=("l1",),
        uses_mask_valid=True,
        interpolation="bilinear",
        picture="heat",
    ),
    TaskSpec(
        name="segment_unsup2d",
        channels=1,
        encoding=_IDS8,
        target="region_boundary",
        blur_fraction=1 / 64,
        loss="l1",
        metrics=("l1",),
        picture="heat",
    ),
    TaskSpec(
        name="segment_unsup25d",
        channels=1,
        encoding=_IDS8,
        target="region_boundary",
        blur_fraction=1 / 64,
        loss="l1",
        metrics=("l1",),
        picture="heat",
    ),
)

# Class lists, void values and metrics of the PASCAL-Context rows: the PASCAL_MT layout (ASTMT, CVPR 2019).
_PASCAL_CONTEXT = (
    TaskSpec(
        name="semseg",
        channels=21,
        encoding=Encoding(dtype="uint8", invalid=255),
        target="class_ids",
        loss="cross_entropy",
        metrics=("miou",),
        picture="classes",
        class_names=VOC_CLASSES,
    ),
    TaskSpec(
        name="human_parts",
        channels=7,
        encoding=Encoding(dtype="uint8", invalid=255),
        target="class_ids",
        loss="cross_entropy",
        metrics=("miou",),
        picture="classes",
        class_names=HUMAN_PARTS,
    ),
    TaskSpec(
        name="saliency",
        channels=1,
        encoding=_IDS8,
        target="binary",
        scale=255.0,
        loss="balanced_bce",
        metrics=("max_f",),
        picture="heat",
    ),
    TaskSpec(
        name="normals",
        channels=3,
        encoding=Encoding(dtype="uint8", channels=3, invalid=255),
        target="unit_vector",
        loss="cosine",
        metrics=("mean_angle_deg",),
        oriented=True,
        picture="rgb_vector",
    ),
    TaskSpec(
        name="edges",
        channels=1,
        encoding=_IDS8,
        target="binary",
        scale=255.0,
        loss="balanced_bce",
        metrics=("ods_f",),
        picture="heat",
    ),
)

TaskTable = Mapping[str, TaskSpec]
"""Name -> row."""

TASKS: TaskTable = {spec.name: spec for spec in (*_TASKONOMY, *_PASCAL_CONTEXT)}
GROUPS: Mapping[str, tuple[str, ...]] = {
    "taskonomy": tuple(spec.name for spec in _TASKONOMY),
    "pascal_context": tuple(spec.name for spec in _PASCAL_CONTEXT),
}


def get_task(name: str, table: TaskTable = TASKS) -> TaskSpec:
    """Return the row called `name`.

    Raises:
        UserError: there is no such task; names the nearest one.
    """
    if name in table:
        return table[name]
    raise UserError(unknown_task(name, table))


def unknown_task(name: str, table: TaskTable = TASKS) -> str:
    """Say that there is no task called `name`, and which one is nearest."""
    near = get_close_matches(name, [*table, *GROUPS], n=1, cutoff=0.0)
    return f"unknown task '{name}': did you mean '{near[0]}'? Known: {', '.join(table)}"


def resolve_tasks(names: str | Iterable[str], table: TaskTable = TASKS) -> tuple[TaskSpec, ...]:
    """Return the rows for a group's name, a task's name, or a sequence of either; order kept.

    Raises:
        UserError: an unknown name, a task named twice, or no task at all.
    """
    expanded = expand_groups(names)
    if not expanded:
        raise UserError(f"no task given: name some of {', '.join(table)}, or a group: {', '.join(GROUPS)}")
    twice = sorted({name for name in expanded if expanded.count(name) > 1})
    if twice:
        raise UserError(f"task '{twice[0]}' is given twice: name each task once")
    return tuple(get_task(name, table) for name in expanded)


def expand_groups(names: str | Iterable[str]) -> list[str]:
    """Return names of tasks for a group's name, a task's name, or a sequence of either; order kept."""
    wanted: Sequence[str] = [names] if isinstance(names, str) else list(names)
    return [task for name in wanted for task in GROUPS.get(name, (name,))]
