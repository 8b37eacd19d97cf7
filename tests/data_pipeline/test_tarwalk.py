"""A walk over any tar gives what other programs find in it, or says why not; it never gives less, and never hangs."""

import gzip
import os
import shutil
import subprocess
import tarfile
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.tarwalk import TarError, TarFile, is_header_of, walk_tar
from tests.data_pipeline.tars import BLOCK, forge_header, member, tar_of

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
NAMES = st.lists(
    st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="/\0"), min_size=1, max_size=40).filter(
        lambda part: part not in (".", "..")
    ),
    min_size=1,
    max_size=8,
).map("/".join)
in_any_order = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def walk(path: Path, tar: bytes) -> list[TarFile]:
    path.write_bytes(tar)
    return list(walk_tar(path))


def found_by_tarfile(path: Path) -> list[TarFile]:
    with tarfile.open(path, "r:") as tar:
        return [TarFile(info.name, info.offset_data, info.size) for info in tar if info.isreg()]


@in_any_order
@given(
    files=st.lists(st.tuples(NAMES, st.binary(max_size=1200)), min_size=1, max_size=6, unique_by=lambda file: file[0]),
    kind=st.sampled_from(["gnu", "pax"]),
    comment=st.text(st.characters(exclude_categories=["C"]), max_size=200),
)
def test_the_files_are_those_that_tarfile_finds(
    tmp_path: Path, files: list[tuple[str, bytes]], kind: str, comment: str
) -> None:
    members = [(member(name, pax_headers={"comment": comment} if comment else {}), data) for name, data in files]
    options = {"pax_headers": {"comment": comment}} if kind == "pax" and comment else {}
    tar = tar_of(members, FORMATS[kind], **options)
    found = walk(tmp_path / "x.tar", tar)
    assert found == found_by_tarfile(tmp_path / "x.tar")
    assert [(file.name, tar[file.offset : file.offset + file.size]) for file in found] == files


