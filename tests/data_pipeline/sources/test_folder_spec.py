"""Descriptions of own data: typed, and wrong ones are one line that names file, key and the nearest valid key."""

from pathlib import Path

import pytest

from configs.errors import UserError
from configs.tasks import TASKS
from data_pipeline.sources.folder_labels import (
    BinaryLabel,
    ClassesLabel,
    CodesLabel,
    DepthLabel,
    NormalLabel,
    RegionsLabel,
)
from data_pipeline.sources.folder_spec import FolderSpec, load_spec
from data_pipeline.sources.folder_vectors import VectorLabel

MINE = "rgb: a\ndefine_tasks: {mine: {like: semseg, class_names: [a, b]}}\n"
LABELS = "labels:\n  depth_zbuffer: depth/{key}.png\n"


def load(folder: Path, text: str) -> FolderSpec:
    path = folder / "own.yaml"
    path.write_text(text, encoding="utf-8")
    return load_spec(path)


def test_a_pattern_alone_is_short_for_a_label(tmp_path: Path) -> None:
    short = load(tmp_path, "rgb: a/{key}.png\nlabels: {semseg: a/b.png}\nmask_valid: m/{key}.png\n")
    long = load(
        tmp_path,
        "rgb: a/{key}.png\nlabels: {semseg: {path: a/b.png}}\nmask_valid: {path: 'm/{key}.png'}\n",
    )
    assert short == long
    assert short.labels["semseg"] == ClassesLabel(path="a/b.png")
    assert short.patterns() == {
        "rgb": "a/{key}.png", "labels.semseg.path": "a/b.png", "mask_valid.path": "m/{key}.png",
    }  # fmt: skip


def test_every_task_has_a_kind_of_label(tmp_path: Path) -> None:
    lines = "".join(f"  {task}: x/{{key}}.npy\n" for task in TASKS)
    labels = load(tmp_path, f"rgb: a/{{key}}.png\nlabels:\n{lines}").labels
    kinds = {
        kind: {task for task, label in labels.items() if type(label) is kind} for kind in map(type, labels.values())
    }
    assert kinds == {
        DepthLabel: {"depth_zbuffer", "depth_euclidean"},
        NormalLabel: {"normal", "normals"},
        ClassesLabel: {"semseg", "human_parts"},
        BinaryLabel: {"saliency", "edges"},
        RegionsLabel: {"segment_unsup2d", "segment_unsup25d"},
        VectorLabel: {"class_object", "class_scene"},
        CodesLabel: {
            "edge_occlusion", "edge_texture", "keypoints2d", "keypoints3d", "principal_curvature", "reshading",
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rgb: a/{k}.png\n", r"labels: Field required"),
        (LABELS, "rgb: Field required"),
        ("rgb: a\nlabels: {}\n", "labels: Dictionary should have at least 1 item"),
        ("rgb: a\nroots: x\n" + LABELS, r"unknown key 'roots', did you mean 'root'\?"),
        ("rgb: a\nsplit: {field: x, fraction: {val: 1}}\n" + LABELS, "did you mean 'split.fractions'"),
        ("rgb: a\nmask_valid: {path: a, treshold: 1}\n" + LABELS, "did you mean 'mask_valid.threshold'"),
        ("rgb: a\nlabels: {depth_zbufer: a}\n", "unknown task 'depth_zbufer': did you mean 'depth_zbuffer'"),
        ("rgb: a\nlabels: {depth_zbuffer: {path: a, unit: 1}}\n", "key 'unit', did you mean 'unit_metres'"),
        ("rgb: a\nlabels: {depth_zbuffer: {path: a, axes: [x, y, z]}}\n", "depth_zbuffer: unknown key 'axes'"),
        ("rgb: a\nlabels: {depth_zbuffer: {path: a, unit_metres: 0}}\n", "unit_metres: Input should be greater"),
        ("rgb: a\nlabels: {normal: {path: a, axes: [x, y, w]}}\n", r"labels.normal: axes.2: Input should be 'x'"),
        ("rgb: a\nlabels: {semseg: {path: a, map: {1: wall}}}\n", "'wall' is no class of 'semseg': give 0 to 20"),
        ("rgb: a\nlabels: {semseg: 7}\n", r"labels.semseg: give the pattern .* \(got 7\)"),
        ("rgb: a\nlabels: [a]\n", "labels: Input should be a valid dictionary"),
        ("rgb: a\nlabels: {class_scene: {path: a, value: b}}\n", "give one of `path`, `value` and `values`"),
        ("rgb: a\nlabels: {class_scene: {value: b, map: {x: 365}}}\n", "365 is no class of 'class_scene'"),
        ("rgb: a\nlabels: {class_scene: {path: b, map: {x: 1}}}\n", "`map` is for the class in `value`"),
        ("rgb: /a/{k}\n" + LABELS, "rgb: '/a/{k}' is absolute: set `root` instead"),
        ("rgb: a\nlabels: {edges: {path: ../e.png, boundaries: true}}\n", r"labels.edges.path: '../e.png' leads out"),
        ("rgb: a\ntable: t.csv\nlabels: {edges: 'e/*.png'}\n", r"labels.edges.path: '\*' has no meaning with a table"),
        ("rgb: a\nname: 'x*'\n" + LABELS, "name: '\\*' has no meaning"),
        ("rgb: a\nname: 'x{'\n" + LABELS, "'x{': fields are written"),
        ("rgb: a\ndelimiter: ';'\n" + LABELS, "delimiter: is that of a table"),
        ("rgb: a\nmask_valid: {path: a, boundaries: true}\n" + LABELS, "mask_valid: boundaries are no mask"),
        ("rgb: {image}\n" + LABELS, "rgb: a pattern that begins with a brace needs quotes"),
        ("rgb: a\nlabels: {edges: {path: e/{key}.png}}\n", r"not valid YAML at line 2.*need quotes inside"),
        ("rgb: a\nsplit: {}\n" + LABELS, "split: give one of `field`, `lists` and `fractions`"),
        ("rgb: a\nsplit: {fractions: {val: 0.6, test: 0.5}}\n" + LABELS, "below 1 together"),
        ("rgb: a\nsplit: {fractions: {train: 0.6}}\n" + LABELS, "'train' is what the other fractions leave"),
        ("rgb: a\nsplit: {field: x, by: y}\n" + LABELS, "`by` says what `fractions` hash"),
        ("rgb: a\nfit: crop\n" + LABELS, "fit: Input should be 'centre' or 'stretch'"),
        (MINE + "labels: {min: a}\n", "labels.min: unknown task 'min': did you mean 'mine'"),
        (MINE + "labels: {mine: {path: a, map: {1: c}}}\n", "'c' is no class of 'mine': give 0 to 1 or one of a, b"),
        (MINE + "labels: {mine: {path: a, threshold: 1}}\n", "labels.mine: unknown key 'threshold'"),
        ("rgb: a\ndefine_tasks: {mine: {like: semse}}\nlabels: {mine: a}\n", "define_tasks.mine: unknown task 'semse'"),
        ("rgb: a\ndefine_tasks: {edges: {like: semseg}}\n" + LABELS, "define_tasks: 'edges' is in the task table"),
        ("- a\n", "holds a list"),
    ],
)  # fmt: skip
def test_wrong_descriptions_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        load(tmp_path, text)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(str(tmp_path / "own.yaml"))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"own\.yaml cannot be read: No such file"):
        load_spec(tmp_path / "own.yaml")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_spec(tmp_path)
