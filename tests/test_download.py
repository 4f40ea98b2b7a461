import hashlib
import subprocess
from pathlib import Path

import pytest
from servers import serving

from humptygpt.cli import UserError
from humptygpt.prepare import download as downloads
from humptygpt.prepare.download import download

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


def test_a_download_arrives_whole_also_where_an_attempt_was_cut_short(server):
    server.cuts["file"] = [1000]
    download(server.url, Path("a/file"), SHA256)
    assert [path.name for path in Path("a").iterdir()] == ["file"]
    assert Path("a/file").read_bytes() == CONTENT
    assert server.waits == [1]


def test_content_with_another_hash_is_refused_and_not_kept(server):
    with pytest.raises(
        UserError, match=f"is not the expected file: its sha256 is {SHA256}"
    ):
        download(server.url, Path("file"), "0" * 64)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("code", [None, 503])
def test_a_server_that_does_not_answer_or_fails_is_tried_three_times(server, code):
    server.answer = lambda path: code
    if not code:
        server.shutdown()
        server.server_close()
    with pytest.raises(UserError, match="cannot be reached: "):
        download(server.url, Path("file"), SHA256)
    assert server.waits == [1, 2]


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
        pytest.raises(UserError, match="No matching distribution found"),
        downloads.package("thing==1.0", "abc"),
    ):
        pass
