import asyncio
import errno
import hashlib
import os
import re
import resource
import shutil
import stat
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePath

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgx_music.artifacts import (
    EXTENSIONS,
    FileInspection,
    LocalArtifacts,
    MemoryArtifacts,
    look_at_file,
    open_output,
)
from dgx_music.artifacts import local as local_module
from dgx_music.artifacts import objects as objects_module
from dgx_music.artifacts.interface import CHUNK_BYTES
from dgx_music.errors import ArtifactError, InvalidRequestError
from tests.object_store import s3_fixture, s3_port_fixture  # noqa: F401

DATA = b"RIFF" + bytes(100_000)
OTHER = b"RIFF" + bytes(range(256))


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data" / "audio"


@pytest.fixture
def local(root):
    return LocalArtifacts(root)


@pytest.fixture(params=["local", "memory", "s3"])
def artifacts(request, root):
    if request.param == "memory":
        return MemoryArtifacts()
    return open_output(root if request.param == "local" else request.getfixturevalue("s3"))


async def read(artifacts, path, *part):
    return b"".join([chunk async for chunk in artifacts.stream(path, *part)])


async def listed(artifacts):
    return {
        (file.generation_id, file.attempt, file.size_bytes) async for file in artifacts.list_files()
    }


def names_in(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def content(artifact):
    return Path(artifact.path).read_bytes()


def mode_of(path):
    return Path(path).stat().st_mode & 0o777


@contextmanager
def largest_file(size_bytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fail_call(monkeypatch, name, number, code):
    """Let the given call of ``os.name`` (from 0) fail with the error code; the others go through."""
    real, calls = getattr(os, name), iter(range(1_000))

    def call(*args, **kwargs):
        if next(calls) == number:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, call)


def fail(code):
    raise OSError(code, os.strerror(code))


def refuse_links(monkeypatch, code=errno.EPERM):
    monkeypatch.setattr(os, "link", lambda *_args, **_kwargs: fail(code))


# Every kind of artifacts


async def test_what_is_published_is_described(artifacts):
    artifact = await artifacts.publish("song", 2, "wav", DATA)

    assert artifact.path.endswith("song-2.wav")
    assert (artifact.size_bytes, artifact.sha256) == (len(DATA), hashlib.sha256(DATA).hexdigest())


async def test_the_same_data_again_is_the_same_publication(artifacts):
    first = await artifacts.publish("song", 1, "wav", DATA)

    assert await artifacts.publish("song", 1, "wav", DATA) == first


async def test_other_data_under_the_same_name_is_refused(artifacts):
    first = await artifacts.publish("song", 1, "wav", DATA)

    with pytest.raises(ArtifactError, match=r"song-1\.wav already holds other audio"):
        await artifacts.publish("song", 1, "wav", OTHER)
    assert await read(artifacts, first.path) == DATA


async def test_attempts_have_files_of_their_own(artifacts):
    first = await artifacts.publish("song", 1, "wav", DATA)
    second = await artifacts.publish("song", 2, "wav", OTHER)

    assert first.path != second.path


async def test_delete_removes_these_attempts_in_every_format_and_nothing_else(artifacts):
    for attempt, extension in ((1, "wav"), (1, "ogg"), (2, "flac"), (3, "mp3")):
        await artifacts.publish("song", attempt, extension, DATA)
    await artifacts.publish("song-1", 1, "wav", DATA)

    assert await artifacts.delete("song", [1, 2]) == 3
    assert await artifacts.delete("song", range(10)) == 1
    assert await artifacts.delete("song-1", iter([1])) == 1


async def test_to_delete_what_is_not_there_is_fine(artifacts):
    assert await artifacts.delete("song", [1]) == 0


@pytest.mark.parametrize(
    "bad", ["", ".", "..", "a/b", "../a", "a\\b", "a.b", "a\0", "a\n", "ä", "a" * 65]
)
async def test_an_id_that_is_no_name_is_refused(artifacts, bad):
    with pytest.raises(InvalidRequestError, match="generation_id"):
        await artifacts.publish(bad, 1, "wav", DATA)
    with pytest.raises(InvalidRequestError, match="generation_id"):
        await artifacts.delete(bad, [1])


@pytest.mark.parametrize("bad", ["", "exe", "../wav", "wav.part"])
async def test_an_extension_that_is_no_audio_format_is_refused(artifacts, bad):
    with pytest.raises(InvalidRequestError, match="extension"):
        await artifacts.publish("song", 1, bad, DATA)


@given(st.text("aZ9-_./\\\0\n", max_size=8))
async def test_a_name_never_leaves_the_folder(generation_id):
    try:
        artifact = await MemoryArtifacts().publish(generation_id, 1, "wav", b"")
    except InvalidRequestError:
        return
    assert PurePath("root", artifact.path.removeprefix("memory:")).parts == (
        "root",
        f"{generation_id}-1.wav",
    )


async def test_a_good_place_has_no_problem_and_a_look_at_it_leaves_no_trace(artifacts):
    assert await artifacts.find_problem() is None
    assert await listed(artifacts) == set()


async def test_a_place_holds_what_it_publishes_and_nothing_else(artifacts):
    path = (await artifacts.publish("song", 1, "wav", DATA)).path

    assert artifacts.holds(path)
    assert not any(
        map(
            artifacts.holds,
            ["", "/etc/passwd", "s3://other/song-1.wav", path.replace("song", "x/song")],
        )
    )


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1])
async def test_what_is_published_streams_back(artifacts, size):
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    artifact = await artifacts.publish("song", 1, "wav", data)

    assert await read(artifacts, artifact.path) == data


