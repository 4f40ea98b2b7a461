"""Conversations: their lines, tokens, rows and targets; composed ones; talking to a model; the API and its server."""

import csv
import json
import re
import shutil
import tracemalloc
from io import BytesIO, StringIO, TextIOWrapper
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import TINY_RUN, read_rows

import prepare_data
import sample
import score
import train
from humptygpt.cli import UserError
from humptygpt.data.builtin import data_set
from humptygpt.data.chat_dataset import ChatDataset, best_fit
from humptygpt.data.conversations import is_conversations, parse
from humptygpt.data.dataset import read_meta
from humptygpt.data.documents import Flaws, read_records
from humptygpt.data.lookup import look_up
from humptygpt.formats import checkpoint
from humptygpt.formats import load as loading
from humptygpt.generation import chat as chat_floor
from humptygpt.generation.sampling import Context, stream_texts
from humptygpt.server.api import Api
from humptygpt.tokenizers.basic import ByteTokenizer
from humptygpt.tokenizers.chat import BEGIN, END, ChatTokenizer, Turn
from humptygpt.tokenizers.saved import from_state
from humptygpt.training import chat as chat_task
from humptygpt.training.run import Progress

HUMPTY = data_set("humpty_chat")
TURNS = [Turn("user", "Who?"), Turn("assistant", "An egg."), Turn("user", "Why?")]


def chat(*contents: str, system: str | None = None) -> dict:
    """One line of JSON: what is said, the reply, and so on."""
    roles = ["user", "assistant"] * len(contents)
    found = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    if system is not None:
        found.insert(0, {"role": "system", "content": system})
    return {"messages": found}


def write_chats(*chats: dict) -> None:
    Path("chats.jsonl").write_text("".join(json.dumps(each) + "\n" for each in chats))


def prepare_chats() -> None:
    words = ["wall", "king", "egg", "horse", "men", "sat", "fall", "great"]
    write_chats(
        *(chat(*(f"{words[i % 8]} {words[(i + k) % 7]} {i}" for k in range(2 + 2 * (i % 3)))) for i in range(120))
    )
    prepare_data.main(["--input=chats.jsonl", "--name=tiny", "--tokenizer=byte", "--val_fraction=0.2"])


@pytest.fixture
def chats(made_once):
    """data/tiny, conversations of one to three exchanges."""
    made_once(prepare_chats)
    return Path("data/tiny")


def train_talker() -> None:
    prepare_chats()
    train.main([*TINY_RUN, "--block_size=256"])


@pytest.fixture
def talker(made_once):
    made_once(train_talker)
    return sample.load("out/run")


# --------------------------------------------------------------------------------------
# Lines


FORMS = {
    "OpenAI": {
        "messages": [
            {"role": "user", "content": " Hi\r\n\ryou"},
            {"role": "assistant", "content": "Ho\n", "weight": 1},
        ]
    },
    "parts of text": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi\n\nyou"}]},
            {"role": "assistant", "content": "Ho", "tool_calls": []},
        ],
        "tools": [],
    },
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "Hi\n\nyou"},
            {"from": "gpt", "value": "Ho"},
        ]
    },
    "Alpaca": {"instruction": "Hi", "input": "you", "output": "Ho"},
    "Alpaca without input": {"instruction": "Hi\n\nyou", "input": None, "output": "Ho"},
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_conversation_gives_the_same_turns(folder, form):
    expected = (Turn("user", "Hi\n\nyou"), Turn("assistant", "Ho"))
    assert parse(FORMS[form], []) == expected
    Path("a.jsonl").write_text("\n" + json.dumps(FORMS[form]) + "\n")
    Path("a.json").write_text(json.dumps([FORMS[form]] * 2, indent=1))
    Path("b.json").write_text(json.dumps(FORMS[form], indent=1))
    if form != "parts of text":  # a column has one type
        table = pyarrow.Table.from_pylist([FORMS[form]])
        pyarrow.parquet.write_table(table, "a.parquet")
    for path in Path().iterdir():
        assert is_conversations(path, None)
        for _, record in read_records(path, [], Flaws()):
            assert parse(record, []) == expected


