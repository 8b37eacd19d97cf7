"""Any source of samples to a folder of indexed shards: in parallel, resumable, and without silent losses.

Every process writes whole shards. A finished shard has a `.entry.json` beside it until the index is written, so a run
that was killed at any point continues where it stopped. Which sample goes into which shard depends on the source and
`samples_per_shard` alone: the bytes are the same for any number of processes. What cannot be used is listed in
`problems.jsonl`, one object per line; the rest is kept.
"""

import errno
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from configs.atomic import write_text_atomically
from configs.errors import UserError
from configs.tasks import TASKS, TaskTable, get_task
from data_pipeline.codecs import PNG, ImageCodec, LabelCodec, encode_label
from data_pipeline.node_files import locked
from data_pipeline.processes import run_in_processes
from data_pipeline.sample import Sample
from data_pipeline.shards import INDEX_FILE, ShardEntry, ShardIndex, ShardWriter, write_index
from data_pipeline.source import (
    JOB_FILE,
    PROBLEMS_FILE,
    PartialSample,
    Problem,
    Samples,
    Source,
    format_problems,
    read_problems,
)

__all__ = ["PackReport", "Source", "pack"]

_LOCK_FILE = ".lock"
_NOTE_SUFFIX = ".entry.json"
# Names of what `ShardWriter` and `configs.atomic` write before it is complete.
_HALF_WRITTEN = (".shard-*", *(f".{Path(name).stem}.*" for name in (JOB_FILE, PROBLEMS_FILE, INDEX_FILE)))


@dataclass(frozen=True)
class PackReport:
    """What a packing produced.

    Attributes:
        samples: samples in the shards.
        shards: number of shards.
        problems: what was left out.
    """

    samples: int
    shards: int
    problems: tuple[Problem, ...]


