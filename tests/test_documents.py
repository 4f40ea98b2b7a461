import errno
import gzip
import json
import os
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from prepared import prepare
from test_tokenizer import EVERY
from texts import make_text

import prepare_data
from humptygpt.data import documents
from humptygpt.data import prepare as dataset
from humptygpt.data.documents import Flaws, read_documents, zstd

TEXTS = ["first\n\ndocument", "Zweites, mit Ü", "third"]


def write(path: str, texts: list, key: str = "text") -> Path:
    """The texts as documents of a file of the kind that its name says."""
    name = path.lower().removesuffix(".gz").removesuffix(".zst")
    packed = {".gz": gzip.open, "zst": zstd.open}.get(path[-3:].lower(), open)
    if name.endswith(".parquet"):
        table = pyarrow.table({"id": list(range(len(texts))), key: texts})
        pyarrow.parquet.write_table(table, path, row_group_size=2)
        return Path(path)
    lines = "".join(json.dumps({"id": 1, key: text}) + "\n" for text in texts)
    with packed(path, "wb") as file:
        file.write((lines if "json" in name else texts[0]).encode())
    return Path(path)


def read(path: Path | str, text_key: str = "text", flaws: Flaws | None = None) -> list[str]:
    """The documents of a file, whole; checks that start and last fit."""
    texts, open_one = [], False
    flaws = Flaws() if flaws is None else flaws
    for piece in read_documents(Path(path), text_key, flaws):
        assert piece.first != open_one
        assert 0 < len(piece.text) <= documents.PIECE
        texts.append(piece.text if piece.first else texts.pop() + piece.text)
        open_one = not piece.last
    assert not open_one
    return texts


@pytest.mark.parametrize("name", ["a.txt", "A.Txt.GZ", "a.txt.zst", "notes"])
def test_a_text_file_is_one_document(name):
    assert read(write(name, TEXTS)) == TEXTS[:1]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "A.JSONL.zst", "a.ndjson", "a.jsonlines", "a.PARQUET"])
def test_each_line_of_json_and_each_row_of_parquet_is_a_document(name):
    assert read(write(name, TEXTS)) == TEXTS
    assert read(write(name, TEXTS, "content"), "content") == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.jsonl", "a.parquet"])
def test_long_documents_come_in_pieces(name, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 100)
    text = make_text(1234)
    path = write(name, [text, text[:150]] if "txt" not in name else [text])
    assert read(path)[0] == text
    assert len(list(read_documents(path, "text", Flaws()))) >= 13


