"""Translation from sentence pairs: batches, training, scores and sample.py."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, make_pairs, read_rows

import prepare_data
import sample
import train
from humptygpt.cli import UserError
from humptygpt.data import pairs
from humptygpt.data.dataset import BLOCKS
from humptygpt.data.pair_dataset import PairDataset, batches
from humptygpt.generation import translation as beam_search
from humptygpt.generation.translation import Translation, translate_lines
from humptygpt.tokenizers.basic import ByteTokenizer
from humptygpt.training import evaluation
from humptygpt.training import translation as task
from humptygpt.training.start import read_settings

TINY = "--dataset=pairs --device=cpu --model=transformer --n_layer=1 --n_head=2 --n_embd=32 --block_size=40"
TINY += " --batch_size=4 --log_interval=1 --eval_interval=3 --max_iters=6 --warmup_iters=2 --out_dir=out/run"
TINY = [*TINY.split(), "--dtype=float32"]
NO_ENCODER = ["--model=gpt", "--block_size=80"]


def open_pairs(with_encoder: bool = True, seed: int = 1) -> PairDataset:
    return PairDataset(Path("data/pairs"), 40 if with_encoder else 80, seed, with_encoder)


def pairs_of(data: PairDataset, split: str) -> list[tuple]:
    """(source, target) of the pairs of a split, as text."""
    texts = data.texts(split)
    return [(data.tokenizer.decode(source[:-1]), target) for source, target in texts]


def texts_in(data: PairDataset, batch: dict) -> list[tuple[str, str]]:
    """(source, target) of each row, without padding."""
    found, eot = [], data.tokenizer.eot
    for row, (idx, targets) in enumerate(zip(batch["idx"], batch["targets"], strict=True)):
        target = targets[targets >= 0].tolist()
        if data.with_encoder:
            source = batch["source"][row]
            source = source[source >= 0].tolist()
            assert idx[0] == eot
        else:
            source = idx[: int((targets >= 0).nonzero()[0]) + 1].tolist()
        assert source[-1] == target[-1] == eot
        assert idx[targets >= 0].tolist()[1:] == target[:-1]
        found.append(tuple(data.tokenizer.decode(side[:-1]) for side in (source, target)))
    return found


def prepare_bytes(rows: list[tuple[str, str]], *argv: str) -> None:
    Path("pairs.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in rows))
    keys = ["--input=pairs.tsv", "--name=pairs", "--tokenizer=byte", "--overwrite=True"]
    prepare_data.main([*keys, *argv])


def test_sacrebleu_that_is_not_installed_is_named_before_the_first_step(pairs, fails, monkeypatch):
    monkeypatch.delattr("humptygpt.training.translation")
    monkeypatch.delitem(sys.modules, "humptygpt.training.translation")
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    complaint = "this needs the package sacrebleu: pip install sacrebleu\n"
    assert fails(train.main, *TINY) == complaint
    assert not Path("out/run").exists()


both_ways = pytest.mark.parametrize("with_encoder", [True, False])


# --------------------------------------------------------------------------------------
# Batches


def test_a_model_with_an_encoder_and_one_without_are_evaluated_on_the_same_text(pairs):
    one, other = (evaluation.evaluated(open_pairs(way), 4, None) for way in (True, False))
    assert one == other and one["val_tokens"] > 20


@both_ways
def test_an_epoch_has_each_pair_once_and_whole(pairs, with_encoder):
    data = open_pairs(with_encoder)
    expected = sorted(pairs_of(data, "train"))
    assert set(expected) < set(make_pairs())
    for epoch in range(3):
        batches = int(data.batches_per_epoch(4))
        read = [data.batch(epoch * batches + number, 4) for number in range(batches)]
        assert sorted(pair for batch in read for pair in texts_in(data, batch)) == expected
    read = [pair for batch in data.val_batches(4, None) for pair in texts_in(data, batch)]
    assert sorted(read) == sorted(pairs_of(data, "val"))


@both_ways
def test_a_batch_has_no_more_tokens_than_asked_for_and_little_padding(folder, with_encoder):
    draw = np.random.default_rng(0)
    lengths = draw.integers(20, 120, 3000)
    others = (lengths * draw.normal(1.0, 0.15, 3000).clip(0.5, 1.5)).astype(int)
    sizes = zip(lengths, others, strict=True)
    rows = [(f"{i:0{n}}", "y" * m) for i, (n, m) in enumerate(sizes)]
    prepare_bytes(rows, "--max_pair_tokens=200")
    data = PairDataset(Path("data/pairs"), 400, 1, with_encoder)
    counted = room = 0
    for number in range(int(data.batches_per_epoch(4))):
        batch = data.batch(number, 4)
        sides = [batch["idx"], batch["source"]] if with_encoder else [batch["idx"]]
        assert max(side.numel() for side in sides) <= 4 * 400
        room += sum(side.numel() for side in sides)
        for source, target in texts_in(data, batch):
            counted += len(source) + len(target) + 2 - (not with_encoder)
    assert counted / room > 0.9


@both_ways
def test_a_batch_depends_on_seed_and_step_only(pairs, with_encoder):
    in_order, jumping = open_pairs(with_encoder), open_pairs(with_encoder)
    expected = [in_order.batch(number, 4) for number in range(40)]
    for number in (39, 3, 17, 0):
        for key, value in jumping.batch(number, 4).items():
            assert torch.equal(value, expected[number][key])
    batches = int(in_order.batches_per_epoch(4))
    first, second = ([texts_in(in_order, b) for b in expected[i * batches : (i + 1) * batches]] for i in (0, 1))
    assert first != second
    # the batches are shuffled
    sizes = [[len(batch) for batch in epoch] for epoch in (first, second)]
    assert sorted(sizes[0]) == sorted(sizes[1]) and sizes[0] != sizes[1]
    other = open_pairs(with_encoder, seed=2)
    assert [texts_in(other, other.batch(number, 4)) for number in range(batches)] != first


@both_ways
def test_pairs_of_equal_lengths_meet_others_in_each_epoch(folder, with_encoder):
    prepare_bytes([(f"a{i:02}", f"b{i:02}") for i in range(90)])
    data = open_pairs(with_encoder)
    batches = int(data.batches_per_epoch(1))
    first, second = (
        {frozenset(texts_in(data, data.batch(epoch * batches + number, 1))) for number in range(batches)}
        for epoch in (0, 1)
    )
    assert first != second


@both_ways
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_longest_pair_of_all_splits_just_fits(pairs, with_encoder, split):
    data = open_pairs(with_encoder)
    source, _ = max(pairs_of(data, split))
    long = "long " * 9 + "it is."
    rows = [(s, long if s == source else t) for s, t in make_pairs()]
    prepare_bytes(rows, "--val_fraction=0.2")
    # its last token is never read
    needed = 52 if with_encoder else len(source.encode()) + 1 + 52 - 1
    assert PairDataset(Path("data/pairs"), needed, 1, with_encoder).texts(split)
    complaint = f"a pair that needs {needed} tokens, .* use --block_size={needed}$"
    with pytest.raises(UserError, match=complaint):
        PairDataset(Path("data/pairs"), needed - 1, 1, with_encoder)


def test_one_long_source_makes_no_other_batch_small(folder, monkeypatch):
    rows = [("long" * 9, "a"), *((f"s{i:02}", f"t{i:02}") for i in range(90))]
    monkeypatch.setattr(pairs, "RATIO", 20)
    prepare_bytes(rows)
    sizes = sorted(map(len, batches(open_pairs(), "train", 2)))
    assert sizes[0] == 2 and sizes[-1] == 20  # of 4 tokens each, in 2 times 40


@both_ways
def test_eval_iters_batches_of_all_lengths_are_evaluated_always_the_same(folder, with_encoder):
    prepare_bytes(make_pairs(), "--val_fraction=0.4")
    data = open_pairs(with_encoder)
    whole, some = (
        [sorted(texts_in(data, batch)) for batch in data.val_batches(1, eval_iters)] for eval_iters in (None, 3)
    )
    assert len(whole) > 6 and len(some) == 3 and all(batch in whole for batch in some)
    # each is from another third of the lengths
    by_length = [texts_in(data, data.pairs_batch("val", b)) for b in batches(data, "val", 1)]
    places = [list(map(sorted, by_length)).index(batch) for batch in some]
    assert [place * 3 // len(whole) for place in places] == [0, 1, 2]
    other = open_pairs(with_encoder, seed=2)
    assert some == [sorted(texts_in(data, batch)) for batch in other.val_batches(1, 3)]
    assert [sorted(texts_in(data, batch)) for batch in data.val_batches(1, 999)] == whole
    assert data.summary(1, 3)[1] == f"{sum(map(len, some))} of {sum(map(len, whole))} pairs"


@both_ways
def test_each_block_of_an_evaluation_s_batches_has_pairs_of_all_lengths(folder, with_encoder):
    rows = [(f"{i:0{3 + i % 60}}", "t" * (3 + i % 60)) for i in range(3000)]
    prepare_bytes(rows, "--val_fraction=0.4")
    data = PairDataset(Path("data/pairs"), 130, 1, with_encoder)
    lengths = np.array([batch["idx"].shape[1] for batch in data.val_batches(2, 99)])
    blocks = np.array_split(lengths, BLOCKS)
    assert len(lengths) == 99 and lengths.std() > 10
    assert np.ptp([block.mean() for block in blocks]) < 5


def test_bits_per_byte_count_the_translation_only(pairs):
    data = open_pairs()
    lengths = [len(text.encode()) for _, text in data.texts("val")]
    # a byte each, and an end
    assert data.val_bytes_per_token() == sum(lengths) / (sum(lengths) + len(lengths))


@pytest.mark.parametrize("lost", [[0], [-2, -1]], ids=["first", "last two"])
def test_a_stream_that_has_lost_ends_of_texts_is_refused(pairs, lost):
    class Damaged(PairDataset):
        def chunks(self, split):
            ((start, ids),) = super().chunks(split)
            ids[np.flatnonzero(ids == self.tokenizer.eot)[lost]] = 0
            yield start, ids

    with pytest.raises(UserError, match="consist of complete pairs; prepare it again with "):
        Damaged(Path("data/pairs"), 40, 1, with_encoder=True)


# --------------------------------------------------------------------------------------
# Training


@both_ways
def test_pairs_are_memorised_and_translated_as_in_training(pairs, capsys, with_encoder):
    prepare_bytes(make_pairs()[:24], "--tokenizer=bpe", "--vocab_size=350")
    learn = "--n_embd=64 --n_layer=1 --max_iters=80 --eval_interval=80 --learning_rate=1e-2 --batch_size=8"
    learn += " --warmup_iters=20 --weight_decay=0 --log_interval=100 --position=rotary --activation=relu_squared"
    learn += " --norm=rmsnorm --init=zero"
    model = [] if with_encoder else NO_ENCODER
    assert train.main([*TINY, *model, *learn.split()]) == 0
    known = pairs_of(open_pairs(with_encoder), "train")
    Path("german.txt").write_text("".join(f"{source}\n" for source, _ in known))
    capsys.readouterr()
    start = ["--out_dir=out/run", "--checkpoint=latest", "--start=FILE:german.txt"]
    for beams in (1, 4):
        sample.main([*start, f"--num_beams={beams}"])
        assert capsys.readouterr().out.splitlines() == [target for _, target in known]


@both_ways
def test_a_resumed_run_on_pairs_is_the_uninterrupted_one(pairs, with_encoder):
    model = [] if with_encoder else NO_ENCODER
    argv = [*TINY, *model, "--dropout=0.1", "--label_smoothing=0.1"]
    assert train.main(argv) == 0
    whole, weights = read_rows(Path("out/run")), torch.load("out/run/ckpt.pt")["model"]
    two = "--out_dir=out/two"
    assert train.main([*argv, "--max_iters=3", two, "--lr_decay_iters=6"]) == 0
    assert train.main(["--init_from=resume", two, "--max_iters=6"]) == 0
    losses = lambda rows: [row for row in rows if "test_bleu" not in row]  # noqa: E731
    assert losses(read_rows(Path("out/two"))) == losses(whole)
    for name, weight in torch.load("out/two/ckpt.pt")["model"].items():
        assert torch.equal(weight, weights[name])


def test_accumulating_gives_the_gradient_of_the_mean_over_all_target_tokens(pairs, monkeypatch):
    argv = [*TINY, "--gradient_accumulation_steps=3", "--grad_clip=0"]
    run = train.setup(read_settings(argv))
    total, count = 0.0, 0
    for index in range(3):
        batch = run.dataset.batch(index, 4)
        tokens = int((batch["targets"] >= 0).sum())
        total, count = total + run.model(**batch)[1] * tokens, count + tokens
    parameters = list(run.model.parameters())
    expected = torch.autograd.grad(total / count, parameters)
    losses, _, tokens = train.train_step(run)
    gradients = [p.grad for p in parameters]
    expected_loss = float((total / count).detach())
    assert tokens == count and float(losses["train_loss"]) == pytest.approx(expected_loss)
    torch.testing.assert_close(gradients, list(expected))


def test_evaluations_show_translations_and_the_end_has_the_bleu_of_the_best_checkpoint(pairs, capsys):
    assert train.main(TINY) == 0
    out = capsys.readouterr().out
    source, target = pairs_of(open_pairs(), "val")[0]
    # one before the first step, and one for each evaluation
    assert out.count(f"    {source}\n  = {target}\n  > ") == 3
    assert "pairs of the test split" in out and "BLEU" in out and "chrF" in out
    assert out.count("nrefs:1|") == 2
    row = read_rows(Path("out/run"))[-1]
    assert row["iter"] == 6
    assert 0 <= row["test_bleu"] <= 100 and 0 <= row["test_chrf"] <= 100
    # all steps are done: it only scores once more
    assert train.main(["--init_from=resume", "--out_dir=out/run"]) == 0
    assert [r for r in read_rows(Path("out/run")) if "test_bleu" in r] == [row]
    capsys.readouterr()
    assert train.main(["--init_from=resume", "--out_dir=out/run", "--eval_only=True"]) == 0
    assert f"BLEU {row['test_bleu']:5.2f}" in capsys.readouterr().out


def test_the_weights_that_are_scored_are_those_of_the_best_checkpoint(pairs, monkeypatch):
    losses, scored, score = iter([1.0, 2.0]), [], task.score_translations
    monkeypatch.setattr(evaluation, "validation_loss", lambda *args: (next(losses), 0.1))
    weights = lambda model: model.state_dict()["lm_head.weight"].clone()  # noqa: E731
    keep = lambda *args: (scored.append(weights(args[0])), score(*args))[1]  # noqa: E731
    monkeypatch.setattr(task, "score_translations", keep)
    assert train.main(TINY) == 0
    best, latest = (torch.load(f"out/run/{name}.pt")["model"]["lm_head.weight"] for name in ("best", "ckpt"))
    assert torch.equal(scored[0], best) and not torch.equal(best, latest)


def test_it_translates_without_dropout_and_never_chooses_ids_that_only_pad_the_vocabulary(pairs, monkeypatch):
    calls, search = [], beam_search.beam_search

    def watched(model, tokenizer, source, num_beams=1):
        calls.append((model.training, num_beams, tokenizer.vocab_size))
        return search(model, tokenizer, source, num_beams=num_beams)

    monkeypatch.setattr(beam_search, "beam_search", watched)
    assert train.main([*TINY, "--dropout=0.1", "--vocab_size=300"]) == 0
    # shown three times, then scored
    assert calls == [*[(False, 1, 257)] * 3, (False, 4, 257)]


# --------------------------------------------------------------------------------------
# Translating


def test_lines_keep_their_order_and_numbers_and_long_ones_are_cut_and_reported(pairs, capsys, monkeypatch):
    train.main(TINY)

    def echo(model, tokenizer, sources, **settings):
        return [Translation(ids[:-1].tolist(), -1.0, ended=ids[0] < 53) for ids in sources]

    monkeypatch.setattr(beam_search, "translate", echo)
    monkeypatch.setattr("humptygpt.generation.translation.AT_ONCE", 2)
    text = "\ufeff1\u2028 is\n2\n\n  \n5\n" + 50 * "6"
    Path("german.txt").write_text(text, encoding="utf-8")
    capsys.readouterr()
    sample.main(["--out_dir=out/run", "--start=FILE:german.txt"])
    printed = capsys.readouterr()
    assert printed.out == "1 is\n2\n\n\n5\n" + 39 * "6" + "\n"
    assert [line for line in printed.err.splitlines() if line.startswith("note")] == [
        "note: line 6 has 50 tokens; only the first 39 are read",
        "note: line 5: the translation was cut off at the length limit",
        "note: line 6: the translation was cut off at the length limit",
    ]


def test_from_a_notebook_a_sentence_is_translated(pairs, capsys):
    train.main(TINY)
    capsys.readouterr()
    sample.main(["--out_dir=out/run", "--start=ein Hund", "--max_new_tokens=9"])
    loaded = sample.load("out/run", device="cpu")
    text = loaded.complete("ein Hund", max_new_tokens=9)
    assert capsys.readouterr().out == f"{text}\n"


def test_beams_penalty_and_length_are_those_asked_for_and_a_translation_is_one_line(pairs, capsys, monkeypatch):
    train.main(TINY)
    asked = []

    def translate(model, tokenizer, sources, **settings):
        asked.append(tuple(settings.values()))
        return [Translation(list(b"a\n b"), 0.0, ended=True)]

    monkeypatch.setattr(beam_search, "translate", translate)
    capsys.readouterr()
    start = ["--out_dir=out/run", "--start=Wo?"]
    sample.main(start)
    sample.main([*start, "--num_beams=7", "--max_new_tokens=9"])
    assert asked == [(4, 500), (7, 9)]
    assert capsys.readouterr().out == "a b\n" * 2


def test_bad_input_of_a_translation(pairs, fails, tiny):
    complaint = "dataset=tiny is for language modelling, but model=transformer is for translation"
    assert complaint in fails(train.main, *TINY, "--dataset=tiny")
    complaint = "dataset=pairs is for translation, but model=window_mlp is for language modelling"
    window_mlp = ["--dataset=pairs", "--device=cpu", "--model=window_mlp", "--window=2"]
    assert complaint in fails(train.main, *window_mlp)
    train.main(TINY)
    Path("empty.txt").write_text("")
    with pytest.raises(UserError, match=r"nothing to translate in start=FILE:empty\.txt"):
        sample.main(["--out_dir=out/run", "--start=FILE:empty.txt"])
    assert "num_beams=0" in fails(sample.main, "--num_beams=0")


def test_keys_of_the_other_task_are_refused(pairs, tiny):
    train.main(TINY)
    with pytest.raises(UserError, match=r"temperature=0\.5 has no effect with task=trans"):
        sample.main(["--out_dir=out/run", "--start=Wo?", "--temperature=0.5"])
    assert train.main([*TINY_RUN, "--out_dir=out/text"]) == 0
    with pytest.raises(UserError, match="num_beams=4 has no effect with task=language"):
        sample.main(["--out_dir=out/text", "--num_beams=4"])


def test_without_an_encoder_half_of_the_context_is_left_for_the_translation(monkeypatch):
    read = []

    def note_lengths(model, tokenizer, sources, **search):
        read.extend(map(len, sources))
        return [Translation([], 0.0, ended=True)] * len(sources)

    monkeypatch.setattr(beam_search, "translate", note_lengths)
    for parts in ({"encode": None}, {}):
        model = SimpleNamespace(config=SimpleNamespace(block_size=16), **parts)
        list(translate_lines(model, ByteTokenizer(separated=True), ["x" * 20]))
    assert read == [16, 8]