@pytest.mark.skipif(not shutil.which("tar"), reason="no tar program")
@pytest.mark.parametrize("kind", ["v7", "oldgnu", "gnu", "ustar", "pax"])
def test_tars_of_the_tar_program(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "mes données"
    folder.mkdir()
    names = ["a b.rgb.png", "é.rgb.png", *([] if kind in ("v7", "ustar") else ["long-" * 40 + ".rgb.png"])]
    for name in names:
        (folder / name).write_bytes(name.encode())
    command = ["tar", f"--format={kind}", "-cf", str(tmp_path / "x.tar"), "-C", str(tmp_path), "./mes données"]
    subprocess.run(command, check=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
    found = list(walk_tar(tmp_path / "x.tar"))
    assert sorted(Path(file.name).name for file in found) == sorted(names)
    assert found == found_by_tarfile(tmp_path / "x.tar")


GOOD = tar_of([("a.txt", b"first"), ("d/" * 80 + "b.txt", b"second" * 200), ("c.txt", b"third")])
SHORT = tar_of([("a.txt", b"first"), ("b.txt", b"second" * 200), ("c.txt", b"third")])
PLAIN = tar_of([("a.txt", b"first"), ("b.txt", b"second")])
SPARSE = {"GNU.sparse.map": "0,5", "GNU.sparse.size": "900000000", "GNU.sparse.name": "b.txt"}


@pytest.mark.parametrize(
    ("tar", "message"),
    [
        (b"", r"truncated"),
        (b"\0" * 512, r"truncated"),
        (PLAIN[:-512], None),  # GNU tar pads to 10240 bytes; fewer blocks of zeros are an end, too.
        (PLAIN[:1800], r"truncated"),
        (gzip.compress(PLAIN), r"is compressed, .*unpack"),
        (tar_of([(member("c", tarfile.LNKTYPE, linkname="a"), b"")]), r"'c' as a hard link .*--hard-dereference"),
        (tar_of([(member("c", tarfile.SYMTYPE, linkname="/etc/passwd"), b"")]), r"'c' as a symbolic link"),
        (tar_of([(member("c", tarfile.FIFOTYPE), b"")]), r"'c' as something of type b'6'"),
        (tar_of([(member("c", tarfile.CHRTYPE), b"")]), r"'c' as something of type b'3'"),
        (forge_header(PLAIN, 156, b"S"), r"'a.txt' as a sparse file"),
        (tar_of([(member("a", pax_headers=SPARSE), b"x")], tarfile.PAX_FORMAT), r"'a' as a sparse file"),
        (tar_of([(member("a", pax_headers={"GNU.sparse.major": "1"}), b"x")], tarfile.PAX_FORMAT), r"a sparse file"),
        (forge_header(PLAIN, 156, b"M"), r"something of type b'M'"),
        (tar_of([("/etc/passwd", b"")]), r"'/etc/passwd', a path that leads out"),
        (tar_of([("a/../../b", b"")]), r"'a/../../b', a path that leads out"),
        (tar_of([("a\nb", b"")]), r"'a\\nb', is empty, not UTF-8, or holds control"),
        (tar_of([("a\udcff", b"")], errors="surrogateescape"), r"'a\\udcff', is empty, not UTF-8"),
        (forge_header(PLAIN, 0, b"\0" * 100), r"name, '', is empty"),
        (forge_header(PLAIN, 124, b"zzzzzzzzzzz\0"), r"damaged at byte 0"),
        (forge_header(PLAIN, 124, b"77777777777\0"), r"a file of 8589934591 bytes"),
        (forge_header(PLAIN, 124, b"\x80" + b"\x7f" * 11), r"a file of \d{27} bytes"),
        # A negative size leads tarfile back to a header that it has read.
        (forge_header(PLAIN, 124, (-1024).to_bytes(12, "big", signed=True)), r"a file of -1024 bytes"),
        (forge_header(PLAIN, 124, b"%011o\0" % 1024), r"damaged"),
        (forge_header(PLAIN, 124, b"%011o\0" % 0), r"damaged at byte 512"),
        (forge_header(GOOD, 124, b"77777777777\0", block=2), r"a name of 8589934591 bytes"),
        (forge_header(GOOD, 124, (-512).to_bytes(12, "big", signed=True), block=2), r"a file of -512 bytes"),
        (forge_header(PLAIN, 156, b"x"), r"pax record"),
        (tar_of([("a", b"xyz")], tarfile.PAX_FORMAT, pax_headers={"size": "1"}), r"one name or size"),
        (tar_of([(member("a", pax_headers={"size": "-1"}), b"x")], tarfile.PAX_FORMAT), r"declares no number"),
        (tar_of([(member("a", pax_headers={"size": "9" * 30}), b"x")], tarfile.PAX_FORMAT), r"declares no number"),
        (tar_of([(member("a", pax_headers={"size": "99999"}), b"x")], tarfile.PAX_FORMAT), r"a file of 99999 bytes"),
        (GOOD[: 4 * BLOCK] + bytes(1024), r"a file is missing behind its long name"),
        (PLAIN[:1024] + bytes(1024) + PLAIN, r"something follows its end mark"),
    ],
)
def test_what_is_not_read_is_explained(tmp_path: Path, tar: bytes, message: str | None) -> None:
    if message is None:
        assert len(walk(tmp_path / "x.tar", tar)) == 2
        return
    with pytest.raises(TarError, match=message) as caught:
        walk(tmp_path / "x.tar", tar)
    assert "\n" not in str(caught.value)


def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.tar")
    refused: list[str] = []

    def walk_pipe() -> None:
        try:
            list(walk_tar(tmp_path / "x.tar"))
        except TarError as error:
            refused.append(str(error))

    thread = threading.Thread(target=walk_pipe, daemon=True)
    thread.start()
    thread.join(10)
    assert refused == ["is no file"]


def walk_or_refuse(path: Path, tar: bytes) -> list[TarFile] | None:
    """None for a refusal; any other exception is a failure of the test."""
    try:
        return walk(path, tar)
    except TarError:
        return None


@in_any_order
@given(tar=st.binary(max_size=4096).map(lambda data: data + bytes(-len(data) % BLOCK + 2 * BLOCK)))
def test_random_bytes_are_refused(tmp_path: Path, tar: bytes) -> None:
    assert walk_or_refuse(tmp_path / "x.tar", tar) in (None, [])
    assert walk_or_refuse(tmp_path / "x.tar", tar) is None or not tar.strip(b"\0")


@in_any_order
@given(data=st.data())
def test_no_cut_loses_a_file(tmp_path: Path, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(SHORT)))
    whole = walk(tmp_path / "x.tar", SHORT)
    assert walk_or_refuse(tmp_path / "x.tar", SHORT[:cut]) in (None, whole)


@in_any_order
@given(data=st.data())
def test_no_missing_piece_loses_a_file(tmp_path: Path, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, 6 * BLOCK))
    count = data.draw(st.integers(1, 2 * BLOCK))
    whole = walk(tmp_path / "x.tar", SHORT)
    sizes = [file.size for file in whole]
    found = walk_or_refuse(tmp_path / "x.tar", SHORT[:start] + SHORT[start + count :])
    # Whole entries that are gone leave a good tar; the index knows its size and checksum.
    gone = found is not None and count % BLOCK == 0 and set(found_sizes := [file.size for file in found]) <= set(sizes)
    assert found is None or found == whole or (gone and len(found_sizes) < len(sizes))