@pytest.mark.parametrize(
    ("start", "length"),
    [(0, None), (0, 0), (7, 5), (3, 60_000), (99_999, 500), (100_000, 1), (2**40, None)],
)
async def test_a_part_of_a_file_streams_as_its_bytes_would_be_cut(
    artifacts, monkeypatch, start, length
):
    for module in (local_module, objects_module):
        monkeypatch.setattr(module, "CHUNK_BYTES", 30_000)
    data = bytes(range(250)) * 400
    path = (await artifacts.publish("song", 1, "wav", data)).path

    end = None if length is None else start + length
    assert await read(artifacts, path, start, length) == data[start:end]


@pytest.mark.parametrize(
    ("start", "length", "field"), [(-1, None, "start"), (0, -1, "length"), (0.5, None, "start")]
)
async def test_a_part_that_no_file_has_is_refused(artifacts, start, length, field):
    path = (await artifacts.publish("song", 1, "wav", DATA)).path

    with pytest.raises(InvalidRequestError, match=f"^{field} is "):
        await read(artifacts, path, start, length)


async def test_what_is_not_there_does_not_stream(artifacts):
    path = (await artifacts.publish("song", 1, "wav", DATA)).path
    await artifacts.delete("song", [1])

    with pytest.raises(ArtifactError, match=r"song-1\.wav .*(no such|not there)"):
        await read(artifacts, path)


async def test_a_file_exists_until_it_is_deleted(artifacts):
    path = (await artifacts.publish("song", 1, "wav", DATA)).path
    before = await artifacts.exists(path)
    await artifacts.delete("song", [1])

    assert (before, await artifacts.exists(path)) == (True, False)


@pytest.mark.parametrize("artifacts", ["local", "s3"], indirect=True)
async def test_of_many_files_those_that_are_gone_are_found(artifacts):
    there, gone = [
        (await artifacts.publish(name, 1, "wav", DATA)).path for name in ("there", "gone")
    ]
    await artifacts.delete("gone", [1])

    states = await FileInspection().look_at(
        (path, len(DATA)) for path in (there, gone, "relative.wav")
    )
    assert [state.is_missing for state in states.values()] == [False, True, None]
    looks = [await look_at_file(path, len(DATA)) for path in (there, gone, "relative.wav")]
    assert [look.is_missing for look in looks] == [False, True, None]


@pytest.mark.parametrize("artifacts", ["local", "s3"], indirect=True)
async def test_of_many_files_those_of_another_size_are_found(artifacts):
    paths = [
        (await artifacts.publish(name, 1, "wav", DATA)).path for name in ("whole", "cut", "unknown")
    ]

    states = await FileInspection().look_at(
        zip(paths, [len(DATA), len(DATA) + 1, None], strict=True)
    )

    assert [state.is_damaged for state in states.values()] == [False, True, None]
    assert states[paths[1]].damage == "is 100,004 bytes and not 100,005"