@pytest.mark.parametrize("tok", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("seed", range(5))
def test_cutting_a_document_changes_none_of_its_tokens(tok, seed, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 60 + 7 * seed)
    text = (
        make_text(2000, seed).replace(". ", ".\n\n  ").replace("a ", "a,  ").replace(" t", "\t\n t").replace("e.", "'s")
    )
    known = set(tok.decode(range(tok.vocab_size)))
    text = "".join(char for char in text if "char" not in tok.name or char in known)
    pieces = [piece.text for piece in documents.pieces([text])]
    assert len(pieces) > 15
    assert [i for piece in pieces for i in tok.encode(piece)] == tok.encode(text).tolist()


def test_text_without_a_cut_position_is_cut_anywhere(monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 10)
    for text in ("x" * 35, " " * 35, "東" * 35, "\n" * 10):
        assert "".join(piece.text for piece in documents.pieces([text])) == text


def test_a_byte_order_mark_is_not_text():
    Path("a.txt").write_bytes("\ufeffabc".encode())
    Path("a.jsonl").write_bytes('\ufeff{"text": "abc"}'.encode())
    assert read("a.txt") == read("a.jsonl") == ["abc"]


def test_empty_files_and_lines_give_no_document():
    Path("a.txt").write_text("")
    Path("b.jsonl").write_text('\n{"text": ""}\n\n{"text": "x"}\n')
    assert read("a.txt") == [] and read("b.jsonl") == ["x"]


@pytest.mark.parametrize("piece", [2, 1000])
def test_bytes_that_are_not_utf8_are_replaced_and_counted_and_the_file_is_named(piece, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", piece)
    Path("a.txt").write_bytes(b"ab\n\nab\xfcc\xfc")
    Path("b.jsonl").write_bytes(b'{"text": "a"}\n\n{"text": "ab\xfcc\xfc"}')
    Path("c.csv").write_bytes(b"id,text\n\n1,ab\xfcc\xfc\n")
    for path in ("a.txt", "b.jsonl", "c.csv"):
        flaws = Flaws()
        *_, text = read(path, flaws=flaws)
        assert text.endswith("ab\ufffdc\ufffd")
        assert str(flaws) == f"bad bytes replaced: 2; the first: {path} is not UTF-8"


def found(where: str) -> list[str]:
    """The files that are read."""
    config = dataset.PrepareConfig("mine", where)
    corpus = dataset.find_corpus(config, Path("data/mine"))
    corpus.survey()
    return [file.as_posix() for file in corpus.files]


def test_a_folder_gives_the_text_files_below_it_in_order_whatever_their_endings():
    names = "t/A.TXT t/a.PARQUET t/a/a.json t/a/b.txt.zst t/a/c.md t/a/z.jsonl.GZ t/b/a.py t/notes"
    names = names.split(" ")
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        write(name, ["some text"])
    assert found("t") == names
    assert found("t/**/*.txt*") == ["t/a/b.txt.zst"]
    assert found("t/a/c.md") == ["t/a/c.md"]


def test_binary_and_hidden_files_are_skipped_and_counted_and_the_first_are_named(capsys):
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
    names = ("a.png", "b.pdf", "c.txt", "d.tar.gz")
    binary = [f"t/{name} is not a text file" for name in names]
    named = "; ".join(["t/.git/config is hidden", *binary])
    assert capsys.readouterr().err == f"note: skipped files: 5; {named}\n"
    for number in range(3):
        Path(f"t/z{number}.png").write_bytes(b"\0")
    assert found("t") == ["t/notes", "t/utf16.txt"]
    assert capsys.readouterr().err == f"note: skipped files: 8; {named}\n"


def test_folders_that_are_links_or_cannot_be_read_are_named(capsys, monkeypatch):
    for name in ("t/a", "t/locked", "elsewhere"):
        Path(name).mkdir(parents=True)
        Path(name, "a.txt").write_text("some text")
    Path("t/link").symlink_to("../elsewhere")
    scandir = os.scandir

    def refusing(path):
        if "locked" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)  # root may read all
    assert found("t") == ["t/a/a.txt"]
    link = "t/link is a link to a folder, which --input='t/**' follows"
    locked = "cannot read t/locked: Permission denied"
    assert capsys.readouterr().err == f"note: skipped files: 2; {link}; {locked}\n"
    assert found("t/**") == ["t/a/a.txt", "t/link/a.txt"]


def test_exports_in_json_that_are_learned_as_they_are_written_are_noted(capsys):
    Path("t").mkdir()
    for name, content in {
        "t/conversations.json": [{"title": "Hi", "mapping": {}}],  # ChatGPT's
        "t/data.json": {"data": [{"text": "some text"}]},
        "t/general.json": [{"type": "message", "text": "Hi"}],  # Slack's
    }.items():
        Path(name).write_text(json.dumps(content))
    assert len(found("t")) == 3
    assert capsys.readouterr().err == (
        "note: .json files in none of the forms of docs/chat.md, learned as they are written: 3;"
        " the first: t/conversations.json\n"
    )


def test_what_our_scripts_have_written_is_no_text_of_a_folder_around_it(run_train, capsys):
    run_train()
    Path("out/run/tensorboard").mkdir()
    Path("out/run/tensorboard/events.json").write_text("written by our scripts")
    Path("notes").mkdir()
    Path("notes/meta.json").write_text("of the user")  # there is no mark of ours
    assert found(".") == ["notes/meta.json", "tiny.txt"]
    assert "data/tiny/meta.json is part of a data folder or of a run" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
@pytest.mark.parametrize("piece", [1, 1000])
def test_utf_16_is_read_if_a_byte_order_mark_says_so(encoding, piece, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", piece)
    mark = "\ufeff" if encoding.endswith("be") else ""
    Path("a.txt").write_bytes((mark + "Grüße 🙂\n").encode(encoding))
    assert found("a.txt") == ["a.txt"]
    assert read("a.txt") == ["Grüße 🙂\n"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("piece", [1, 2, 3, 5, 1000])
def test_carriage_returns_become_line_breaks_wherever_a_read_ends(name, piece, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", piece)
    path = write(name, ["one\r\ntwo\rthree\r\r\nfour\n\r"])
    assert read(path) == ["one\ntwo\nthree\n\nfour\n\n"]


def test_lines_and_rows_without_text_are_left_out_and_counted_and_the_first_is_named():
    lines = ['{"text": "good"}', "", "{", "[1]", '{"text": 5}', '{"body": "a"}']
    lines += ['{"text": ""}', '{"text": "\\ud83d"}']  # an unpaired surrogate
    Path("a.jsonl").write_text("\n".join(lines))
    write("a.parquet", ["good", None])
    Path("a.csv").write_text("id,text\n1,good\n2,two,three\n")
    for path, bad, place in (
        ("a.jsonl", 6, "line 3"),
        ("a.parquet", 1, "row 2"),
        ("a.csv", 1, "row 2"),
    ):
        flaws = Flaws()
        assert read(path, flaws=flaws) == ["good"]
        first = f"the first: {path}, {place}: no text under text_key=text"
        assert str(flaws) == f"records left out: {bad}; {first}"


TABLES = {
    "a.csv": ('id,text,n\r\n1,"one, ""two""\r\nthree",5\r\n\r\n2,vier,6\r\n', "utf-8"),
    "a.CSV.gz": ('text\n"one, ""two""\nthree"\nvier\n', "utf-8-sig"),
    "b.csv": ('id;text\n1;"one, ""two""\nthree"\n2;vier', "utf-8"),
    "sep.csv": ('sep=;\nid; text \n1;"one, ""two""\nthree"\n2;vier', "utf-8"),
    "spaces.csv": ('id, text\n1, "one, ""two""\nthree"\n2, vier', "utf-8"),
}


@pytest.mark.parametrize("name", TABLES)
def test_each_row_of_a_table_is_a_document_in_the_column_text_key(name):
    text, encoding = TABLES[name]
    data = text.encode(encoding)
    Path(name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert read(name) == ['one, "two"\nthree', "vier"]


@pytest.mark.parametrize("after", ["4,d\n5,e\n", '4,"d"\n5,e\n'])
def test_a_stray_quote_in_a_csv_is_refused_with_its_row_and_not_the_rest_of_the_file(fails, after):
    Path("a.csv").write_text('id,text\n1,a 5" disk\n\n2,"b\n b"\n3,"stray\n' + after)
    complaint = fails(prepare_data.main, "mine", "--input=a.csv", "--val_fraction=0.5")
    assert complaint.startswith("cannot read a.csv, row 3: ")
    assert complaint.endswith("; a quote in a quoted cell is written twice\n")


def test_quotes_in_a_table_separated_by_tabs_are_part_of_the_text():
    text = 'text\tid\n"Oh, he said\t1\na 5" disk\t2\n"Well."\t3\n'
    Path("a.tsv").write_bytes(text.encode("utf-16"))
    assert read("a.tsv") == ['"Oh, he said', 'a 5" disk', '"Well."']


def test_tables_without_the_column_are_skipped_in_a_folder_and_named(folder, capsys):
    Path("t").mkdir()
    Path("t/a.txt").write_text(make_text())
    Path("t/b.csv").write_text("x,y\n1,2\n")
    Path("t/c.csv").write_text(f"body,text\n{300 * 'b '},t\n")
    assert found("t") == ["t/a.txt", "t/c.csv"]
    assert "t/b.csv has no column 'text'; set --text_key to one of: x, y" in capsys.readouterr().err
    prepare("mine --input=t/*.csv --text_key=body --tokenizer=byte")
    assert "c.csv" not in capsys.readouterr().err


BAD = {
    "a.pdf is not a text file": "a.pdf",
    "a.zip is not a text file": "a.zip",
    "text_key=body has no effect, since latin1.txt has no records with keys or columns": ("latin1.txt --text_key=body"),
    "no text files found at nothing*.txt": "nothing*.txt",
    "empty.txt has no text": "empty.txt",
    "number.jsonl has no text to learn from: number.jsonl, line 1: no text under text_key=text": ("number.jsonl"),
    "line 1: no text under text_key=text; its keys: question, answer": "faq.jsonl",
    "null.parquet has no column 'body'; set --text_key to one of: id, text": ("null.parquet --text_key=body"),
    "cannot read damaged.parquet: ": "damaged.parquet",
    "cannot read short.txt.gz: Compressed file ended": "short.txt.gz",
    "cannot read wrong.txt.zst: ": "wrong.txt.zst",
}


@pytest.mark.parametrize("complaint", BAD)
def test_bad_files_are_one_line_that_names_the_place(fails, complaint):
    for name, data in {
        "a.pdf": b"%PDF-1.7 text",
        "empty.txt": b"",
        "latin1.txt": b"Gr\xfc\xdfe",
        "number.jsonl": b'{"text": 5}\n',
        "faq.jsonl": b'{"question": "a", "answer": "b"}',
        "wrong.txt.zst": b"plain",
    }.items():
        Path(name).write_bytes(data)
    with zipfile.ZipFile("a.zip", "w") as file:
        file.writestr("a.txt", "some text")
    write("null.parquet", ["a", None])
    Path("damaged.parquet").write_bytes(Path("null.parquet").read_bytes()[:-20])
    short = write("short.txt.gz", [make_text(9000)])
    short.write_bytes(short.read_bytes()[:-50])
    path, *others = BAD[complaint].split()
    assert complaint in fails(prepare_data.main, "mine", f"--input={path}", *others)
    assert not Path("data/mine/meta.json").exists()
