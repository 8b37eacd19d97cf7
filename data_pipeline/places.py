"""What a user names as the place of shards: `data.train`, `data.val`, or an argument of `modsquad data`."""

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from configs.errors import UserError
from configs.schema import DataConfig
from data_pipeline.local_storage import LocalStorage
from data_pipeline.remote.storage import RemoteStorage
from data_pipeline.storage import Storage

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def open_storage(place: Path | str, config: DataConfig) -> Storage:
    """Return the storage of a folder, or of a URL of any protocol that fsspec knows.

    Args:
        place: folder or URL.
        config: where remote shards are kept, and how many of them.

    Raises:
        UserError: it looks like a URL, but is none.
    """
    if isinstance(place, Path) or not _URL.match(place):
        return LocalStorage(Path(place))
    try:
        urlsplit(place)
    except ValueError as error:
        raise UserError(f"{place} is not a URL ({error}): correct it") from None
    if place.startswith("file://"):
        return LocalStorage(Path(unquote(urlsplit(place).path)))
    folder = Path(config.cache_dir) if config.cache_dir else default_cache_folder()
    return RemoteStorage(place, folder.absolute(), int(config.cache_gib * 2**30))


def default_cache_folder() -> Path:
    """Return where remote shards are kept unless `data.cache_dir` says otherwise.

    Schedulers set TMPDIR to a disk of the node, whereas homes are mostly on the network.
    """
    if os.environ.get("TMPDIR"):
        return Path(os.environ["TMPDIR"]) / f"modsquad-{os.getuid()}"
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "modsquad"
