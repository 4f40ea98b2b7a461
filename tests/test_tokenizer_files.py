"""Tokenizers of Hugging Face's folders: ids and text are those of transformers' AutoTokenizer, both ways."""

import json
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from prepared import prepare
from properties import given, settings, st
from texts import make_text

import prepare_data
from humptygpt.cli import UserError
from humptygpt.data.corpus import Documents
from humptygpt.data.dataset import read_meta
from humptygpt.data.documents import Piece
from humptygpt.data.settings import PrepareConfig
from humptygpt.formats.huggingface import write_files
from humptygpt.formats.tokenizer_json import build_tokenizer, tokenizer_files
from humptygpt.tokenizers import basic as tokenizer
from humptygpt.tokenizers.huggingface import read_tokenizer
from humptygpt.tokenizers.saved import from_state

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -r requirements-dev.txt")

TEXT = "Füße, 東京!\n🙂 and   plain words\nHello the dog " + "1234567,\n(so).\n" * 20 + make_text(5000)
SIGNS = ["▁", " ", "  ", "\n", "\r\n", "\t", "\0", "<unk>", "<s>", "</s>", "<|endoftext|>"]
SIGNS += ["<|x|>", "\ufeff", "é", "ﬁ"]
SIGNS += ["e\u0301", "　", "Hello", " the", " dog", "12345", "can't", ".\n"]
anything = st.lists(st.sampled_from(SIGNS) | st.text(max_size=20)).map("".join)


def write(folder: Path, **files: dict) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def trained_bpe(split: str | None = None):
    """A tokenizers.Tokenizer; split: a pattern as Llama 3 has, instead of GPT-2's."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split:
        by_pattern = pre_tokenizers.Split(Regex(split), "isolated")
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        engine.pre_tokenizer = pre_tokenizers.Sequence([by_pattern, as_bytes])
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"] if split is None else []
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=alphabet,
        special_tokens=special,
        show_progress=False,
    )
    engine.train_from_iterator([TEXT], trainer)
    return engine


def merges_folder(folder: Path) -> Path:
    """vocab.json and merges.txt, as GPT-2's first checkpoints had."""
    write(folder, config={"model_type": "gpt2"})
    trained_bpe().model.save(str(folder))
    return folder


def gpt2_folder(folder: Path) -> Path:
    theirs = transformers.AutoTokenizer.from_pretrained(merges_folder(folder))
    theirs.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    return folder


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
LLAMA3 += r"|\s+(?!\S)|\s+"


def llama3_folder(folder: Path) -> Path:
    from tokenizers import AddedToken, processors

    engine = trained_bpe(LLAMA3)
    engine.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>")])
    begin = [("<s>", engine.token_to_id("<s>"))]
    engine.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", begin)
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write(folder, config={"model_type": "llama"}, tokenizer_config=config)
    engine.save(str(folder / "tokenizer.json"))
    return folder


def sentencepiece_folder(folder: Path) -> Path:
    """As Llama's own tokenizer.model was trained."""
    write(folder, config={"model_type": "llama"})
    write(folder, tokenizer_config={"tokenizer_class": "LlamaTokenizer"})
    options = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXT.split("\n")), model_writer=file, **options)
    return folder


def llama2_folder(folder: Path) -> Path:
    sentencepiece_folder(folder)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    return folder


