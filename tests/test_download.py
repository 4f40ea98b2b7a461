import hashlib
import subprocess
from pathlib import Path

import pytest
from servers import serving

from humptygpt import download as downloads
from humptygpt.cli import UserError
from humptygpt.download import download

CONTENT = bytes(range(256)) * 3000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server():
    """A server of one file."""
    with serving(lambda path: CONTENT) as here:
        here.url = f"http://127.0.0.1:{here.server_port}/file"
        yield here


def test_a_file_is_downloaded_once(server):
    for _ in range(2):
        assert download(server.url, Path("a/file"), SHA256) == Path("a/file")
        server.answer = lambda path: 503
    assert Path("a/file").read_bytes() == CONTENT


def test_content_with_another_hash_is_refused_and_not_kept(server):
    with pytest.raises(UserError, match=f"is not the expected file: its sha256 is {SHA256}"):
        download(server.url, Path("file"), "0" * 64)
    assert list(Path().iterdir()) == []


def test_a_download_that_fails_is_one_line_that_says_where_the_file_belongs(server):
    advice = "cannot be reached: .*; if you have this file, save it as a/file$"
    with pytest.raises(UserError, match=advice):
        server.cuts["file"] = [1000]
        download(server.url, Path("a/file"), SHA256)
    server.answer = lambda path: 503
    with pytest.raises(UserError, match=advice):
        download(server.url, Path("a/file"), SHA256)
    assert list(Path().iterdir()) == []


def test_a_package_is_fetched_by_pip_with_its_hash_and_left_packed(monkeypatch):
    def pip(command, **options):
        lines = Path(command[command.index("--requirement") + 1])
        assert lines.read_text() == "thing==1.0 --hash=sha256:abc\n" and "--no-deps" in command
        archives = Path(command[command.index("--dest") + 1])
        archives.mkdir()
        (archives / "thing-1.0.whl").write_text("packed")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(downloads.subprocess, "run", pip)
    with downloads.package("thing==1.0", "abc") as archive:
        assert archive.name == "thing-1.0.whl" and archive.read_text() == "packed"
    assert not archive.exists()


def test_pips_error_is_reported(monkeypatch):
    done = subprocess.CompletedProcess([], 1, "", "warning\nERROR: No matching distribution found\n")
    monkeypatch.setattr(downloads.subprocess, "run", lambda command, **options: done)
    with (
        pytest.raises(UserError, match="No matching distribution found"),
        downloads.package("thing==1.0", "abc"),
    ):
        pass