async def test_nobody_can_say_of_a_file_in_a_folder_that_is_shut(tmp_path, monkeypatch):
    def refuse(*_args, **_options):
        raise PermissionError(errno.EACCES, "shut")

    monkeypatch.setattr(Path, "stat", refuse)
    assert (await look_at_file(str(tmp_path / "song.wav"), 5)).is_missing is None


@pytest.mark.parametrize("path", ["/etc/passwd", "s3://other/song-1.wav", "other:song-1.wav"])
async def test_a_path_of_another_place_is_neither_streamed_nor_linked(artifacts, path):
    with pytest.raises(ArtifactError, match=f"{path} is not in {artifacts}"):
        await read(artifacts, path)
    with pytest.raises(ArtifactError, match=f"{path} is not in {artifacts}"):
        await artifacts.link(path, 60)


@pytest.mark.parametrize("path", ["/etc/passwd", "s3://other/song-1.wav"])
async def test_a_path_of_another_place_is_not_looked_for(artifacts, path):
    with pytest.raises(ArtifactError, match=f"{path} is not in {artifacts}"):
        await artifacts.exists(path)


async def test_the_list_has_what_is_published_and_not_what_is_deleted(artifacts):
    await artifacts.publish("song-1", 2, "wav", DATA)
    await artifacts.publish("song", 12, "ogg", OTHER)
    await artifacts.publish("gone", 1, "flac", DATA)
    await artifacts.delete("gone", [1])

    assert await listed(artifacts) == {("song-1", 2, len(DATA)), ("song", 12, len(OTHER))}


async def test_the_list_says_where_a_file_is_and_how_old(artifacts):
    before = datetime.now(UTC) - timedelta(seconds=1)  # a store counts whole seconds
    artifact = await artifacts.publish("song", 1, "wav", DATA)

    (file,) = [file async for file in artifacts.list_files()]

    assert file.path == artifact.path
    assert before <= file.modified_at <= datetime.now(UTC)


async def test_nothing_published_is_an_empty_list(artifacts):
    assert await listed(artifacts) == set()


# A local folder


async def test_the_file_has_the_data_and_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    artifact = await LocalArtifacts(Path("audio")).publish("song", 1, "wav", DATA)

    assert artifact.path == str(tmp_path / "audio" / "song-1.wav")
    assert content(artifact) == DATA
    assert names_in(tmp_path / "audio") == ["song-1.wav"]


@contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


MODES = [
    (True, 0o022, 0o600, 0o700),
    (True, 0, 0o600, 0o700),
    (False, 0o022, 0o644, 0o755),
    (False, 0, 0o666, 0o777),
]


@pytest.mark.parametrize("has_links", [True, False])
@pytest.mark.parametrize(("is_private", "mask", "file_mode", "folder_mode"), MODES)
async def test_files_and_folders_are_their_owners_or_as_the_umask_says(
    root, monkeypatch, has_links, is_private, mask, file_mode, folder_mode
):
    if not has_links:
        refuse_links(monkeypatch)
    with umask(mask):
        artifact = await open_output(root, is_private=is_private).publish("song", 1, "wav", DATA)

    assert mode_of(artifact.path) == file_mode
    assert (mode_of(root), mode_of(root.parent)) == (folder_mode, folder_mode)


async def test_a_folder_that_was_there_keeps_its_mode(local, root):
    root.mkdir(parents=True, mode=0o755)
    root.chmod(0o751)

    await local.publish("song", 1, "wav", DATA)

    assert mode_of(root) == 0o751


async def test_a_part_file_that_a_dead_worker_left_is_replaced(local, root):
    root.mkdir(parents=True)
    (root / "song-1.wav.part").write_bytes(b"half")

    artifact = await local.publish("song", 1, "wav", DATA)

    assert content(artifact) == DATA
    assert names_in(root) == ["song-1.wav"]


async def test_the_list_has_part_files_and_passes_over_what_is_not_ours(local, root):
    await local.publish("song", 1, "wav", DATA)
    for name in (
        "song-2.wav.part",
        "notes.txt",
        "song.wav",
        "song-01.wav",
        "song-1.exe",
        "song-1.wav.bak",
    ):
        (root / name).write_bytes(b"half")
    (root / "folder-1.wav").mkdir()
    (root / "link-1.wav").symlink_to(root / "song-1.wav")

    assert await listed(local) == {("song", 1, len(DATA)), ("song", 2, 4)}


