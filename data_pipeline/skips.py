"""Damaged members of shards: how one is told from other errors, and how those that training leaves out are counted."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from configs.errors import UserError


class MemberError(UserError):
    """One member of one sample cannot be used; the samples beside it can.

    Attributes:
        reason: what kind of fault it is, one word.
    """

    reason: ClassVar[str] = "unreadable"


class DamagedMember(MemberError):
    """Its bytes are not those of a file of its format."""

    reason = "damaged"


class UnfitMember(MemberError):
    """It is whole, but of another depth, shape or format than its field asks for."""

    reason = "unfit"


@dataclass(frozen=True)
class Skip:
    """A member that was left out of a batch.

    Attributes:
        key: its sample.
        shard: file name of the shard.
        member: image, mask or task; without the first two the whole sample was left out.
        reason: see `MemberError`.
        message: the error.
    """

    key: str
    shard: str
    member: str
    reason: str
    message: str


class SkipCounts:
    """What a run has left out so far, over all ranks."""

    def __init__(self) -> None:
        self._events: Counter[tuple[str, str]] = Counter()
        self._members: set[tuple[str, str]] = set()

    @property
    def samples(self) -> int:
        """Number of different samples with a damaged member."""
        return len({key for key, _ in self._members})

    def add(self, skips: Iterable[Skip]) -> list[Skip]:
        """Count skips; return those of members that were not met before."""
        new = []
        for skip in skips:
            self._events[skip.shard, skip.reason] += 1
            if (skip.key, skip.member) not in self._members:
                self._members.add((skip.key, skip.member))
                new.append(skip)
        return new

    def by_shard(self) -> dict[str, dict[str, int]]:
        """Return shard -> reason -> how often a member was left out, every time that it was met."""
        counts: dict[str, dict[str, int]] = {}
        for (shard, reason), count in sorted(self._events.items()):
            counts.setdefault(shard, {})[reason] = count
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` takes, in JSON's types."""
        return {"events": self.by_shard(), "members": [list(member) for member in sorted(self._members)]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SkipCounts":
        """Return the counts that `to_dict` gave."""
        counts = cls()
        for shard, reasons in values["events"].items():
            counts._events.update({(shard, reason): count for reason, count in reasons.items()})
        counts._members = {(key, member) for key, member in values["members"]}
        return counts


def skip_line(skip: Skip, step: int) -> dict[str, Any]:
    """Return the object that stands for a skip in a run's list, met first in step `step`."""
    return {"step": step, **asdict(skip)}
