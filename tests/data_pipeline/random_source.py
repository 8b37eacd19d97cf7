"""Small sources of samples for tests; at module level, so that spawned processes can import them."""

import time
from dataclasses import dataclass, replace

import numpy as np

from configs.errors import UserError
from configs.tasks import TASKS
from data_pipeline.sample import AnyArray, Sample
from data_pipeline.source import PartialSample, Problem


def random_sample(
    index: int, side: int = 16, tasks: tuple[str, ...] = ("depth_zbuffer", "normal", "class_scene")
) -> Sample:
    generator = np.random.default_rng(index)
    labels: dict[str, AnyArray] = {}
    for name in tasks:
        spec = TASKS[name]
        encoding = spec.encoding
        if not spec.dense:
            labels[name] = generator.random(encoding.channels, dtype=np.float32)
            continue
        shape = (side, side, encoding.channels) if encoding.channels > 1 else (side, side)
        high = spec.channels if spec.target == "class_ids" else np.iinfo(encoding.dtype).max + 1
        labels[name] = generator.integers(0, high, shape).astype(encoding.dtype)
    return Sample(
        key=f"view_{index:04d}",
        rgb=generator.integers(0, 256, (side, side, 3)).astype(np.uint8),
        labels=labels,
        mask_valid=(generator.random((side, side)) > 0.1).astype(np.uint8) * np.uint8(255),
        meta={"index": index},
    )


@dataclass(frozen=True)
class Part:
    """Some samples of a source that is small itself."""

    whole: "RandomSource"
    samples: range

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.whole[self.samples[index]]


@dataclass
class RandomSource:
    count: int
    delay_seconds: float = 0.0
    tasks: tuple[str, ...] = ("depth_zbuffer", "normal", "class_scene")

    @property
    def name(self) -> str:
        return f"random-{self.count}"

    def __len__(self) -> int:
        return self.count

    def part(self, samples: range) -> Part:
        return Part(self, samples)

    def __getitem__(self, index: int) -> Sample:
        time.sleep(self.delay_seconds)
        return random_sample(index, tasks=self.tasks)


@dataclass
class FaultySource(RandomSource):
    """Sample 1 has a depth of 8 bits, 2 lacks a label, 3 is lost, 5 has labels of another size and a bad key."""

    def __getitem__(self, index: int) -> Sample:
        sample = random_sample(index)
        labels = dict(sample.labels)
        if index == 1:
            labels["depth_zbuffer"] = labels["depth_zbuffer"].astype(np.uint8)
        if index == 2:
            del labels["normal"]
            rest = Sample(key=sample.key, rgb=sample.rgb, labels=labels)
            raise PartialSample([Problem(sample.key, "normal", "the file is empty", "somewhere.png")], rest)
        if index == 3:
            raise UserError("the camera is inside a wall")
        if index == 4:
            labels["normal"] = labels["normal"][:8]
        key = "bad key!" if index == 5 else sample.key
        return Sample(key=key, rgb=sample.rgb, labels=labels, mask_valid=sample.mask_valid)


@dataclass
class UnknownSource(RandomSource):
    """No pixel has a depth."""

    def __getitem__(self, index: int) -> Sample:
        sample = random_sample(index)
        return replace(sample, labels={"depth_zbuffer": np.full((16, 16), 65535, np.uint16)})


@dataclass
class LostSource(RandomSource):
    """No sample from `first_lost` on can be read."""

    first_lost: int = 0

    def __getitem__(self, index: int) -> Sample:
        if index >= self.first_lost:
            raise UserError("the camera is inside a wall")
        return random_sample(index)


@dataclass
class FullDiskSource(RandomSource):
    """The disk is full at sample 2."""

    def __getitem__(self, index: int) -> Sample:
        if index == 2:
            raise OSError(28, "No space left on device")
        return random_sample(index)
