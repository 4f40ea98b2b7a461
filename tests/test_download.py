import hashlib
import subprocess
from pathlib import Path

import pytest
from servers import serving

from humptygpt.core import download as downloads
from humptygpt.core.download import download
from humptygpt.core.errors import UserError

CONTENT = bytes(range(256)) * 3000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch):
    """A server of one file. waits: the seconds between two attempts."""
    waits = []
    monkeypatch.setattr(downloads.time, "sleep", waits.append)
    with serving(lambda path: CONTENT) as here:
        here.url, here.waits = f"http://127.0.0.1:{here.server_port}/file", waits
        yield here


def ranges(server) -> list[str | None]:
    return [found for _, found, _ in server.asked]


def test_a_download_arrives_whole(server):
    download(server.url, Path("a/file"), SHA256)
    assert Path("a/file").read_bytes() == CONTENT and [
        path.name for path in Path("a").iterdir()
    ] == ["file"]


def test_an_interrupted_download_is_resumed(server):
    server.cuts["file"] = [1000, 200_000, 7]
    download(server.url, Path("file"), SHA256)
    assert Path("file").read_bytes() == CONTENT
    assert ranges(server) == [None, "bytes=1000-", "bytes=201000-", "bytes=201007-"]
    assert server.waits == [1, 1, 1]  # each attempt brought new bytes


def test_a_later_command_resumes_the_download_of_an_earlier_one(server):
    Path("file.part").write_bytes(CONTENT[:5000])
    download(server.url, Path("file"), SHA256)
    assert Path("file").read_bytes() == CONTENT and ranges(server) == ["bytes=5000-"]


def test_a_complete_download_that_was_not_renamed_is_kept(server):
    Path("file.part").write_bytes(CONTENT)
    download(server.url, Path("file"), SHA256)
    assert Path("file").read_bytes() == CONTENT


def test_a_server_without_ranges_sends_the_whole_file_again(server):
    server.has_ranges, server.cuts["file"] = False, [1000]
    download(server.url, Path("file"), SHA256)
    assert Path("file").read_bytes() == CONTENT


def test_content_with_another_hash_is_refused_and_not_kept(server):
    with pytest.raises(
        UserError, match=r"returned 768,000 bytes with sha256 .*, but 0000.* was expected"
    ):
        download(server.url, Path("file"), "0" * 64)
    assert list(Path().iterdir()) == []


def test_a_server_that_does_not_answer_is_tried_three_times(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"cannot be reached: .*refused"):
        download(server.url, Path("file"))
    assert server.waits == [1, 2]


@pytest.mark.parametrize(("code", "attempts"), [(404, 1), (503, 3)])
def test_an_answer_that_another_attempt_does_not_change_is_final(server, code, attempts):
    server.answer = lambda path: code
    with pytest.raises(UserError, match="cannot be reached: "):
        download(server.url, Path("file"))
    assert len(server.asked) == attempts


def test_a_full_disk_is_one_line(server, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(downloads, "fetch", full)
    with pytest.raises(
        UserError, match=r"cannot write file\.part: No space left on device"
    ):
        download(server.url, Path("file"))


def test_a_package_is_fetched_by_pip_with_its_hash_and_left_packed(monkeypatch):
    def pip(command, **options):
        lines = Path(command[command.index("--requirement") + 1])
        assert (
            lines.read_text() == "thing==1.0 --hash=sha256:abc\n" and "--no-deps" in command
        )
        archives = Path(command[command.index("--dest") + 1])
        archives.mkdir()
        (archives / "thing-1.0.whl").write_text("packed")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(downloads.subprocess, "run", pip)
    with downloads.package("thing==1.0", "abc") as archive:
        assert archive.name == "thing-1.0.whl" and archive.read_text() == "packed"
    assert not archive.exists()


def test_pips_error_is_reported(monkeypatch):
    done = subprocess.CompletedProcess(
        [], 1, "", "warning\nERROR: No matching distribution found\n"
    )
    monkeypatch.setattr(downloads.subprocess, "run", lambda command, **options: done)
    with (
        pytest.raises(UserError, match="pip: No matching distribution found"),
        downloads.package("thing==1.0", "abc"),
    ):
        pass