async def test_a_folder_gives_no_links(local):
    artifact = await local.publish("song", 1, "wav", DATA)

    assert await local.link(artifact.path, 60) is None


async def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    (tmp_path / "taken").write_bytes(b"")

    with pytest.raises(ArtifactError, match="taken cannot be listed: not a directory"):
        await listed(LocalArtifacts(tmp_path / "taken"))


async def test_delete_removes_part_files_too(local, root):
    root.mkdir(parents=True)
    for extension in EXTENSIONS:
        (root / f"song-1.{extension}.part").write_bytes(b"half")

    assert await local.delete("song", [1]) == len(EXTENSIONS)
    assert names_in(root) == []


async def test_file_and_folders_are_flushed_before_publish_returns(local, root, monkeypatch):
    flushed, real = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (flushed.append(Path(f"/proc/self/fd/{fd}").readlink()), real(fd))
    )

    await local.publish("song", 1, "wav", DATA)

    assert flushed == [root.parent.parent, root.parent, root / "song-1.wav.part", root]


async def test_a_deletion_is_flushed_before_delete_returns(local, root, monkeypatch):
    await local.publish("song", 1, "wav", DATA)
    flushed, real = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (flushed.append(Path(f"/proc/self/fd/{fd}").readlink()), real(fd))
    )

    await local.delete("song", [1])

    assert flushed == [root]


# Failures


FAILURES = [
    ("mkdir", 0),
    ("mkdir", 1),
    *[("open", n) for n in range(4)],
    *[("fsync", n) for n in range(4)],
]
FAILURES += [("unlink", 0), ("write", 0), ("link", 0), ("close", 2), ("close", 3)]
CODES = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EROFS, errno.ESTALE]
SURVIVED = [("open", n, errno.EACCES) for n in (0, 1, 3)] + [
    ("fsync", n, errno.EACCES) for n in (0, 1, 3)
]
SURVIVED += [("link", 0, errno.EIO), ("link", 0, errno.EACCES)]


@pytest.mark.parametrize(
    ("call", "number", "code"),
    [
        (*failure, code)
        for failure in FAILURES
        for code in CODES
        if (*failure, code) not in SURVIVED
    ],
)
async def test_a_step_that_fails_leaves_the_whole_file_or_nothing(
    local, root, monkeypatch, call, number, code
):
    with monkeypatch.context() as patch:
        fail_call(patch, call, number, code)
        with pytest.raises(
            ArtifactError, match=f"{re.escape(str(root))}: {os.strerror(code).lower()}"
        ):
            await local.publish("song", 1, "wav", DATA)

    assert names_in(root) in ([], ["song-1.wav"])
    assert content(await local.publish("song", 1, "wav", DATA)) == DATA


async def test_a_file_that_outgrows_the_limit_of_the_system_leaves_nothing(local, root):
    """A real short write, then a real EFBIG; a full disk takes the same way."""
    with largest_file(65_536), pytest.raises(ArtifactError, match="file too large"):
        await local.publish("song", 1, "wav", DATA)

    assert names_in(root) == []


async def test_short_writes_are_continued(local, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:1_000]))

    artifact = await local.publish("song", 1, "wav", DATA)

    assert content(artifact) == DATA


@pytest.mark.parametrize("folder", ["taken", "taken/below"])
async def test_a_root_that_is_a_file_is_named(tmp_path, folder):
    (tmp_path / "taken").write_bytes(b"")
    local = LocalArtifacts(tmp_path / folder)

    with pytest.raises(ArtifactError, match=f"stored in {tmp_path / folder}: not a directory"):
        await local.publish("song", 1, "wav", DATA)
    with pytest.raises(ArtifactError, match=f"removed from {tmp_path / folder}: not a directory"):
        await local.delete("song", [1])
    assert "not a directory" in await local.find_problem()


@pytest.fixture
def _forgotten(monkeypatch):
    """What was told is told again."""
    monkeypatch.setattr(local_module, "_told", set())


