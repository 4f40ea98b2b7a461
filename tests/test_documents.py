import filecmp
import gzip
import json
import os
import runpy
import shutil
import sys
import types
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import make_text
from test_tokenizer import EVERY

import prepare_data
from humptygpt.prepare import documents
from humptygpt.prepare.documents import find_files, read_documents, write_if_changed, zstd

TEXTS = ["first\n\ndocument", "Zweites, mit Ü", "third"]


def write(path: str, texts: list[str], key: str = "text") -> Path:
    """The texts as documents of a file of the kind that its name says."""
    name = path.lower().removesuffix(".gz").removesuffix(".zst")
    packed = {".gz": gzip.open, "zst": zstd.open}.get(path[-3:].lower(), open)
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(
            pyarrow.table({"id": list(range(len(texts))), key: texts}),
            path,
            row_group_size=2,
        )
    else:
        lines = [json.dumps({"id": 1, key: text}) for text in texts]
        with packed(path, "wb") as file:
            file.write(
                ("\n".join(lines) + "\n" if name.endswith(".jsonl") else texts[0]).encode()
            )
    return Path(path)


def read(path: Path | str, text_key: str = "text", errors: str = "strict") -> list[str]:
    """The documents of a file, whole; checks that start and last fit."""
    texts, open_one = [], False
    for piece in read_documents(Path(path), text_key, errors):
        assert (
            (piece.start == 0) != open_one
            and piece.text
            and len(piece.text) <= documents.PIECE
        )
        texts.append(piece.text) if piece.start == 0 else texts.append(
            texts.pop() + piece.text
        )
        open_one = not piece.last
    assert not open_one
    return texts


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "notes"])
def test_a_text_file_is_one_document(name):
    assert read(write(name, TEXTS)) == TEXTS[:1]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_each_line_of_json_and_each_row_of_parquet_is_a_document(name):
    assert read(write(name, TEXTS)) == TEXTS
    assert read(write(name, TEXTS, "content"), "content") == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.jsonl", "a.parquet"])
def test_long_documents_come_in_pieces_that_count_the_bytes_read(name, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 100)
    text = make_text(1234)
    path = write(name, [text, text[:150]] if "txt" not in name else [text])
    assert read(path)[0] == text
    ends = [piece.read for piece in read_documents(path, "text", "strict")]
    assert len(ends) >= 13 and ends == sorted(ends) and ends[-1] == path.stat().st_size


