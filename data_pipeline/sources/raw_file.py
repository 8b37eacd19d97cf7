"""A file of a dataset as it was published: on its own, or in a tar."""

from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError


@dataclass(frozen=True, slots=True)
class RawFile:
    """A file, or a member of a tar.

    Attributes:
        path: the file, or the tar.
        member: name inside the tar; empty for a plain file.
        offset: first byte of the content in `path`.
        size: bytes of the content.
    """

    path: str
    member: str = ""
    offset: int = 0
    size: int = -1

    @property
    def suffix(self) -> str:
        """Format by name, such as png."""
        return self.where.rpartition(".")[2].lower()

    @property
    def where(self) -> str:
        """Name for messages."""
        return f"{self.path}:{self.member}" if self.member else self.path

    def read(self) -> bytes:
        """Return the content.

        Raises:
            UserError: the file cannot be read, is empty or cut off.
        """
        try:
            with Path(self.path).open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise UserError(f"the file cannot be read ({error.strerror})") from None
        if not data:
            raise UserError("the file is empty")
        if len(data) < self.size:
            raise UserError("the file is cut off")
        return data