async def test_a_link_that_reported_an_error_and_was_made_is_a_publication(
    local, root, monkeypatch
):
    real = os.link
    monkeypatch.setattr(os, "link", lambda *names: (real(*names), fail(errno.EIO)))

    artifact = await local.publish("song", 1, "wav", DATA)

    assert content(artifact) == DATA
    assert names_in(root) == ["song-1.wav"]


# File systems that cannot do all

NO_LINKS = [
    errno.EPERM,
    errno.ENOTSUP,
    errno.ENOSYS,
    errno.EIO,
    errno.EACCES,
    errno.EMLINK,
    errno.ENOENT,
    errno.EXDEV,
]
NO_LINKS += [errno.EINVAL, errno.EINTR, errno.ENOTTY]
NO_FLUSH = [
    errno.EINVAL,
    errno.ENOTSUP,
    errno.ENOSYS,
    errno.EBADF,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTTY,
]
WITHOUT_LINKS = (
    "has no hard links: after a crash an empty file can be left of audio that was being stored"
)
WITHOUT_FLUSH = "does not flush: the audio stored last can be lost when the power fails"


def refuse_flush(monkeypatch, code, *, of_folders=True):
    real = os.fsync

    def fsync(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        return fail(code) if is_folder is of_folders else real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize("code", NO_LINKS)
async def test_without_hard_links_a_file_is_published_and_it_is_said_once(
    local, root, monkeypatch, caplog, code
):
    refuse_links(monkeypatch, code)

    artifacts = [await local.publish("song", attempt, "wav", DATA) for attempt in (1, 2)]

    assert [content(artifact) for artifact in artifacts] == [DATA, DATA]
    assert names_in(root) == ["song-1.wav", "song-2.wav"]
    assert caplog.messages == [f"output {root}: its file system {WITHOUT_LINKS}"]


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize("code", NO_FLUSH)
async def test_without_flushed_folders_a_file_is_published_and_it_is_said_once(
    local, root, monkeypatch, caplog, code
):
    refuse_flush(monkeypatch, code)

    artifacts = [await local.publish("song", attempt, "wav", DATA) for attempt in (1, 2)]

    assert [content(artifact) for artifact in artifacts] == [DATA, DATA]
    assert await local.delete("song", [1, 2]) == 2
    assert caplog.messages == [f"output {root}: its file system {WITHOUT_FLUSH}"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
async def test_without_flushed_files_a_file_is_published_all_the_same(local, monkeypatch, code):
    refuse_flush(monkeypatch, code, of_folders=False)

    assert content(await local.publish("song", 1, "wav", DATA)) == DATA


async def test_a_folder_that_may_not_be_read_can_be_written(local, root, monkeypatch):
    root.mkdir(parents=True)
    real = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *rest: fail(errno.EACCES) if path == root else real(path, *rest)
    )

    assert content(await local.publish("song", 1, "wav", DATA)) == DATA


async def test_a_good_file_system_has_no_weakness_and_a_look_at_it_leaves_no_trace(local, tmp_path):
    assert await local.find_weakness() is None
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("code", NO_LINKS)
async def test_a_file_system_without_links_is_known_before_it_is_used(
    local, root, tmp_path, monkeypatch, code
):
    refuse_links(monkeypatch, code)

    assert await local.find_weakness() == f"The file system of {root} {WITHOUT_LINKS}."
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("of_folders", [True, False])
async def test_a_file_system_that_does_not_flush_is_known_before_it_is_used(
    local, root, monkeypatch, of_folders
):
    refuse_flush(monkeypatch, errno.EINVAL, of_folders=of_folders)
    refuse_links(monkeypatch)

    assert (
        await local.find_weakness()
        == f"The file system of {root} {WITHOUT_LINKS}, and {WITHOUT_FLUSH}."
    )


async def test_a_place_that_cannot_be_used_has_a_problem_and_no_weakness(tmp_path):
    (tmp_path / "taken").write_bytes(b"")

    assert await LocalArtifacts(tmp_path / "taken").find_weakness() is None


async def test_a_disk_that_does_not_know_its_size_is_no_problem(local, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: shutil._ntuple_diskusage(0, 0, 0))

    assert await local.find_problem() is None


async def test_without_hard_links_other_data_is_still_refused(local, root, monkeypatch):
    refuse_links(monkeypatch)
    await local.publish("song", 1, "wav", DATA)

    with pytest.raises(ArtifactError, match="already holds other audio"):
        await local.publish("song", 1, "wav", OTHER)
    assert (root / "song-1.wav").read_bytes() == DATA


async def test_without_hard_links_a_rename_that_fails_leaves_nothing(local, root, monkeypatch):
    refuse_links(monkeypatch)
    fail_call(monkeypatch, "replace", 0, errno.EIO)

    with pytest.raises(ArtifactError, match="input/output error"):
        await local.publish("song", 1, "wav", DATA)
    assert names_in(root) == []


# Files that do not belong to us


async def refused(local, path):
    with pytest.raises(ArtifactError) as caught:
        await read(local, path)
    return str(caught.value)


@pytest.mark.parametrize("target", ["secret", "song-1.wav", "nowhere", "/dev/zero"])
async def test_a_planted_symlink_is_not_followed(local, root, tmp_path, target):
    await local.publish("song", 1, "wav", DATA)
    (root / "secret").write_bytes(b"secret")
    (root / "song-2.wav").symlink_to(target)

    assert (
        await refused(local, f"{root}/song-2.wav")
        == f"{root}/song-2.wav cannot be read: it is a symbolic link."
    )


@pytest.mark.timeout(20)
async def test_a_planted_pipe_socket_or_folder_is_not_read(local, root):
    root.mkdir(parents=True)
    os.mkfifo(root / "song-1.wav")
    (root / "song-2.wav").mkdir()

    for name in ("song-1.wav", "song-2.wav"):
        assert (
            await refused(local, f"{root}/{name}")
            == f"{root}/{name} cannot be read: it is not a regular file."
        )


async def test_what_is_refused_is_not_left_open(local, root):
    root.mkdir(parents=True)
    (root / "song-1.wav").mkdir()
    await refused(local, f"{root}/song-1.wav")
    before = len([*Path("/proc/self/fd").iterdir()])

    await refused(local, f"{root}/song-1.wav")

    assert len([*Path("/proc/self/fd").iterdir()]) == before


@pytest.mark.parametrize(
    "name", ["evil/song-1.wav", "../song-1.wav", "..", ".", "", "../audio/song-1.wav"]
)
async def test_a_planted_folder_leads_nowhere_and_no_name_leaves_the_folder(
    local, root, tmp_path, name
):
    await local.publish("song", 1, "wav", DATA)
    (tmp_path / "song-1.wav").write_bytes(b"secret")
    (root / "evil").symlink_to(tmp_path)

    assert await refused(local, f"{root}/{name}") == f"{root}/{name} is not in {root}."


@pytest.mark.timeout(20)
@pytest.mark.parametrize("plant", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
async def test_a_name_that_is_taken_by_no_file_is_refused(local, root, plant):
    root.mkdir(parents=True)
    plant(root / "song-1.wav")

    with pytest.raises(ArtifactError, match=r"it is (not a regular file|a symbolic link)"):
        await local.publish("song", 1, "wav", DATA)


async def test_a_symlink_planted_where_the_part_file_goes_is_not_written_through(
    local, root, tmp_path, monkeypatch
):
    """It appears after the last look at that name: only an exclusive open refuses it."""
    root.mkdir(parents=True)
    (tmp_path / "victim").write_bytes(b"precious")
    real, part = os.unlink, root / "song-1.wav.part"
    plants = iter([lambda: part.symlink_to(tmp_path / "victim")])

    def unlink(path, **options):
        try:
            real(path, **options)
        finally:
            next(plants, lambda: None)()

    monkeypatch.setattr(os, "unlink", unlink)

    with pytest.raises(ArtifactError, match="file exists"):
        await local.publish("song", 1, "wav", DATA)
    assert (tmp_path / "victim").read_bytes() == b"precious"


# Cancellation


async def test_a_cancelled_publish_leaves_nothing_that_delete_does_not_remove(
    local, root, monkeypatch
):
    writing, may_go_on, real = threading.Event(), threading.Event(), os.write
    monkeypatch.setattr(
        os, "write", lambda fd, data: (writing.set(), may_go_on.wait(), real(fd, data))[2]
    )

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(local.publish, "song", 1, "wav", DATA)
        await anyio.to_thread.run_sync(writing.wait)
        tasks.cancel_scope.cancel()
        may_go_on.set()

    assert names_in(root) == ["song-1.wav"]
    assert await local.delete("song", [1]) == 1


async def test_delete_ends_a_publish_whose_thread_was_left_alone(local, root, monkeypatch):
    """``asyncio.Task.cancel`` passes through anyio's shield: the thread may still be writing when the delete comes."""
    linking, may_go_on, linked, real = (
        threading.Event(),
        threading.Event(),
        threading.Event(),
        os.link,
    )

    def link(part, target):
        linking.set()
        may_go_on.wait()
        try:
            real(part, target)
        finally:
            linked.set()

    monkeypatch.setattr(os, "link", link)
    publish = asyncio.create_task(local.publish("song", 1, "wav", DATA))
    await anyio.to_thread.run_sync(linking.wait)
    publish.cancel()
    await asyncio.wait([publish])

    assert await local.delete("song", [1]) == 1
    may_go_on.set()
    await anyio.to_thread.run_sync(linked.wait)
    assert names_in(root) == []


# Room


async def test_a_disk_without_room_is_a_problem(local, root, monkeypatch):
    full = shutil._ntuple_diskusage(10**12, 10**12 - 2**20, 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: full)

    assert (
        await local.find_problem() == f"The disk of {root} has 1 MiB left; free at least 100 MiB."
    )


@pytest.mark.parametrize(("missing", "is_problem"), [(0, False), (1, True)])
async def test_room_for_100_mib_is_enough(local, monkeypatch, missing, is_problem):
    left = shutil._ntuple_diskusage(10**12, 10**12 - 100 * 2**20 + missing, 100 * 2**20 - missing)
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: left)

    assert (await local.find_problem() is not None) is is_problem


async def test_a_check_leaves_no_trace(local, tmp_path):
    await local.find_problem()

    assert names_in(tmp_path) == []


async def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path):
    assert (
        "cannot be stored in /proc/audio"
        in await LocalArtifacts(Path("/proc/audio")).find_problem()
    )