def pack(
    source: Source,
    out: Path,
    *,
    workers: int = 1,
    samples_per_shard: int = 256,
    label_codec: LabelCodec = "png",
    image_codec: ImageCodec = PNG,
    task_table: TaskTable = TASKS,
    facts: Sequence[str] = (),
    strict: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> PackReport:
    """Write all samples of `source` into shards, an index and a list of problems; continue what an earlier call began.

    A finished folder of the same source and options is left as it is.

    Args:
        source: the samples.
        out: folder to fill; made if missing. It must be empty, or hold an earlier call's work on the same source.
        workers: processes; 1 packs in this one.
        samples_per_shard: upper bound; the samples are spread evenly over the fewest shards.
        label_codec: how dense labels and masks are stored.
        image_codec: how images are stored.
        task_table: the tasks that its labels may be of; the index defines those that are none of the task table.
        facts: lines about the source as a whole, which `data_pipeline.check` shows again.
        strict: raise at the first problem instead of listing it.
        on_progress: called after every sample with the number of samples done so far, those of finished shards
            included.

    Raises:
        UserError: `out` holds something else, another process packs into it, the source has no usable sample, no space
            is left, or, if `strict`, the first problem.
    """
    if workers < 1 or samples_per_shard < 1:
        raise UserError(f"workers ({workers}) and samples per shard ({samples_per_shard}) must be 1 or more")
    if not len(source):
        raise UserError(f"{source.name} has no samples: there is nothing to pack into {out}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {out} ({error.strerror}): give another one") from None
    with _space_explained(out), _locked(out) as alone:
        job = _Job(
            source.name, len(source), out, samples_per_shard, label_codec, image_codec, task_table, tuple(facts), strict
        )
        _claim_folder(job)
        index = out / INDEX_FILE
        if not index.is_file():
            if alone:
                _remove_half_written(out)
            _write_missing_shards(job, source, workers, on_progress)
            if alone or not index.is_file():  # Another process may have finished it, and removed the notes.
                _finish(job)
        return _report(job)


@dataclass(frozen=True)
class _Note:
    """What is left beside a finished shard until all are: its part of the index, None for a shard without samples."""

    entry: ShardEntry | None
    problems: list[Problem]


@dataclass(frozen=True)
class _Job:
    """One packing, as its processes see it; calling it writes one shard.

    Every process holds a copy, so it is small for any source: what a shard is made of comes with the call.

    Attributes:
        source: name of the samples' source.
        samples: their number.
        out: folder of the shards.
        samples_per_shard: upper bound.
        label_codec: how dense labels and masks are stored.
        image_codec: how images are stored.
        task_table: the tasks that labels may be of.
        facts: lines about the source.
        strict: raise at the first problem.
    """

    source: str
    samples: int
    out: Path
    samples_per_shard: int
    label_codec: LabelCodec
    image_codec: ImageCodec
    task_table: TaskTable
    facts: tuple[str, ...]
    strict: bool

    @property
    def shards(self) -> int:
        """Number of shards, those without a usable sample included."""
        return -(-self.samples // self.samples_per_shard)

    def samples_of(self, shard: int) -> range:
        """Samples of a shard; lengths differ by at most one."""
        return range(shard * self.samples // self.shards, (shard + 1) * self.samples // self.shards)

    def path(self, shard: int) -> Path:
        """File of a shard."""
        return self.out / f"shard-{shard:06d}.tar"

    def note(self, shard: int) -> _Note | None:
        """What an earlier call noted about a shard; None if it is yet to be written, or to be written again."""
        path = _note_path(self.path(shard))
        if not path.is_file():
            return None
        try:
            stored = json.loads(path.read_bytes())
            entry = stored["entry"] and ShardEntry.model_validate(stored["entry"])
            problems = [Problem(**problem) for problem in stored["problems"]]
        except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
            return None  # Damaged since, or gone; what it told of is made anew.
        if entry and not (self.path(shard).is_file() and self.path(shard).stat().st_size == entry.file_bytes):
            return None
        return _Note(entry, problems)

    def __call__(self, item: tuple[int, Samples], on_step: Callable[[], None]) -> None:
        """Write a shard, given by number and samples, then the note that it is finished; one step per sample."""
        shard, samples = item
        problems: list[Problem] = []
        with _space_explained(self.out):
            entry = self._write_shard(self.path(shard), self._usable(shard, samples, problems, on_step), problems)
            stored = {
                "entry": entry.model_dump(mode="json") if entry else None,
                "problems": [asdict(problem) for problem in problems],
            }
            write_text_atomically(_note_path(self.path(shard)), json.dumps(stored))

    def _usable(
        self, shard: int, samples: Samples, problems: list[Problem], on_step: Callable[[], None]
    ) -> Iterator[Sample]:
        for place, number in enumerate(self.samples_of(shard)):
            sample: Sample | None = None
            try:
                sample = samples[place]
            except PartialSample as partial:
                self._list(problems, partial.problems)
                sample = partial.sample
            except UserError as error:
                self._list(problems, [Problem(f"{self.source}[{number}]", "", str(error))])
            if sample is not None:
                yield sample
            on_step()

    def _write_shard(self, path: Path, samples: Iterable[Sample], problems: list[Problem]) -> ShardEntry | None:
        """Write the samples; None, and no file, if nothing can be written."""
        try:
            with ShardWriter(path, self.label_codec, self.image_codec, self.task_table) as writer:
                if not sum([self._write_sample(writer, sample, problems) for sample in samples]):
                    raise _NothingWrittenError
        except _NothingWrittenError:
            return None
        return writer.entry

    def _write_sample(self, writer: ShardWriter, sample: Sample, problems: list[Problem]) -> bool:
        """Write what can be written of a sample. The writer adds nothing of a sample that it refuses."""
        try:
            writer.write(sample)
        except UserError:
            good, bad = _sift_labels(sample, self.task_table)
            self._list(problems, bad)
            try:
                writer.write(good)
            except UserError as error:
                self._list(problems, [Problem(sample.key, "", str(error))])
                return False
        return True

    def _list(self, problems: list[Problem], found: list[Problem]) -> None:
        _refuse_if_strict(self, found)
        problems.extend(found)


def _refuse_if_strict(job: _Job, problems: Sequence[Problem]) -> None:
    if job.strict and problems:
        raise UserError(str(problems[0]))


class _NothingWrittenError(Exception):
    """No sample of a shard can be used."""


def _sift_labels(sample: Sample, task_table: TaskTable) -> tuple[Sample, list[Problem]]:
    """Return the sample without the labels that do not fit their task or the image, and why they do not."""
    good, bad = {}, []
    for name, label in sample.labels.items():
        try:
            spec = get_task(name, task_table)
            encode_label(spec, label)
            if spec.dense and label.shape[:2] != sample.rgb.shape[:2]:
                raise UserError(f"the label is {label.shape[:2]} pixels, the image {sample.rgb.shape[:2]}")
            good[name] = label
        except UserError as error:
            bad.append(Problem(sample.key, name, str(error)))
    return replace(sample, labels=good), bad


def _claim_folder(job: _Job) -> None:
    """Note in the folder what is packed into it, or check that it is the same as before."""
    path = job.out / JOB_FILE
    wanted = json.dumps(
        {
            "source": job.source,
            "samples": job.samples,
            "samples_per_shard": job.samples_per_shard,
            "label_codec": job.label_codec,
            "image_codec": job.image_codec.name,
            "facts": job.facts,
        }
    )
    if path.is_file():
        if (found := path.read_text(encoding="utf-8", errors="replace")) != wanted:
            raise UserError(f"{job.out} holds a packing of {found}, not of {wanted}: give another folder or delete it")
    elif any(job.out.glob("*.tar")) or (job.out / INDEX_FILE).exists():
        raise UserError(f"{job.out} holds shards that were not packed here: give an empty folder")
    else:
        write_text_atomically(path, wanted)


def _remove_half_written(folder: Path) -> None:
    """Remove what killed processes left; only for who holds the lock, as others may be writing just that."""
    for pattern in _HALF_WRITTEN:
        for partial in folder.glob(pattern):
            partial.unlink(missing_ok=True)


def _write_missing_shards(job: _Job, source: Source, workers: int, on_progress: Callable[[int], None] | None) -> None:
    missing = [shard for shard in range(job.shards) if job.note(shard) is None]
    done = job.samples - sum(len(job.samples_of(shard)) for shard in missing)

    def count() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done)

    if on_progress is not None and done:
        on_progress(done)
    run_in_processes(job, ((shard, source.part(job.samples_of(shard))) for shard in missing), workers, count)


def _finish(job: _Job) -> None:
    """Write problems.jsonl, and last the index: a folder with an index is complete."""
    problems: list[Problem] = []
    usable = False
    for note in _notes(job):
        problems.extend(note.problems)
        usable = usable or note.entry is not None
    _refuse_if_strict(job, problems)
    if not usable:
        raise UserError(f"{job.source} has no usable sample: {problems[0]}")
    write_text_atomically(job.out / PROBLEMS_FILE, format_problems(problems))
    write_index(job.out, (note.entry for note in _notes(job) if note.entry is not None), job.task_table)


def _notes(job: _Job) -> Iterator[_Note]:
    """Yield the notes of all shards; one at a time, as all of them together are large."""
    for shard in range(job.shards):
        note = job.note(shard)
        if note is None:  # Every shard was written.
            raise UserError(f"{job.out} is changed by another process: run this again when no other packs into it")
        yield note


def _report(job: _Job) -> PackReport:
    """Read back what the folder holds; the notes beside the shards have served."""
    for shard in range(job.shards):
        _note_path(job.path(shard)).unlink(missing_ok=True)
    problems = read_problems(job.out)
    _refuse_if_strict(job, problems)
    index = ShardIndex.load(job.out)
    return PackReport(len(index), index.shard_count, problems)


def _note_path(shard: Path) -> Path:
    return shard.with_name(shard.name + _NOTE_SUFFIX)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Keep other processes from packing into the folder; yield whether that could be done.

    Some cluster file systems have no locks. A second packing there wastes time, but writes the same bytes, each process
    under temporary names of its own, and what a killed one left stays.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / _LOCK_FILE, wait=False))
            alone = True
        except BlockingIOError:
            raise UserError(f"another process is packing into {folder}: wait for it, or give another folder") from None
        except OSError:
            alone = False
        yield alone


@contextmanager
def _space_explained(folder: Path) -> Iterator[None]:
    """Turn a full disk into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"no space left for {folder}: free some and run it again, finished shards are kept") from None