@in_any_order
@given(data=st.data(), tar=st.sampled_from([SHORT, GOOD]))
def test_no_flipped_bit_loses_or_moves_a_file(tmp_path: Path, data: st.DataObject, tar: bytes) -> None:
    whole = walk(tmp_path / "x.tar", tar)
    flipped = bytearray(tar)
    place = data.draw(st.integers(0, len(tar) - 1))
    flipped[place] ^= 1 << data.draw(st.integers(0, 7))
    found = walk_or_refuse(tmp_path / "x.tar", bytes(flipped))
    if tar is SHORT:
        assert found in (None, whole)
    elif found is not None:  # The name behind a GNU header has no checksum.
        assert [(file.offset, file.size) for file in found] == [(file.offset, file.size) for file in whole]


@in_any_order
@given(data=st.data())
def test_lying_headers_are_refused_or_stay_inside(tmp_path: Path, data: st.DataObject) -> None:
    start, value = data.draw(
        st.one_of(
            st.tuples(st.just(124), st.binary(min_size=12, max_size=12)),
            st.tuples(st.just(124), st.integers(-(2**40), 2**70).map(lambda n: n.to_bytes(12, "big", signed=True))),
            st.tuples(st.just(156), st.binary(min_size=1, max_size=1)),
            st.tuples(st.integers(0, 500), st.binary(min_size=1, max_size=12)),
        )
    )
    tar = forge_header(GOOD, start, value, block=data.draw(st.sampled_from([0, 2, 4, 8])))
    for file in walk_or_refuse(tmp_path / "x.tar", tar) or ():
        assert 0 < file.offset <= file.offset + file.size <= len(tar)


@in_any_order
@given(
    files=st.lists(st.tuples(NAMES, st.binary(max_size=700)), min_size=1, max_size=4, unique_by=lambda file: file[0]),
    kind=st.sampled_from(["gnu", "pax"]),
)
def test_the_block_before_a_file_is_its_header(tmp_path: Path, files: list[tuple[str, bytes]], kind: str) -> None:
    tar = tar_of(files, FORMATS[kind])
    for file in walk(tmp_path / "x.tar", tar):
        header = tar[file.offset - BLOCK : file.offset]
        assert is_header_of(header, file.name, file.size)
        assert is_header_of(header, file.name.lower(), file.size)
        assert not is_header_of(header, file.name, file.size + 1)
        assert not is_header_of(header[:-1], file.name, file.size)
        if file.name.isascii() and len(file.name) < 99:
            assert not is_header_of(header, file.name + "x", file.size)


@given(block=st.binary(min_size=BLOCK, max_size=BLOCK))
def test_no_block_is_too_odd_to_be_compared(block: bytes) -> None:
    assert is_header_of(block, "a.rgb.png", 5) in (True, False)