@pytest.mark.parametrize("tok", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("seed", range(5))
def test_cutting_a_document_changes_none_of_its_tokens(tok, seed, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 60 + 7 * seed)
    text = (
        make_text(2000, seed)
        .replace(". ", ".\n\n  ")
        .replace("a ", "a,  ")
        .replace(" t", "\t\n t")
        .replace("e.", "'s")
    )
    known = set(tok.decode(range(tok.vocab_size)))
    text = "".join(char for char in text if "char" not in tok.name or char in known)
    pieces = [piece.text for piece in documents.pieces([(text, 0)])]
    assert len(pieces) > 15
    assert [i for piece in pieces for i in tok.encode(piece)] == tok.encode(text).tolist()


def test_text_without_a_cut_position_is_cut_anywhere(monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 10)
    for text in ("x" * 35, " " * 35, "東" * 35, "\n" * 10):
        assert "".join(piece.text for piece in documents.pieces([(text, 0)])) == text


def test_a_byte_order_mark_is_not_text():
    Path("a.txt").write_bytes("\ufeffabc".encode())
    Path("a.jsonl").write_bytes('\ufeff{"text": "abc"}'.encode())
    assert read("a.txt") == read("a.jsonl") == ["abc"]


def test_characters_split_between_two_reads_are_joined(monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 7)
    text = "aü東🙂 " * 20
    Path("a.txt").write_text(text, encoding="utf-8")
    assert read("a.txt") == [text]


def test_empty_files_and_lines_give_no_document():
    Path("a.txt").write_text("")
    Path("b.jsonl").write_text('\n{"text": ""}\n\n{"text": "x"}\n')
    assert read("a.txt") == [] and read("b.jsonl") == ["x"]


@pytest.mark.parametrize("errors, text", [("replace", "ab\ufffdc"), ("ignore", "abc")])
def test_there_is_a_way_out_where_bytes_are_not_utf8(errors, text):
    Path("a.txt").write_bytes(b"ab\xfcc")
    Path("b.jsonl").write_bytes(b'{"text": "ab\xfcc"}')
    Path("c.jsonl").write_bytes(b'{"text": "ab\\ud83dc"}')  # an unpaired surrogate
    assert (
        read("a.txt", errors=errors)
        == read("b.jsonl", errors=errors)
        == read("c.jsonl", errors=errors)
        == [text]
    )


def found(where: str) -> list[str]:
    files, _ = find_files(where)
    return [file.as_posix() for file in files]


def test_a_folder_gives_the_text_files_below_it_in_order_whatever_their_endings():
    names = [
        "t/A.TXT",
        "t/a.PARQUET",
        "t/a/a.json",
        "t/a/b.txt.zst",
        "t/a/c.md",
        "t/a/z.jsonl.GZ",
        "t/b/a.py",
        "t/notes",
    ]
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        write(name, ["some text"])
    assert found("t") == names
    assert found("t/**/*.txt*") == ["t/a/b.txt.zst"]
    assert found("t/a/c.md") == ["t/a/c.md"]


def test_binary_and_hidden_files_are_skipped_counted_and_named(capsys):
    Path("t/.git").mkdir(parents=True)
    Path("t/notes").write_text("some text")
    Path("t/.git/config").write_text("some text")
    Path("t/utf16.txt").write_bytes("some text".encode("utf-16"))  # no binary file
    Path("t/a.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    Path("t/b.pdf").write_bytes(b"%PDF-1.4\n% some text")
    Path("t/c.txt").write_bytes(bytes(range(256)))
    with gzip.open("t/d.tar.gz", "wb") as file:
        file.write(b"name\0\0\0some text")
    assert found("t") == ["t/notes", "t/utf16.txt"]
    pdf = "t/b.pdf (a PDF: convert it to text, as with pdftotext)"
    binary = f"t/a.png (binary), {pdf}, t/c.txt (binary), t/d.tar.gz (binary)"
    assert (
        capsys.readouterr().err
        == f"note: skipped files: 5, first t/.git/config (hidden), {binary}\n"
    )
    assert found("t/*") == ["t/notes", "t/utf16.txt"]
    assert capsys.readouterr().err == f"note: skipped files: 4, first {binary}\n"
    for number in range(9):
        Path(f"t/a.png{number}").write_bytes(b"\0")
    find_files("t")
    assert "skipped files: 14, first t/.git/config" in capsys.readouterr().err


def test_what_our_scripts_have_written_is_no_text_of_a_folder_around_it(
    tiny, run_train, capsys
):
    run_train()
    Path("data/tiny/own.txt").write_text("some text")
    Path("data/tiny/config.json").write_text("of the user")
    capsys.readouterr()
    assert found(".") == ["data/tiny/own.txt", "tiny.txt"]
    assert "data/tiny/config.json (of a data folder or run), " in capsys.readouterr().err
    for name in ("plan.py", "explain.html", "wandb_id", "adapter/adapter_config.json"):
        Path("out/run", name).parent.mkdir(exist_ok=True)
        Path("out/run", name).write_text("written by our scripts")
    assert found(".") == ["data/tiny/own.txt", "tiny.txt"]
    Path("notes").mkdir()
    Path("notes/meta.json").write_text("of the user")  # nothing of ours is beside it
    assert found("notes") == ["notes/meta.json"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("piece", [1, 3, 1000])
def test_utf_16_and_utf_32_are_read_if_a_byte_order_mark_says_so(
    encoding, piece, monkeypatch
):
    monkeypatch.setattr(documents, "PIECE", piece)
    mark = "\ufeff" if encoding.endswith("be") else ""
    Path("a.txt").write_bytes((mark + "Grüße 🙂\n").encode(encoding))
    assert found("a.txt") == ["a.txt"]
    for errors in ("strict", "replace"):
        assert (
            "".join(part.text for part in read_documents(Path("a.txt"), "text", errors))
            == "Grüße 🙂\n"
        )


@pytest.mark.parametrize(
    "name", ["A.TXT", "A.Txt.GZ", "a.JSONL", "a.JsonL.ZST", "a.PARQUET"]
)
def test_endings_count_in_upper_case_too(name):
    lower = write(name.lower(), TEXTS)
    assert read(lower.rename(name)) == (TEXTS[:1] if "txt" in name.lower() else TEXTS)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize("piece", [1, 2, 3, 5, 1000])
def test_carriage_returns_become_line_breaks_wherever_a_read_ends(name, piece, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", piece)
    path = write(name, ["one\r\ntwo\rthree\r\r\nfour\n\r"])
    parts = list(read_documents(path, "text", "strict"))
    assert "".join(part.text for part in parts) == "one\ntwo\nthree\n\nfour\n\n"


def test_two_processes_may_write_one_file_at_once_and_equal_bytes_keep_its_time(
    folder, monkeypatch
):
    path = Path("a/b.txt")
    compare = filecmp.cmp

    def compare_while_another_process_writes(*args, **keys):
        monkeypatch.setattr(filecmp, "cmp", compare)
        write_if_changed(path, lambda file: file.write(b"text"))
        return compare(*args, **keys)

    write_if_changed(path, lambda file: file.write(b"text"))
    os.utime(path, ns=(1, 1))
    monkeypatch.setattr(filecmp, "cmp", compare_while_another_process_writes)
    write_if_changed(path, lambda file: file.write(b"text"))
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (b"text", 1)
    write_if_changed(path, lambda file: file.write(b"TEXT"))
    assert path.read_bytes() == b"TEXT" and path.stat().st_mtime_ns > 1
    assert [file.name for file in Path("a").iterdir()] == ["b.txt"]


def test_from_python_3_14_on_zstd_comes_from_the_standard_library(monkeypatch):
    standard = types.SimpleNamespace(ZstdError=OSError)
    monkeypatch.setattr(sys, "version_info", (3, 14))
    monkeypatch.setitem(sys.modules, "backports", None)  # cannot be imported
    monkeypatch.setitem(sys.modules, "compression", types.SimpleNamespace(zstd=standard))
    assert runpy.run_path(documents.__file__)["zstd"] is standard


def test_bad_lines_and_rows_are_skipped_and_counted_where_the_user_wants_it():
    lines = [
        "{",
        "[1]",
        '{"text": 5}',
        '{"body": "a"}',
        '{"text": "\\ud83d"}',
        '{"text": "\xfc"}',
        '{"text": "good"}',
    ]
    Path("a.jsonl").write_bytes("\n".join(lines).encode("latin1"))
    write("a.parquet", ["good", None])
    for path, bad in (("a.jsonl", 6), ("a.parquet", 1)):
        pieces = list(read_documents(Path(path), "text", "strict", skip_bad_lines=True))
        assert [piece.text for piece in pieces if not piece.skipped] == ["good"]
        assert sum(piece.skipped for piece in pieces) == bad


TABLES = {
    "a.csv": ('id,text,n\r\n1,"one, ""two""\r\nthree",5\r\n\r\n2,vier,6\r\n', "utf-8"),
    "a.CSV.gz": ('text\n"one, ""two""\nthree"\nvier\n', "utf-8-sig"),
    "a.tsv": ('text\tid\n"one, ""two""\nthree"\t1\nvier\t2\n', "utf-16"),
    "b.csv": ('id;text\n1;"one, ""two""\nthree"\n2;vier', "utf-8"),
}


@pytest.mark.parametrize("name", TABLES)
def test_each_row_of_a_table_is_a_document_in_the_column_text_key(name):
    text, encoding = TABLES[name]
    data = text.encode(encoding)
    Path(name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert read(name) == ['one, "two"\nthree', "vier"]


def test_tables_without_the_column_are_skipped_in_a_folder_and_named(folder, capsys):
    Path("t").mkdir()
    Path("t/a.txt").write_text(make_text())
    Path("t/b.csv").write_text("x,y\n1,2\n")
    Path("t/c.csv").write_text(f"body,text\n{300 * 'b '},t\n")
    assert found("t") == ["t/a.txt", "t/c.csv"]
    assert "t/b.csv (no column text)" in capsys.readouterr().err
    prepare_data.main(["mine", "--input=t/*.csv", "--text_key=body", "--tokenizer=byte"])
    assert "c.csv" not in capsys.readouterr().err


BAD = {
    "a.csv has no column 'text'; set --text_key to one of: id, body": ["a.csv"],
    "a.csv, row 2 has no text: under 'body' is ['three'], which is not one text; leave such lines out": [
        *("a.csv", "--text_key=body")
    ],
    "wide.csv has no column 'text'; set --text_key to one of: id, body": ["wide.csv"],
    "chats.jsonl, line 1 has no text: set --text_key to the key of the text, and write a chat as one text": [
        "chats.jsonl"
    ],
    "'content': 'Hi'}], which is not one text": ["chats.jsonl", "--text_key=messages"],
    "a.pdf (a PDF: convert it to text, as with pdftotext)": ["a.pdf"],
    "a.zip (a zip file or an office document: unpack it, or save it as text)": ["a.zip"],
    "a.tar (a tar archive: unpack it)": ["a.tar"],
    "a.tar.gz (a tar archive: unpack it)": ["a.tar.gz"],
    "a.bin (binary)": ["a.bin"],
    "text_key=body has no effect, since latin1.txt has no records with keys or columns": [
        *("latin1.txt", "--text_key=body", "--encoding_errors=replace")
    ],
    "folder has no text files; skipped files: 1, first folder/a.bin (binary)": ["folder"],
    "cannot read latin.txt: No such file or directory; did you mean latin1.txt?": [
        "latin.txt"
    ],
    "utf16.txt: byte 0x00 is no utf-16": ["utf16.txt"],
    "nothing*.txt has no text files": ["nothing*.txt"],
    "empty.txt has no text": ["empty.txt"],
    "latin1.txt: byte 0xfc is no utf-8; convert it with iconv, or set --enc": [
        "latin1.txt"
    ],
    "cut.txt: byte 0xc3 is no utf-8": ["cut.txt"],
    "latin1.jsonl, line 2 has no text: 'utf-8' codec can't decode byte 0xfc": [
        "latin1.jsonl"
    ],
    "half.jsonl, line 1 has no text: 'utf-16": ["half.jsonl"],
    "key.jsonl, line 3 has no text: set --text_key to the key of the text, and write": [
        "key.jsonl"
    ],
    "number.jsonl, line 1 has no text: under 'text' is 5, which is not one text; leave such lines": [
        "number.jsonl"
    ],
    "number.jsonl has no text; there is nothing to learn from": [
        *("number.jsonl", "--skip_bad_lines=True")
    ],
    "broken.jsonl, line 2 has no text: Expecting value": ["broken.jsonl"],
    "null.parquet, row 2 has no text: under 'text' is None, which": ["null.parquet"],
    "null.parquet has no column 'body'; set --text_key to one of: id, text": [
        "null.parquet",
        "--text_key=body",
    ],
    "damaged.parquet is damaged: ": ["damaged.parquet"],
    "short.txt.gz is damaged: Compressed file ended": ["short.txt.gz"],
    "wrong.txt.gz is damaged: Not a gzipped file": ["wrong.txt.gz"],
    "wrong.txt.zst is damaged: ": ["wrong.txt.zst"],
}


@pytest.mark.parametrize("complaint", BAD)
def test_bad_files_are_one_line_that_names_the_place(fails, complaint):
    Path("folder").mkdir()
    Path("folder/a.bin").write_bytes(b"\0\xff")
    shutil.copy("folder/a.bin", "a.bin")
    Path("a.csv").write_text("id,body\n1,one\n2,two,three\n")
    Path("wide.csv").write_text("id,body\n", encoding="utf-16")
    Path("chats.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    Path("a.pdf").write_bytes(b"%PDF-1.7 text")
    for kind, ending in (("zip", "zip"), ("tar", "tar"), ("gztar", "tar.gz")):
        shutil.make_archive("a", kind, "folder")
        assert Path(f"a.{ending}").exists()
    Path("utf16.txt").write_bytes(b"\xff\xfea\0\0")
    Path("empty.txt").touch()
    Path("latin1.txt").write_bytes(b"abc" * 100_001 + b"\xfc" + b"abc" * 100_000)
    Path("cut.txt").write_bytes(b"abc\xc3")
    Path("latin1.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xfc"}\n')
    Path("half.jsonl").write_text('{"text": "\\ud83d"}\n')
    Path("key.jsonl").write_text('{"text": "a"}\n\n{"body": "a"}\n')
    Path("number.jsonl").write_text('{"text": 5}\n')
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    write("null.parquet", ["a", None])
    Path("damaged.parquet").write_bytes(Path("null.parquet").read_bytes()[:-20])
    write("short.txt.gz", [make_text(9000)])
    Path("short.txt.gz").write_bytes(Path("short.txt.gz").read_bytes()[:-50])
    for name in ("wrong.txt.gz", "wrong.txt.zst"):
        Path(name).write_text("plain")
    path, *others = BAD[complaint]
    assert complaint in fails(prepare_data.main, f"--input={path}", "--name=mine", *others)
    assert not Path("data/mine/meta.json").exists()