KINDS = {"GPT-2": gpt2_folder, "Llama 2": llama2_folder, "Llama 3": llama3_folder}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{kind: (its folder, transformers' tokenizer, ours after a round trip through its state)}, made when asked for."""

    @cache
    def make(kind: str):
        folder = KINDS[kind](tmp_path_factory.mktemp("tokenizer"))
        theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        state = json.loads(json.dumps(read_tokenizer(folder).state()))
        return folder, theirs, from_state(state)

    return make


def assert_equal(theirs, ours, text: str) -> None:
    ids = ours.encode(text).tolist()
    assert ids == theirs(text, add_special_tokens=False).input_ids
    assert theirs(text).input_ids == ([] if ours.bos is None else [ours.bos]) + ids
    assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


def assert_equal_on(theirs, ours, examples: int) -> None:
    """On this many random texts, and on those that are hard."""

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(text=anything)
    def compare(text):
        assert_equal(theirs, ours, text)

    compare()
    for text in (TEXT, *SIGNS):
        assert_equal(theirs, ours, text)


@pytest.mark.parametrize("examples", [60, pytest.param(1000, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_are_those_of_transformers(kind, examples, made):
    _, theirs, ours = made(kind)
    assert_equal_on(theirs, ours, examples)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_joined_are_the_text_and_continue_a_prompt_with_its_spaces(kind, made):
    _, _, ours = made(kind)
    ids = ours.encode(TEXT)
    text = b"".join(ours.pieces[i] for i in ids).decode()
    assert text.removeprefix(" ") == TEXT
    rest = ours.encode_rest(" the dog")
    assert b"".join(ours.pieces[i] for i in rest) == b" the dog"
    assert ours.token_bytes()[ids].sum() == len(text.encode())
    assert ids.dtype == np.int64
    typed = "".join(SIGNS)  # among them, special tokens
    marks = {ours.eot, ours.bos}
    assert marks & {*ours.encode(typed)} and not marks & {*ours.encode_plain(typed)}
    for encode in (ours.encode, ours.encode_rest, ours.encode_plain):
        with pytest.raises(UserError, match="which is half a character"):
            encode("dog\ud83d")


def test_the_ends_of_texts_are_the_models_own(made):
    with_bos = []
    for kind in KINDS:
        _, theirs, ours = made(kind)
        assert ours.eot == theirs.eos_token_id, kind
        with_bos += [kind] * (ours.bos is not None)
    assert with_bos == ["Llama 3"]
    ours = made("Llama 3")[2]
    assert ours.start().tolist() == [ours.bos]


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_in_pieces_has_the_tokens_of_the_whole(kind, made):
    _, theirs, ours = made(kind)
    first, second = "Hello the dog.", " and plain words\n12"
    pieces = [Piece(first, True, False), Piece(second, False, True)]
    ids, _ = Documents(PrepareConfig(), [], "", []).encode(ours, "train", pieces)
    assert np.concatenate(ids).tolist() == [*theirs(first + second).input_ids, ours.eot]


@pytest.mark.parametrize("kind", ["GPT-2", "Llama 2"])
def test_data_is_prepared_with_the_tokenizer_of_a_folder_and_keeps_it(kind, made, folder):
    path, theirs, _ = made(kind)
    documents = ["Hello the dog. " * 30, "plain words " * 40]
    Path("texts").mkdir()
    for name, text in zip("ab", documents, strict=True):
        Path("texts", name).write_text(text)
    shutil.copytree(path, "theirs")
    prepare("mine --input=texts --tokenizer=theirs")
    shutil.rmtree("theirs")
    meta = read_meta(Path("data/mine"))
    assert from_state(meta["tokenizer"]).vocab_size == len(theirs)
    ids = np.fromfile("data/mine/train.bin", meta["dtype"]).tolist()
    starts = [theirs(text).input_ids[:20] for text in documents]
    assert ids[:20] == starts[0]
    assert starts[1] in [ids[start : start + 20] for start in range(len(ids))]


def test_data_follows_a_change_of_the_tokenizer_files(made, folder, capsys):
    shutil.copytree(made("GPT-2")[0], "theirs")
    Path("mine.txt").write_text("Hello the dog. " * 30)
    command = "mine --input=mine.txt --tokenizer=theirs"
    prepare(command)
    prepare(command)
    assert "it is left unchanged" in capsys.readouterr().err
    write(Path("theirs"), tokenizer_config={"eos_token": "Hello"})
    prepare(f"{command} --overwrite=True")
    assert "left unchanged" not in capsys.readouterr().err


DECODER = {"type": "WordPiece", "prefix": "##", "cleanup": True}
# {content of a file, or entries that change; None: it is removed: the complaint}
REFUSED = {
    "there is no tokenizer.json in theirs": ("tokenizer", None),
    "the tokenizers library reports": ("tokenizer", {"model": {}}),
    r"its decoder \['WordPiece'\] is not supp": ("tokenizer", {"decoder": DECODER}),
    r"its decoder \[\] is not supported": ("tokenizer", {"decoder": None}),
    ": TypeError: Input must be a List": ("tokenizer_config", {"eos_token": 3}),
}


@pytest.mark.parametrize("complaint", REFUSED)
def test_what_is_no_tokenizer_is_refused_in_one_line(complaint, made, folder):
    shutil.copytree(made("Llama 3")[0], "theirs")
    name, entries = REFUSED[complaint]
    path = Path("theirs", f"{name}.json")
    if entries is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    with pytest.raises(UserError, match=complaint) as error:
        read_tokenizer(Path("theirs"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [merges_folder, sentencepiece_folder])
def test_an_older_form_is_refused_with_the_command_that_rewrites_it(make, folder):
    make(Path("old"))
    with pytest.raises(UserError, match=r"there is no tokenizer\.json in old") as error:
        read_tokenizer(Path("old"))
    command = str(error.value).partition("rewrites it: python ")[2]
    subprocess.run([sys.executable, *shlex.split(command)], check=True)
    theirs = transformers.AutoTokenizer.from_pretrained("old", local_files_only=True)
    assert_equal(theirs, read_tokenizer(Path("old")), TEXT)


def test_a_damaged_state_is_refused(made):
    state = made("GPT-2")[2].state()
    for key in state.keys() - {"tokenizer"}:
        for wrong in ("", "AAAA", 10**6, {"a": "b"}, ["x"]):
            with pytest.raises(UserError, match="cannot read the description of the tokenizer: "):
                from_state(state | {key: wrong})


def test_a_tokenizer_that_is_neither_a_kind_nor_a_path_is_refused(fails, folder):
    Path("mine.txt").write_text("some text " * 30)
    kinds = ", ".join(tokenizer.TOKENIZERS)
    for keys, complaint in {
        "--tokenizer=chars": f"tokenizer=chars is not one of: auto, {kinds}, a folder",
        "--tokenizer=.": "there is no tokenizer.json in .; if there is an older form of",
    }.items():
        argv = ["mine", "--input=mine.txt", *keys.split()]
        assert fails(prepare_data.main, *argv).startswith(complaint)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_tokenizer_that_was_imported_is_exported_with_its_ids_and_special_tokens(kind, architecture, made, tmp_path):
    ours = made(kind)[2]
    write(tmp_path, config={"model_type": architecture})
    write_files(tmp_path, tokenizer_files(ours, block_size=64))
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)

    assert_equal_on(again, ours, 30)
    assert again.eos_token_id == ours.eot
    assert ours.bos is None or again.bos_token_id == ours.bos
    read = read_tokenizer(tmp_path)
    assert (read.pieces, read.eot, read.bos) == (ours.pieces, ours.eot, ours.bos)


def test_a_tokenizer_of_ones_own_is_refused_in_one_line():
    class Words(tokenizer.Tokenizer):
        name = "words"

    with pytest.raises(UserError, match=r"^tokenizer=words cannot be exported: "):
        build_tokenizer(Words())
