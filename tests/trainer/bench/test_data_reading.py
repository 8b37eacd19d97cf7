"""The data benchmark compares like with like: the same samples and labels on both sides."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.sample import Sample
from data_pipeline.shards import ShardIndex
from trainer.bench import data_reading
from trainer.bench.comparison import Settings
from trainer.bench.data_shards import (
    TASKS,
    in_batches,
    make_samples,
    webdataset_by_our_codecs,
    webdataset_by_pil,
    write_shards,
)

QUICK = Settings(quick=True, rounds=1)
SIDE = 32


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return make_samples(8, SIDE)


@pytest.fixture(scope="module")
def folder(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_shards(root / "png", samples, shards=2, image_format="png", label_codec="png")
    write_shards(root / "best", samples, shards=2, image_format="jpeg", label_codec="zstd")
    return root


def test_samples_have_the_thirteen_labels(samples: list[Sample], folder: Path) -> None:
    assert len(TASKS) == 13
    assert all(set(sample.labels) == {spec.name for spec in TASKS} for sample in samples)
    for name in ("png", "best"):
        index = ShardIndex.load(folder / name)
        assert (len(index), index.shard_count, len(index.tasks)) == (8, 2, 13)


def test_webdataset_reads_what_was_written(samples: list[Sample], folder: Path) -> None:
    written = {sample.key: sample for sample in samples}
    seen = list(webdataset_by_our_codecs(folder / "best"))
    assert sorted(found["__key__"] for found in seen) == sorted(written)
    for found in seen:
        fields = {name.rpartition(".")[0]: value for name, value in found.items()}
        for spec in TASKS:
            np.testing.assert_array_equal(fields[spec.name], written[found["__key__"]].labels[spec.name])
        assert fields["rgb"].shape == (SIDE, SIDE, 3)
        assert fields["mask_valid"].dtype == np.bool_


def test_webdataset_decodes_every_png(folder: Path) -> None:
    seen = list(webdataset_by_pil(folder / "png"))
    assert len(seen) == 8
    assert {type(value).__module__ for found in seen for name, value in found.items() if name.endswith("png")} == {
        "PIL.Image"
    }


def test_webdataset_in_batches_stacks_every_array(folder: Path) -> None:
    batches = list(in_batches(webdataset_by_our_codecs(folder / "best"), 3))
    assert [len(batch["normal.plz"]) for batch in batches] == [3, 3, 2]
    alone = [found["normal.plz"] for found in webdataset_by_our_codecs(folder / "best")]
    np.testing.assert_array_equal(np.concatenate([batch["normal.plz"] for batch in batches]), np.stack(alone))
    assert len(batches[0]) == 15, "an image, a mask and 13 labels"


def test_one_fixed_task_leaves_the_other_labels_out(folder: Path) -> None:
    for found in webdataset_by_our_codecs(folder / "best", "normal"):
        fields = {name.rpartition(".")[0] for name in found if not name.startswith("__")}
        assert fields == {"rgb", "mask_valid", "normal"}


@pytest.mark.parametrize(("which", "pairs"), [("all tasks", 13), ("one task", 1)])
def test_the_loader_serves_so_many_tasks_per_image(folder: Path, which: str, pairs: int) -> None:
    batches = list(data_reading._loader(QUICK, folder / "best", which, workers=0, steps=2))
    assert [len(batch.keys) for batch in batches] == [4, 4]
    assert [len(batch.pair_task) for batch in batches] == [4 * pairs] * 2


def test_the_time_of_the_workers_counts(folder: Path) -> None:
    milliseconds, rate = data_reading._run_workers(QUICK, folder / "best", "all tasks", 1)
    assert milliseconds > 0
    assert rate > 0
    busy = "import time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert data_reading._cpu_seconds([process.pid]) - data_reading._cpu_seconds([]) > 0.25
        process.communicate(b"\n")


def test_nothing_is_measured_twice() -> None:
    assert data_reading.compare_data(QUICK, "bf16") == []