@pytest.mark.parametrize("cut", [0, 50])
def test_a_large_json_file_is_read_one_entry_at_a_time(folder, cut):
    text = json.dumps([chat("Hi", "Ho")] * 5000)
    Path("a.json").write_text(text[: len(text) - cut])
    tracemalloc.start()
    assert is_conversations(Path("a.json"), None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * len(text)


def test_a_system_message_and_a_history_beside_the_turns_are_learned():
    beside = {"system": "Be brief.", "history": [["a", "b"]]}
    first, *_ = parse(FORMS["ShareGPT"] | beside | {"history": []}, [])
    assert first == Turn("system", "Be brief.")
    texts = [turn.text for turn in parse(FORMS["Alpaca"] | beside, [])]
    earlier = ["system\nBe brief.", "user\na", "assistant\nb"]
    assert texts == [*earlier, "user\nHi\n\nyou", "assistant\nHo"]
    # an empty one is none, because nobody sends it to the model
    assert len(parse(chat("Hi", "Ho", system=""), [])) == 2


def test_a_reply_keeps_its_indentation_and_a_question_does_not():
    turns = parse(chat("   Hi", " \n    if x:\n        y()\n "), [])
    assert turns == (Turn("user", "Hi"), Turn("assistant", "    if x:\n        y()"))


def test_two_replies_in_a_row_are_both_learned(folder):
    more = {"role": "assistant", "content": "Hum"}
    twice = [chat(f"Hi {i}", "Ho")["messages"] + [more] for i in range(40)]
    write_chats(*({"messages": each} for each in twice))
    prepare_data.main(["--input=chats.jsonl", "--name=tiny"])
    dataset = ChatDataset(Path("data/tiny"), block_size=64, seed=0)
    ids = dataset.ids["train"][dataset.is_target["train"]]
    learned = dataset.tokenizer.decode(ids)
    assert learned == f"Ho{END}Hum{END}" * learned.count("Ho") != ""


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_columns_of_questions_and_answers_are_conversations(folder, ending):
    rows = [{"id": f"{i}", "Q": f"what, {i}?", "A": f"this {i}"} for i in range(60)]
    path = Path(f"faq.{ending}")
    if ending == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w") as file:
            table = csv.DictWriter(file, rows[0], delimiter={"csv": ",", "tsv": "\t"}[ending])
            table.writeheader()
            table.writerows(rows)
    prepare_data.main([f"--input={path}", "--text_key=Q,A", "--name=tiny"])
    meta = json.loads(Path("data/tiny/meta.json").read_text())
    assert (meta["task"], meta["conversations"]) == ("chat", 60)
    assert re.search(r"user\nwhat, \d+\?.*assistant\n\[this \d+<", meta["example"], re.DOTALL)


def test_the_first_short_questions_of_conversations_are_kept_with_the_model(folder):
    long = "and " * 30
    write_chats(
        *(
            chat(first, "An egg.", f"why {i}?", "Hm.", system=system)
            for i in range(30)
            for first, system in (
                (f"who {i}?", None),
                (f"{long}{i}", None),
                (f"where {i}?", "Be brief."),
            )
        )
    )
    prepare_data.main(["--input=chats.jsonl", "--name=tiny", "--tokenizer=bpe"])
    train.main([*TINY_RUN, "--block_size=128"])
    shutil.rmtree("data")
    questions = Api(sample.load("out/run"), "egg").model_entry()["questions"]
    assert 4 <= len(questions) <= 8
    assert all(re.fullmatch(r"who \d+\?", text) for text in questions)


BAD = {
    "damaged": '{"messages": [\n',
    "of a tool": {"messages": [{"role": "tool", "content": "x"}]},
    "without content": {"messages": [{"role": "user"}, *chat("a", "b")["messages"]]},
    "a call of a tool": {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
    "an empty reply": chat("a", " \n", "c", "d"),
    "an image": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    "not to be learned": {"messages": [{"role": "assistant", "content": "x", "weight": 0}]},
    "an empty output": {"instruction": "a", "output": ""},
    "a number": {"instruction": "a", "output": 1},
    "preferences": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "without a reply": chat("a"),
    "other keys": {"prompt": "a", "completion": "b"},
}


@pytest.mark.parametrize("record", BAD.values(), ids=BAD)
def test_a_bad_record_is_left_out_and_counted_and_the_first_is_named(folder, capsys, record):
    good = [json.dumps(chat(f"a {i}", "b")) for i in range(20)]
    line = record if isinstance(record, str) else json.dumps(record)
    Path("chats.jsonl").write_text("\n".join([good[0], line, *good[1:]]))
    prepare_data.main(["--input=chats.jsonl", "--name=tiny", "--val_fraction=0.5"])
    err = capsys.readouterr().err
    assert "left out: 1; the first: chats.jsonl, line 2: it is no conversation of" in err
    assert "--text_key=prompt,completion" in err


def test_conversations_beside_other_files_are_read_and_the_others_named(folder, capsys):
    Path("all").mkdir()
    Path("all/README.md").write_text("About these chats.")
    lines = [json.dumps(chat(f"a {i}", "b")) + "\n" for i in range(60)]
    Path("all/chats.jsonl").write_text("".join(lines))
    prepare_data.main(["--input=all", "--name=tiny"])
    assert json.loads(Path("data/tiny/meta.json").read_text())["conversations"] == 60
    assert "README.md" in capsys.readouterr().err


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_conversations_none_of_which_has_a_reply_are_refused(folder, fails, tokenizer):
    write_chats(chat("a"), chat("b"))
    argv = ["--input=chats.jsonl", "--name=tiny", f"--tokenizer={tokenizer}"]
    assert "no conversation with a reply" in fails(prepare_data.main, *argv)


def test_conversations_that_share_a_long_system_message_are_in_both_splits(folder):
    write_chats(*(chat(f"a{i}", "b", system="Be brief. " * 500) for i in range(40)))
    prepare_data.main(["--input=chats.jsonl", "--name=tiny", "--tokenizer=byte"])
    splits = read_meta(Path("data/tiny"))["splits"]
    assert 1 <= splits["val"]["conversations"] <= 10


@pytest.mark.parametrize("count", [2, 12, 30])
def test_a_few_conversations_are_in_both_splits_whatever_their_draws(folder, count):
    for seed in range(10, 18):
        write_chats(*(chat(f"Question {seed}.{i}?", f"Answer {i}.") for i in range(count)))
        command = "--input=chats.jsonl --name=tiny --tokenizer=byte --overwrite=True"
        prepare_data.main(command.split())
        val = read_meta(Path("data/tiny"))["splits"]["val"]["conversations"]
        assert max(1, count * 0.05) <= val < count


def replies_of(split: str, name: str = "tiny") -> list[str]:
    dataset = ChatDataset(Path("data") / name, block_size=200, seed=0)
    return [exchange.reply for exchange in dataset.exchanges(split, 10_000)]


@pytest.mark.parametrize("count", [20, 120])
def test_exactly_a_tenth_is_held_out_of_what_is_taught_in_other_words_and_never_the_only_wording(folder, count):
    write_chats(*(chat(f"{i} of {count}", f"Answer {i // 4}.") for i in range(count)))
    prepare_data.main(["--input=chats.jsonl", "--name=tiny", "--tokenizer=byte"])
    assert len(replies_of("val")) == count // 10
    assert {*replies_of("train")} == {f"Answer {i}." for i in range(count // 4)}
    # answers that one wording has stay, too
    alone = [chat(f"alone {i}", f"Alone {i}.") for i in range(count)]
    again = [chat(f"{i} of {count}", f"Answer {i // 4}.") for i in range(count)]
    write_chats(*alone, *again)
    prepare_data.main(["--input=chats.jsonl", "--name=both", "--tokenizer=byte"])
    assert len(replies_of("val", "both")) == count // 5
    assert {x["messages"][1]["content"] for x in alone + again} == {*replies_of("train", "both")}


def test_with_a_fraction_of_0_all_is_learned_and_the_last_model_is_the_best(folder, capsys):
    write_chats(*(chat(f"a {i}", "b" * (i + 1)) for i in range(20)))
    argv = [key for key in TINY_RUN if not key.startswith("--dataset")]
    argv += ["--input=chats.jsonl", "--block_size=64", "--val_fraction=0"]
    assert train.main(argv) == 0
    assert len(replies_of("train", "chats")) == 20 and replies_of("val", "chats")
    assert "nothing is held out, so the last model counts as the best" in (capsys.readouterr().out)
    rows = [row for row in read_rows(Path("out/run")) if "val_loss" in row]
    assert checkpoint.read(Path("out/run/best.pt"))["progress"]["iter"] == 6
    assert rows[-1]["val_text"].endswith(" trained on")
    assert json.loads(Path("data/chats/meta.json").read_text())["conversations"] == 20


def test_the_best_model_is_the_one_that_answers_most_questions_of_several_the_likeliest():
    progress = Progress()
    evaluations = [(3.0, 0), (2.0, 0), (2.5, 4), (2.2, 4), (1.0, 3), (2.3, 4)]
    assert [progress.record(*each, False) for each in evaluations] == [True] * 4 + [False] * 2
    assert (progress.best_answered, progress.best_val_loss) == (4, 2.2)
    assert progress.record(9.0, 0, newest_is_best=True)


def test_the_best_checkpoint_is_chosen_by_answers_of_which_there_are_at_least_ten(folder, monkeypatch, capsys):
    write_chats(*(chat(f"a {i}", "yes") for i in range(120)))
    prepare_data.main(["--input=chats.jsonl", "--name=tiny", "--tokenizer=byte"])
    right = iter([5, 2, 2, 2])

    def answer(model, tokenizer, asked, longest=None):
        assert len(asked) in (1, 3, 12)
        count = next(right) if len(asked) == 12 else 0
        return ["yes" if i < count else "no" for i in range(len(asked))]

    monkeypatch.setattr(chat_task, "answer", answer)
    train.main([*TINY_RUN, "--block_size=64", "--eval_interval=2"])
    saved = checkpoint.read(Path("out/run/best.pt"))["progress"]
    assert (saved["iter"], saved["best_answered"]) == (2, 5)
    printed = capsys.readouterr().out
    assert "best by held-out questions answered: 5 at iter 2" in printed
    assert "answered word for word: 2 of 12, and" in printed
    write_chats(*(chat(f"a {i}", "yes") for i in range(20)))
    dataset = ["--input=chats.jsonl", "--name=few", "--tokenizer=byte"]
    prepare_data.main(dataset)
    monkeypatch.setattr(chat_task, "answer", lambda *args: ["yes"] * len(args[2]))
    dataset = ChatDataset(Path("data/few"), block_size=64, seed=0)
    assert chat_task.count_right(None, dataset) == 0


def test_a_lookup_answers_as_the_nearest_question_is_answered():
    taught = {
        "How much does a bicycle cost?": "100",
        "How much does a helmet cost?": "20",
        "When are you open?": "9 to 6",
    }
    asked = ["the price of BICYCLES", "what do helmets cost", "open on Sundays?", "✓"]
    assert look_up(taught, asked)[:3] == ["100", "20", "9 to 6"]


@pytest.mark.usefixtures("talker")
def test_score_py_asks_a_bot_the_questions_of_a_file_and_shows_each_wrong_answer(
    capsys,
):
    argv = ["--out_dir=out/run", "--device=cpu"]
    asked = [chat("egg 3", "x"), chat("Hi", "Ho", "wall 4", "Yes.")]
    Path("own.jsonl").write_text("\n".join(map(json.dumps, asked)))
    capsys.readouterr()
    score.main([*argv, "--chats=own.jsonl"])
    printed = capsys.readouterr().out
    assert "out/run: answered word for word: 0 of 2, and" in printed
    assert "a lookup of the nearest question taught answers 0\n" in printed
    assert "    wall 4\n    > " in printed and "      the conversation has: Yes." in printed
    score.main([*argv, "--chats=own.jsonl", "--json=True"])
    first, second = json.loads(capsys.readouterr().out)["out/run"]
    assert (first["question"], first["expected"]) == ("egg 3", "x")
    # both as the model replies
    own = sample.load("out/run")
    reply = own.reply(asked[1]["messages"][:-1], temperature=0, max_new_tokens=5)
    assert second["reply"] == reply
    Path("own.csv").write_text("q,a\nwall 4,Yes.\n")
    score.main([*argv, "--chats=own.csv", "--text_key=q,a", "--json=True"])
    [row] = json.loads(capsys.readouterr().out)["out/run"]
    assert (row["question"], row["expected"]) == ("wall 4", "Yes.")
    assert row["lookup"] in {*replies_of("train")}
    shutil.rmtree("data")
    score.main([*argv, "--chats=own.jsonl"])
    printed = capsys.readouterr()
    assert "there is no lookup to compare with: " in printed.err
    assert "lookup" not in printed.out
    Path("bad.jsonl").write_text('{"messages": 5}')
    with pytest.raises(UserError, match=r"bad\.jsonl, line 1: it is no conversation of texts"):
        score.main([*argv, "--chats=bad.jsonl"])


def test_val_input_may_hold_conversations_in_another_format(folder):
    write_chats(*(chat(f"a {i}", "b") for i in range(5)))
    Path("val.json").write_text('[{"instruction": "c", "output": "d"}]')
    prepare_data.main(["--input=chats.jsonl", "--name=tiny", "--val_input=val.json"])
    splits = read_meta(Path("data/tiny"))["splits"]
    assert [splits[x]["conversations"] for x in ("train", "val")] == [5, 1]


# --------------------------------------------------------------------------------------
# Tokens, rows and targets


def test_no_text_is_encoded_to_the_tokens_that_mark_turns():
    tokenizer = ChatTokenizer(ByteTokenizer(separated=True))
    ids = tokenizer.encode(f"a{BEGIN}b{END}<|endoftext|>")
    assert max(ids) < 256
    assert tokenizer.decode(tokenizer.encode_turns(TURNS, reply=True)) == (
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nAn egg.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    again = from_state(tokenizer.state())
    assert again.pieces == tokenizer.pieces and again.eot == tokenizer.eot


def test_a_long_reply_that_occurs_three_times_is_one_token_and_nobody_can_type_it(folder):
    often, rare = "We are open from nine to six.", "We close at six on a Sunday."
    others = [f"This is the answer number {i}." for i in range(20)]
    replies = [often] * 30 + [rare] * 2 + others + ["Yes."] * 40
    write_chats(*(chat(f"{often} {i}?", reply) for i, reply in enumerate(replies)))
    prepare_data.main(["--input=chats.jsonl", "--name=faq"])
    meta = read_meta(Path("data/faq"))
    tokenizer = from_state(json.loads(json.dumps(meta["tokenizer"])))
    assert list(tokenizer.replies) == [often]
    faq = [*enumerate([often] * 30 + [rare] * 2 + others[:4])]
    write_chats(*(chat(f"{often} {i}?", reply) for i, reply in faq))
    prepare_data.main(["--input=chats.jsonl", "--name=all", "--val_fraction=0"])
    found = from_state(read_meta(Path("data/all"))["tokenizer"]).replies
    assert {*found} == {often, rare, *others[:4]}
    turns = [Turn("user", often), Turn("assistant", often)]
    ids = tokenizer.encode_turns(turns).tolist()
    assert ids.count(tokenizer.vocab_size - 1) == 1
    assert tokenizer.decode(ids).count(often) == 2
    dataset = ChatDataset(Path("data/faq"), block_size=64, seed=0)
    tokens = dataset.meta["splits"]["train"]["target_tokens"]
    assert tokens == dataset.is_target["train"].sum()


def test_the_targets_are_the_replies_and_their_ends_and_nothing_else(chats):
    dataset = ChatDataset(chats, block_size=200, seed=0)
    for split in ("train", "val"):
        text = dataset.tokenizer.decode(dataset.ids[split][dataset.is_target[split]])
        replies = [
            part.partition("\n")[2] for part in text_of(dataset, split).split(BEGIN) if part.startswith("assistant\n")
        ]
        assert text == "".join(reply.split(END)[0] + END for reply in replies)
    tokens = dataset.meta["splits"]["train"]["target_tokens"]
    assert tokens == dataset.is_target["train"].sum()


@pytest.mark.parametrize("block_size", [30, 36, 64, 200])
def test_each_reply_in_a_row_follows_its_question_and_only_its_end_may_be_missing(chats, block_size):
    dataset = ChatDataset(chats, block_size=block_size, seed=0)
    ids, rows = dataset.ids["train"], dataset.rows["train"]
    eot, begin = dataset.tokenizer.base.eot, dataset.tokenizer.begin
    is_target = dataset.is_target["train"]
    seen, shortened = [], 0
    for row in rows:
        positions = row[row >= 0]
        pieces = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
        for piece in pieces:
            text = dataset.tokenizer.decode(ids[piece])
            assert text.startswith(f"{BEGIN}user\n") and is_target[piece].any()
            whole = ids[piece[-1]] == eot or ids[piece[-1] + 1] == begin
            assert whole or (len(piece) == block_size + 1 and text.count(BEGIN) == 2)
            shortened += int(not whole and is_target[piece[-1] + 1])
        seen += positions.tolist()
    assert len(seen) == len(set(seen))
    summary, _ = dataset.summary(1, None)
    replies = text_of(dataset, "train").count(f"{BEGIN}assistant")
    kept = sum(ids[row].tolist().count(begin) for row in rows) // 2
    assert (f"; replies cut short: {shortened:,}" in summary) == (block_size < 64)
    assert (f"; replies left out: {replies - kept:,}" in summary) == (block_size == 30)
    if block_size >= 64:  # no exchange is longer
        assert sorted(seen) == list(range(len(ids)))
    for index in range(len(rows)):
        assert (dataset.batch(index, 1)["targets"] >= 0).any()
    visited = {tuple(dataset.batch(i, 1)["idx"][0].tolist()) for i in range(len(rows))}
    assert visited == {tuple(ids[row[:-1]]) for row in rows}


def text_of(dataset: ChatDataset, split: str) -> str:
    return dataset.tokenizer.decode(dataset.ids[split])


def test_each_epoch_has_every_conversation_once_and_beside_others_than_the_one_before(
    folder,
):
    write_chats(*(chat(f"{i:03}" + "?" * (i % 5), "Yes.") for i in range(100)))
    prepare_data.main(["--input=chats.jsonl", "--name=short", "--tokenizer=byte"])
    dataset = ChatDataset(Path("data/short"), block_size=250, seed=0)
    count = len(dataset.rows["train"])

    def epoch(number: int) -> list[set[str]]:
        batches = (dataset.batch(number * count + i, 1)["idx"][0] for i in range(count))
        texts = (dataset.tokenizer.decode(idx.tolist()) for idx in batches)
        return [{*text.split("<|endoftext|>")} - {""} for text in texts]

    first, second = epoch(0), epoch(1)
    assert sorted(chain(*first)) == sorted(chain(*second))
    assert not any(row in first for row in second)
    again = ChatDataset(Path("data/short"), block_size=250, seed=0)
    assert torch.equal(again.batch(3 * count, 1)["idx"], dataset.batch(3 * count, 1)["idx"])


def test_a_text_goes_into_the_fullest_row_that_has_room_for_it():
    assert best_fit([60, 50, 30, 40, 10, 70], size=100) == [[0, 2, 4], [1, 3], [5]]


LENGTHS = {
    "one": [chat("", "")] * 30,
    "long": [chat("a" * 100_000, "b" * 100_000)] + [chat("a", "b")] * 30,
    "late": [chat("a" * 300, "b")] + [chat("a", "b")] * 30,
    "one-sided": [chat("", "b" * 300)] * 30,
}


@pytest.mark.parametrize("kind", LENGTHS)
def test_the_loss_is_finite_whatever_the_lengths(folder, kind, capsys):
    write_chats(
        *(each | {"n": i} for i, each in enumerate(LENGTHS[kind])),
        *[chat("x", str(i)) for i in range(20)],
    )
    prepare_data.main(["--input=chats.jsonl", "--name=tiny", "--tokenizer=byte", "--val_fraction=0.3"])
    assert train.main([*TINY_RUN, "--block_size=32"]) == 0
    assert all(np.isfinite(row["val_loss"]) for row in read_rows(Path("out/run")) if "val_loss" in row)


# --------------------------------------------------------------------------------------
# Talking


KEYS = {"max_new_tokens": 20, "temperature": 0}
LONG = KEYS | {"max_new_tokens": 500}


def converse(capsys, monkeypatch, *said: str, system: str = "Be brief.") -> list[str]:
    """Talk to out/run in the terminal. Returns its replies, of which each is a line."""
    monkeypatch.setattr("sys.stdin", StringIO("".join(f"{line}\n" for line in said)))
    argv = ["--out_dir=out/run", f"--system={system}", "--temperature=0"]
    capsys.readouterr()
    sample.main([*argv, "--max_new_tokens=20", "--stop=\n"])
    return capsys.readouterr().out.split("\n")[:-1]


def test_a_loaded_model_replies_as_its_server_does_and_says_that_it_talks(talker):
    messages = chat("wall egg 3")["messages"]
    keys = {"temperature": 0, "max_new_tokens": 20}
    reply = talker.reply(messages, **keys)
    request = json.dumps({"messages": messages, "max_tokens": 20, "temperature": 0})
    *_, answer = Api(talker, "x").chat(request.encode())
    assert json.loads(answer)["choices"][0]["message"]["content"] == reply
    assert "".join(talker.stream(messages, **keys)) == reply
    assert len([*talker.stream(messages, **keys)]) > 1
    bad = {
        "this model talks; ask it with reply": "wall",
        "messages must be list": {"role": "user"},
        "messages\\[0\\].role must be": [{"role": "egg", "content": "a"}],
        "messages is empty": [],
        "the prompt takes": chat("wall " * 80)["messages"],
    }
    for message, prompt in bad.items():
        with pytest.raises(UserError, match=message):
            talker.reply(prompt)
    with pytest.raises(UserError, match="this model talks"):
        talker.complete("wall")
    with pytest.raises(UserError, match="tempratur"):
        talker.reply(messages, tempratur=1)


def test_each_turn_is_answered_with_the_whole_conversation_before_it(talker, capsys, monkeypatch):
    said = ["wall egg 3", "king", "men sat 9"]
    turns = [Turn("system", "Be brief.")]
    for text, found in zip(said, converse(capsys, monkeypatch, *said), strict=True):
        turns.append(Turn("user", text))
        ids = talker.tokenizer.encode_turns(turns, reply=True).tolist()
        pieces = stream_texts(Context(talker.model, [ids]), talker.tokenizer, [0], ["\n"], **KEYS)
        assert found == "".join(piece.text for piece in pieces)
        turns.append(Turn("assistant", found))


def test_a_full_context_forgets_the_oldest_exchanges_whole_but_not_the_system_message(talker, capsys):
    turns = [Turn("system", "Be brief.")]
    for i in range(8):
        turns += [Turn("user", f"wall {i} egg"), Turn("assistant", "wall " * 5)]
    turns.append(Turn("user", "king"))
    found = "".join(chat_floor.reply(talker, turns, forgets=True, **KEYS))
    [dropped] = re.findall(r"context is full; forgetting the oldest exchanges: (\d)", capsys.readouterr().err)
    kept = [turns[0], *turns[1 + 2 * int(dropped) :]]
    assert len(talker.tokenizer.encode_turns(kept, reply=True)) <= 256 - 20
    assert "".join(chat_floor.reply(talker, kept, **KEYS)) == found
    more = [turns[0], *turns[2 * int(dropped) - 1 :]]
    assert len(talker.tokenizer.encode_turns(more, reply=True)) > 256 - 20


def test_a_message_longer_than_the_context_is_one_line_and_the_talk_goes_on(talker, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", StringIO("egg\n" + "wall " * 80 + "\negg\n"))
    sample.main(["--out_dir=out/run", "--temperature=0"])
    printed = capsys.readouterr()
    assert printed.err.count("the prompt takes 418 tokens, and the model's context") == 1
    first, again = printed.out.splitlines()
    assert first and again


def test_a_question_is_stripped_as_in_the_api_and_never_forgotten_within_its_reply(talker, capsys, monkeypatch):
    said = "egg " * 55  # more than half of the context
    found = "".join(chat_floor.reply(talker, [Turn("user", said.strip())], **LONG))
    asked = {"messages": chat(said)["messages"], "max_tokens": 500, "temperature": 0}
    *_, answer = Api(talker, "x").chat(json.dumps(asked).encode())
    assert json.loads(answer)["choices"][0]["message"]["content"] == found
    ids = talker.tokenizer.encode_turns([Turn("user", said.strip())], reply=True)
    assert len(ids) + len(talker.tokenizer.encode(found)) <= 256
    spaces = converse(capsys, monkeypatch, " \tegg ", " ", "", system=" Be brief.\n")
    assert spaces == [*converse(capsys, monkeypatch, "egg"), "", ""]


@pytest.mark.usefixtures("talker", "silent")
def test_a_line_that_is_not_utf_8_is_one_line_and_the_talk_goes_on(monkeypatch, capsys):
    typed = TextIOWrapper(BytesIO(b"egg\n\xff\negg\n"), "utf-8", "surrogateescape")
    monkeypatch.setattr("sys.stdin", typed)
    sample.main(["--out_dir=out/run"])
    assert r"note: the text has '\udcff', which is half" in capsys.readouterr().err


@pytest.fixture
def silent(monkeypatch):
    """sample.py prints nothing, so that a complaint is all that is printed."""
    for module in (sample, loading):
        monkeypatch.setattr(module, "print", lambda *args, **keys: None, raising=False)


# --------------------------------------------------------------------------------------
# Humpty


def test_no_training_conversation_has_a_composition_a_sum_or_a_made_up_name_that_is_held_out():
    drawn = {}
    for held_out in (False, True):
        composer = HUMPTY.Composer(1, held_out)
        values = [HUMPTY.Values(composer) for _ in range(3000)]
        said = [each.said for _ in range(2000) for each in composer.conversation()]
        drawn[held_out] = (
            {" ".join(re.findall(r"\w+", text.lower())) for text in said if "+" not in text},
            {frozenset((each["a"], each["b"])) for each in values},
            {each["name"] for each in values} - set(composer.values["name"]),
        )
    for trained, held_out in zip(*drawn.values(), strict=True):
        assert len(held_out) >= 20 and not trained & held_out


def test_what_was_told_is_recalled_and_what_was_not_told_is_not_known():
    composer = HUMPTY.Composer(5)
    for kind in ("name", "colour", "animal", "food", "town", "age"):
        told = {}
        for reply in composer.exchange(f"ask {kind}", told).replies:
            assert "You have not told me" in reply or "I do not know your name" in reply
        composer.exchange(f"tell {kind}", told)
        for reply in composer.exchange(f"ask {kind}", told).replies:
            assert str(told[kind]).lower() in reply.lower()


def test_composed_texts_have_no_slot_left_and_a_seed_composes_the_same_ones():
    composer, again = HUMPTY.Composer(3), HUMPTY.Composer(3)
    for _ in range(1000):
        exchanges = composer.conversation()
        assert exchanges == again.conversation()
        for exchange in exchanges:
            for text in (exchange.said, *exchange.replies):
                assert text and not set("{}<>|()") & set(text)
