"""Shards for the data benchmark, made from rooms by this project's own writer, and webdataset as a reader of them."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from cluster.cpu import usable_cores
from configs.tasks import get_task, resolve_tasks
from data_pipeline.codecs import ImageCodec, ImageFormat, LabelCodec, decode_image, decode_label, decode_member
from data_pipeline.rooms.generate import make_room
from data_pipeline.sample import AnyArray, Sample
from data_pipeline.shards import ShardWriter, write_index
from data_pipeline.tarscan import IMAGE_FIELD, MASK_FIELD, META_FIELD

TASKS = resolve_tasks("taskonomy")
SEED = 0


def make_samples(count: int, side: int) -> list[Sample]:
    """Return rooms with the labels of the 13 tasks, and no others."""
    cores = usable_cores()
    with ProcessPoolExecutor(cores, get_context("spawn")) as processes:
        return list(processes.map(partial(_make_sample, side=side), range(count)))


def write_shards(
    folder: Path, samples: Sequence[Sample], *, shards: int, image_format: ImageFormat, label_codec: LabelCodec
) -> Path:
    """Write the samples into so many shards of equal size with their index, and return the folder."""
    folder.mkdir()
    entries = []
    for shard in range(shards):
        path = folder / f"{shard:04d}.tar"
        with ShardWriter(path, label_codec, ImageCodec(image_format)) as writer:
            for sample in samples[shard::shards]:
                writer.write(sample)
        entries.append(writer.entry)
    write_index(folder, entries)
    return folder


def webdataset_by_pil(folder: Path) -> Iterator[dict[str, Any]]:
    """Read every sample as webdataset's own decoder for images does; pixels of 16 bits come out wrong."""
    return _iterate(_open(folder).decode("pil"))


def webdataset_by_our_codecs(folder: Path, only: str | None = None) -> Iterator[dict[str, Any]]:
    """Read every sample with this project's decoders; `only`: no label but that task's is read."""
    wanted = {IMAGE_FIELD, MASK_FIELD, only}

    def select(name: str) -> bool:
        return name.split(".")[1] in wanted

    return _iterate(_open(folder, None if only is None else select).decode(_decode))


def in_batches(samples: Iterator[dict[str, Any]], size: int) -> Iterator[dict[str, AnyArray]]:
    """Stack the arrays of so many samples at a time, which are of equal shapes, as a training would have to."""
    while group := list(islice(samples, size)):
        names = [name for name, value in group[0].items() if isinstance(value, np.ndarray)]
        yield {name: np.stack([sample[name] for sample in group]) for name in names}


def _make_sample(number: int, side: int) -> Sample:
    room = make_room(SEED, number, side)
    names = {spec.name for spec in TASKS}
    return replace(room, labels={name: label for name, label in room.labels.items() if name in names})


def _open(folder: Path, select: Callable[[str], bool] | None = None) -> Any:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return webdataset.WebDataset(urls, shardshuffle=False, select_files=select)


def _iterate(dataset: Any) -> Iterator[dict[str, Any]]:
    yield from dataset


def _decode(name: str, data: bytes) -> Any:
    """Decode a member as webdataset asks for it: `name` is what follows the key, with its dot."""
    field, _, suffix = name.lstrip(".").rpartition(".")
    match field:
        case "":
            return None
        case field if field == META_FIELD:
            return data
        case field if field == IMAGE_FIELD:
            return decode_image(suffix, data, name)
        case field if field == MASK_FIELD:
            return decode_member(suffix, data, name) > 0
    return decode_label(get_task(field), suffix, data, name)
