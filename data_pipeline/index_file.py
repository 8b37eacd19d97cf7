"""The text of index.json: a few facts about the folder, then one entry per shard, each on a line of its own.

The index of a large dataset is a gigabyte of JSON, many times that as Python objects. So entries are written and read
one at a time.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Literal, TextIO

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from configs.task_definitions import DEFINITIONS_KEY, Definitions
from data_pipeline.tarscan import ShardEntry

INDEX_FILE = "index.json"

# Of the text that are read at a time.
_CHARACTERS = 4 << 20

_OPENING = re.compile(r',\s*"shards"\s*:\s*\[\s*')
_BETWEEN = re.compile(r"\s*,\s*")
_CLOSING = re.compile(r"\s*\]\s*\}\s*\Z")


class IndexHead(BaseModel):
    """What index.json says before its `shards`, which come last, sorted by file name.

    Attributes:
        version: of this format.
        side: height and width of every stored image, in pixels.
        tasks: labels that at least one sample has, sorted; for those who look into the file, as the shards' entries say
            it again.
        define_tasks: definitions of those labels whose tasks are none of the task table; left out of the file where
            there are none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    side: PositiveInt
    tasks: tuple[str, ...]
    define_tasks: Definitions = Field(default_factory=dict)


def format_index(head: IndexHead, entries: Iterable[str]) -> Iterator[str]:
    """Yield the pieces of index.json; `entries` are shards' JSON, at least one."""
    yield (
        head.model_dump_json(exclude=None if head.define_tasks else {DEFINITIONS_KEY}).removesuffix("}") + ',"shards":['
    )
    for number, entry in enumerate(entries):
        yield (",\n" if number else "\n") + entry
    yield "\n]}\n"


def parse_index(file: TextIO) -> tuple[IndexHead, Iterator[ShardEntry]]:
    """Return the facts, and the shards to be read on the way.

    Raises:
        ValueError: the text is not an index of this version; may come from the iterator.
    """
    text = _Text(file)
    # What stops at the end of the part that was read may go on behind it.
    while (opening := _OPENING.search(text.ahead)) is None or opening.end() == len(text.ahead):
        if not text.read_more():
            break
    head = IndexHead.model_validate_json(text.ahead if opening is None else text.ahead[: opening.start()] + "}")
    if opening is None:
        raise ValueError("it lists no shards")
    text.skip(opening.end())
    return head, _parse_entries(text)


def _parse_entries(text: "_Text") -> Iterator[ShardEntry]:
    decoder = json.JSONDecoder()
    while True:
        try:
            values, end = decoder.raw_decode(text.ahead, text.place)
        except ValueError:
            if text.read_more():
                continue
            raise
        text.skip(end)
        yield ShardEntry.model_validate(values)
        while (between := _BETWEEN.match(text.ahead, text.place)) is None or between.end() == len(text.ahead):
            if not text.read_more():
                break
        if between is None:
            break
        text.skip(between.end())
    if _CLOSING.match(text.ahead, text.place) is None:
        raise ValueError(f"its list of shards breaks off at character {text.passed + text.place}")


class _Text:
    """A file's text from where it is parsed on, a part at a time.

    Attributes:
        ahead: the part that is in memory.
        place: in `ahead`, where parsing goes on.
        passed: characters that are no longer in memory.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.ahead = ""
        self.place = 0
        self.passed = 0

    def skip(self, place: int) -> None:
        """Go on at `place` of `ahead`."""
        self.place = place

    def read_more(self) -> bool:
        """Drop what is parsed, and read about as much as remains, at least a few MiB; False: that was all."""
        more = self._file.read(max(_CHARACTERS, len(self.ahead) - self.place))
        self.passed += self.place
        self.ahead = self.ahead[self.place :] + more
        self.place = 0
        return bool(more)