async def test_a_preview_is_read_part_by_part_until_its_attempt_is_deleted(artifacts):
    await artifacts.publish_preview("a", 1, 0, b"first")
    await artifacts.publish_preview("a", 1, 1, b"second")
    await artifacts.publish_preview("a", 11, 0, b"of another attempt")
    parts = [await artifacts.read_preview("a", 1, number) for number in range(3)]
    assert parts == [b"first", b"second", None]
    assert await listed(artifacts) == {("a", 1, 5), ("a", 1, 6), ("a", 11, 18)}
    assert await artifacts.delete("a", [1]) == 2
    assert await artifacts.read_preview("a", 1, 0) is None
    assert await listed(artifacts) == {("a", 11, 18)}


async def test_a_preview_can_go_before_the_audio_of_its_attempt(artifacts):
    audio = await artifacts.publish("a", 1, "wav", b"music")
    await artifacts.publish_preview("a", 1, 0, b"first")
    await artifacts.publish_preview("a", 11, 0, b"of another attempt")
    removed = [await artifacts.delete_preview("a", 1) for _ in range(2)]
    left = {(file.attempt, file.is_preview) async for file in artifacts.list_files()}
    assert (removed, left) == ([1, 0], {(1, False), (11, True)})
    assert await artifacts.exists(audio.path)


async def test_a_preview_leaves_no_folder_of_its_attempt(local, root):
    await local.publish_preview("a", 1, 0, b"first")
    await local.delete("a", [1])
    assert names_in(root / "previews") == []


async def test_what_a_link_leads_to_is_not_deleted(local, root, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "song").write_bytes(b"music")
    (root / "previews").mkdir(parents=True)
    (root / "previews" / "a-1").symlink_to(tmp_path / "mine")
    await local.delete("a", [1])
    assert (tmp_path / "mine" / "song").read_bytes() == b"music"


async def test_a_preview_refuses_ids_that_lead_elsewhere(artifacts):
    with pytest.raises(InvalidRequestError, match="cannot name a file"):
        await artifacts.read_preview("../a", 1, 0)


async def test_a_preview_that_cannot_be_stored_says_so(local, root):
    root.parent.mkdir(parents=True)
    root.write_text("not a folder")
    with pytest.raises(ArtifactError, match="A preview cannot be stored in"):
        await local.publish_preview("a", 1, 0, b"first")
