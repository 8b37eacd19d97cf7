"""The task table: everything the program knows about a task, one row each.

A task is what the model predicts from an image: 13 of Taskonomy (CVPR 2018) and 5 of PASCAL-Context (the PASCAL_MT
layout). Data, losses, metrics, geometry and pictures all follow from the row, so adding a task means adding one row.

A label exists in two forms. *Stored* is what lies in shards and official folders (uint8, uint16 or float arrays);
`Encoding` describes it. *Target* is the float tensor that losses compare with predictions; `Target` names the mapping,
which `data_pipeline.targets` implements on the device.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from configs.errors import UserError

TargetKind = Literal[
    "log_depth",  # log(1 + d) / log(2^16), d in 1/512 m
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
        group: the benchmark it belongs to.
        dense: True for one prediction per pixel, False for one vector per image.
        channels: channels of the prediction (classes, for class tasks).
        encoding: the stored form.
        target: mapping from the stored form to the target.
        scale: stored value that maps to the upper end (`unit_range`), or to "certainly 1" (`binary`).
        clip: whether values above `scale` count as `scale` (`unit_range`).
        mean, std: per channel, for `standardise`.
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
    group: Literal["taskonomy", "pascal_context"]
    dense: bool = True
    channels: int
    encoding: Encoding
    target: TargetKind
    scale: float = 1.0
    clip: bool = True
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
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
        group="taskonomy",
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
        group="taskonomy",
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
        group="taskonomy",
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
        group="taskonomy",
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
        group="taskonomy",
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
        group="taskonomy",
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
        group="taskonomy",
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
        group="taskonomy",
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
        group="taskonomy",
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
        group="taskonomy",
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
        group="taskonomy",
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
        group="taskonomy",
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
        group="taskonomy",
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
        group="pascal_context",
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
        group="pascal_context",
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
        group="pascal_context",
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
        group="pascal_context",
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
        group="pascal_context",
        channels=1,
        encoding=_IDS8,
        target="binary",
        scale=255.0,
        loss="balanced_bce",
        metrics=("ods_f",),
        picture="heat",
    ),
)

TASKS: dict[str, TaskSpec] = {spec.name: spec for spec in (*_TASKONOMY, *_PASCAL_CONTEXT)}
GROUPS: dict[str, tuple[str, ...]] = {
    "taskonomy": tuple(spec.name for spec in _TASKONOMY),
    "pascal_context": tuple(spec.name for spec in _PASCAL_CONTEXT),
}


def get_task(name: str) -> TaskSpec:
    """Return the row called `name`.

    Raises:
        UserError: there is no such task; names the nearest one.
    """
    if name in TASKS:
        return TASKS[name]
    raise UserError(unknown_task(name))


def unknown_task(name: str) -> str:
    """Say that there is no task called `name`, and which one is nearest."""
    near = get_close_matches(name, [*TASKS, *GROUPS], n=1, cutoff=0.0)
    return f"unknown task '{name}': did you mean '{near[0]}'? Known: {', '.join(TASKS)}"


def resolve_tasks(names: str | Iterable[str]) -> tuple[TaskSpec, ...]:
    """Return the rows for a group's name, a task's name, or a sequence of either; order kept.

    Raises:
        UserError: an unknown name, a task named twice, or no task at all.
    """
    wanted: Sequence[str] = [names] if isinstance(names, str) else list(names)
    expanded = [task for name in wanted for task in GROUPS.get(name, (name,))]
    if not expanded:
        raise UserError(f"no task given: name some of {', '.join(TASKS)}, or a group: {', '.join(GROUPS)}")
    twice = sorted({name for name in expanded if expanded.count(name) > 1})
    if twice:
        raise UserError(f"task '{twice[0]}' is given twice: name each task once")
    return tuple(get_task(name) for name in expanded)
