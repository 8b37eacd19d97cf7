"""The embedded rooms as a source for packing."""

from dataclasses import dataclass, replace

from configs.errors import UserError
from data_pipeline.rooms.generate import LARGEST, SMALLEST, VERSION, make_room
from data_pipeline.sample import Sample


@dataclass(frozen=True)
class RoomsSource:
    """Rooms `offset` to `offset + images - 1` of a seed, with the labels of all tasks.

    Attributes:
        images: number of rooms.
        size: side of the square images in pixels.
        seed: selects the rooms; every number is another series.
        offset: first room; sources of one seed that do not overlap share no room.
    """

    images: int
    size: int
    seed: int
    offset: int = 0

    def __post_init__(self) -> None:
        if self.images < 1 or self.offset < 0 or self.seed < 0:
            raise UserError(
                f"rooms: {self.images} images from number {self.offset} on, seed {self.seed}: give 1 image or more, "
                "and an offset and a seed of 0 or more"
            )
        if not SMALLEST <= self.size <= LARGEST:
            raise UserError(
                f"rooms are {SMALLEST} to {LARGEST} pixels wide, not {self.size}: give a size in that range"
            )

    @property
    def name(self) -> str:
        """Identifies the content."""
        return f"rooms-v{VERSION}-{self.size}px-seed{self.seed}-from{self.offset}"

    def part(self, samples: range) -> "RoomsSource":
        """Return the source of some rooms alone."""
        return replace(self, images=len(samples), offset=self.offset + samples.start)

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> Sample:
        return make_room(self.seed, self.offset + index, self.size)
