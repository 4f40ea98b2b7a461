import json
import math
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import GPT2

import compare
from humptygpt import checkpoint
from humptygpt.config import UserError
from model import ModelConfig
from train import TrainConfig

ROOT = Path(__file__).parent.parent
SHAPE = ModelConfig(**GPT2, n_head=4, block_size=64, vocab_size=65)
DEFAULTS = asdict(TrainConfig(max_iters=200)) | asdict(SHAPE)
RECORDS = {"_parameters": 804_096, "_model.py": "89abcdef"}  # of a run, beside its settings


def make_run(
    folder: str,
    *losses: float,
    every: int = 100,
    bytes_per_token: float = 1.0,
    quiet: float = 1e6,
    bleu: float | None = None,
    text: str = "0123abcd",
    whole: float | None = None,
    end: str | None = None,
    pace: float = 1.0,
    **settings,
) -> Path:
    """A folder as train.py leaves it: an evaluation of each loss, after each `every` steps (10 tokens, 1 s).

    text: the checksum of what was evaluated. whole: the loss on the whole split. pace: how far each step brings a run.
    """
    path = Path(folder)
    path.mkdir(parents=True)
    settings = DEFAULTS | RECORDS | {"out_dir": folder} | settings
    (path / "config.json").write_text(json.dumps(settings))
    rows = []
    clock = {"iter": 0, "tokens": 0, "seconds": 0.0, "position": 0.0}
    for it, loss in enumerate(losses, start=1):
        iters = it * every
        clock = {"iter": iters, "tokens": iters * 10, "seconds": float(iters)}
        clock["position"] = iters * pace
        step = {"train_loss": loss, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 10}
        bits = loss / math.log(2) / bytes_per_token
        row = {
            "val_loss": loss,
            "val_bits_per_byte": bits,
            "val_perplexity": math.exp(loss),
            "val_tokens": 1000,
            "val_text": text,
        }
        rows += [clock | step, clock | row]
    if end or clock["position"] >= settings["max_iters"]:
        rows.append(clock | {"end": end or "done"})
    if whole is not None:
        row = {"val_loss": whole, "val_bits_per_byte": whole / math.log(2), "iter": every}
        row |= {"val_tokens": 5000, "val_text": "whole"}
        rows.append(clock | {f"whole_{key}": value for key, value in row.items()})
    if bleu is not None:
        rows.append(clock | {"test_bleu": bleu, "test_chrf": 2 * bleu})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stamp = time.time() - quiet
    os.utime(path / "metrics.jsonl", (stamp, stamp))
    return path


def as_an_earlier_version(path: Path) -> Path:
    """Leave out of a run's folder what version 34191e6 did not record."""
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({key: value for key, value in settings.items() if key not in RECORDS})
    )
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for key in ("position", "val_tokens", "val_text"):
            row.pop(key, None)
    lines = [json.dumps(row) + "\n" for row in rows if "end" not in row]
    (path / "metrics.jsonl").write_text("".join(lines))
    return path


def run(capsys, *argv: str) -> str:
    """What compare.py prints to stdout."""
    capsys.readouterr()
    compare.main(["--picture=None", *argv])
    return capsys.readouterr().out


def row_of(table: str, name: str) -> str:
    (line,) = [line for line in table.splitlines() if line.startswith(f"{name} ")]
    return line


def data_of(capsys, *argv: str) -> list[dict]:
    return json.loads(run(capsys, *argv, "--json=-"))


# --------------------------------------------------------------------------------------
# The table


def test_a_row_shows_name_parameters_time_speed_loss_bits_and_state(folder, capsys):
    make_run("out/a", 2.5, 2.0)
    bits = 2 / math.log(2)
    row = f"a 804,096 200.0 10 2.0000 200 {bits:.3f} best done"
    assert row_of(run(capsys, "out/a"), "a").split() == row.split()


def test_settings_that_differ_are_shown_but_for_those_that_do_not_matter(folder, capsys):
    make_run("out/a", 2.0)
    make_run("out/b", 2.0, position="none", n_head=1)
    make_run("out/c", 2.0, wandb_run_name="x", log_interval=7, init_from="resume")
    table = run(capsys, "out/a", "out/b", "out/c")
    assert row_of(table, "a").endswith("  n_head=4 position=learned")
    assert row_of(table, "b").endswith("  n_head=1 position=none")


def test_rows_come_in_the_order_given_and_only_for_what_is_given(folder, capsys):
    for name in ("out/b", "out/a", "out/a/again", "elsewhere/c"):
        make_run(name, 2.0)
    names = lambda *argv: [line.split()[0] for line in run(capsys, *argv).splitlines()[1:3]]  # noqa: E731
    assert names("out/b", "out/a") == ["b", "a"]
    assert names("out/a/", "out/a/again") == ["a", "a/again"]
    assert names("out/a", "elsewhere/c") == ["out/a", "elsewhere/c"]


def test_the_best_is_the_lowest_evaluation_and_not_the_last(folder, capsys):
    make_run("out/a", 2.0, 1.5, 1.7, max_iters=300)
    assert row_of(run(capsys, "out/a"), "a").split()[4:6] == ["1.5000", "200"]


def test_runs_with_different_tokens_are_compared_by_bits_per_byte(folder, capsys):
    make_run("out/char", 1.5, 1.4)
    make_run("out/bpe", 4.0, 3.9, bytes_per_token=4.0, dataset="mine_bpe", vocab_size=1000)
    compare.main(["out/char", "out/bpe", "--picture=None"])
    table, errors = capsys.readouterr()
    assert " best " in row_of(table, "bpe") and " best " not in row_of(table, "char")
    assert errors == ""


def test_of_runs_that_were_evaluated_on_different_texts_none_is_the_best(folder, capsys):
    make_run("out/a", 2.0)
    make_run("out/b", 1.9, text="4567cdef")  # as many tokens, as of data prepared again
    make_run("out/new", quiet=0)
    compare.main(["out/a", "out/b", "out/new", "--picture=None"])
    table, errors = capsys.readouterr()
    assert " best" not in table
    assert errors == (
        "note: the runs were evaluated on different texts, so none is the best:"
        " a on 1000 tokens, b on 1000 tokens\n"
    )


def test_the_whole_split_counts_if_all_runs_were_evaluated_on_it(folder, capsys):
    make_run("out/a", 2.0, 1.9, text="a", whole=1.95)
    make_run("out/b", 1.8, 2.1, text="b", whole=2.05)
    compare.main(["out/a", "out/b", "--picture=None"])
    table, errors = capsys.readouterr()
    assert errors == "" and " best " in row_of(table, "a")
    assert row_of(table, "b").split()[4:6] == ["2.0500", "100"]
    # one that still runs was evaluated on the sample only
    make_run("out/c", 1.7, text="b", quiet=0)
    table = run(capsys, "out/b", "out/c")
    assert [row_of(table, name).split()[4] for name in "bc"] == ["1.8000", "1.7000"]
    assert " best " in row_of(table, "c")


def test_only_evaluations_on_the_text_of_the_last_one_count(folder, capsys):
    path = make_run("out/a", 1.0, text="before") / "metrics.jsonl"
    path.write_text(path.read_text() + (make_run("out/b", 2.0) / path.name).read_text())
    assert row_of(run(capsys, "out/a"), "a").split()[4] == "2.0000"


def test_the_loss_before_the_first_step_is_not_the_run_s(folder, capsys):
    path = make_run("out/a", 2.7) / "metrics.jsonl"
    row = json.loads(path.read_text().splitlines()[1]) | {"iter": 0, "val_loss": 0.7}
    path.write_text(json.dumps(row) + "\n" + path.read_text())
    assert row_of(run(capsys, "out/a"), "a").split()[4:6] == ["2.7000", "100"]


def test_runs_with_the_same_settings_and_other_code_are_told_apart(folder, capsys):
    make_run("out/idea-1", 2.0)
    make_run("out/idea-2", 2.0, **{"_model.py": "00000000"})
    table = run(capsys, "out/idea-1", "out/idea-2")
    assert row_of(table, "idea-1").endswith("  _model.py=89abcdef")
    assert row_of(table, "idea-2").endswith("  _model.py=00000000")
    assert len(data_of(capsys, "out/idea-1", "out/idea-2", "--group=True")) == 2


def test_curves_are_drawn_over_bytes_so_that_tokens_of_any_length_compare(folder):
    make_run("out/bpe", 4.0, 3.9, bytes_per_token=4.0)
    read, bits = compare.curve(compare.read_run(Path("out/bpe")))
    assert read == pytest.approx([4000, 8000])
    assert bits == pytest.approx([4 / 4 / math.log(2), 3.9 / 4 / math.log(2)])


def test_a_run_with_settings_of_another_version_is_listed(folder, capsys):
    make_run("out/a", 2.0, 2.0)
    make_run("out/newer", 1.9, 1.9, n_experts=8)
    make_run("out/newest", 1.9, 1.9, position="quantum")
    table = run(capsys, "out/a", "out/newer", "out/newest")
    assert row_of(table, "newer").split()[1] == row_of(table, "newest").split()[1]
    assert "n_experts=8" in row_of(table, "newer") and "n_experts=—" in row_of(table, "a")


def test_what_a_run_of_an_earlier_version_did_not_record_is_unknown(folder, capsys):
    make_run("out/new", 2.0, 1.9)
    for name, changes in (("a", {}), ("b", {}), ("c", {"eval_interval": 50})):
        as_an_earlier_version(make_run(f"out/{name}", 2.0, 1.9, **changes))
    compare.main(["out/a", "out/new", "--picture=None"])
    table, errors = capsys.readouterr()
    row = row_of(table, "a").split()
    assert row[1] == "—" and row[-2:] == ["done", "_model.py=—"]
    assert "a on unknown tokens, new on 1000 tokens\n" in errors
    # evaluated alike, as their settings say, or not
    assert " best " in run(capsys, "out/a", "out/b") and not capsys.readouterr().err
    assert " best " not in run(capsys, "out/a", "out/c")


def test_a_run_of_an_earlier_version_has_the_defaults_of_the_keys_that_came_later(
    folder, capsys
):
    make_run("out/a-1", 2.0, seed=1)
    earlier = make_run("out/a-2", 1.8, seed=2) / "config.json"
    settings = json.loads(earlier.read_text())
    del settings["checkpoint_activations"]
    earlier.write_text(json.dumps(settings))
    (row,) = data_of(capsys, "out/a-1", "out/a-2", "--group=True")
    assert row["seeds"] == 2


# --------------------------------------------------------------------------------------
# Runs in progress, and folders that are not runs


@pytest.mark.parametrize(
    ("losses", "settings", "state"),
    [
        ([2.0, 1.9], {}, "done"),
        ([2.0, 1.9], {"max_iters": 2000}, "stopped at 10 %"),
        ([2.0, 1.9], {"max_iters": 500, "quiet": 0}, "running at 40 %"),
        ([], {"quiet": 0}, "running at 0 %"),
        ([], {}, "stopped at 0 %"),
        ([2.0, 1.9], {"max_iters": 900, "quiet": 500}, "running at 22 %"),
        ([2.0, 1.9], {"max_iters": 900, "quiet": 0, "end": "stopped"}, "stopped at 22 %"),
        # by early stopping, and by --minutes: slower and faster than was planned
        ([2.0, 1.9], {"max_iters": 900, "quiet": 0, "end": "done"}, "done"),
        ([2.0, 1.9], {"max_iters": 900, "quiet": 0, "pace": 4.5}, "done"),
        ([2.0, 1.9], {"max_iters": 900, "quiet": 0, "pace": 4}, "running at 88 %"),
        ([2.0, 1.9], {"max_iters": 100, "quiet": 0, "pace": 0.4}, "running at 80 %"),
    ],
)
def test_a_row_shows_the_state_of_its_run(folder, capsys, losses, settings, state):
    make_run("out/a", *losses, **settings)
    assert row_of(run(capsys, "out/a"), "a").endswith(f"  {state}")


def test_a_run_without_its_last_evaluation_is_not_done(folder, capsys):
    metrics = as_an_earlier_version(make_run("out/a", 2.0, 1.9)) / "metrics.jsonl"
    assert row_of(run(capsys, "out/a"), "a").endswith("done")
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    assert row_of(run(capsys, "out/a"), "a").endswith("running at 100 %")


DAMAGED = [
    "[1]",
    "",
    "{",
    "[" * 100_000,
    '{"iter": 5}',
    "\x00\xff",
    {"iter": None},
    {"iter": "5"},
    {"tokens": [1]},
    {"seconds": True},
    {"iter": -1},
    {"seconds": math.nan},
    {"tokens": 10**400},
    {"val_loss": "low"},
    {"val_loss": 0.1, "val_bits_per_byte": -1},
    {"val_loss": 0.1},
    {"val_bits_per_byte": 0.1},
    {"position": "5"},
]


@pytest.mark.parametrize("row", DAMAGED, ids=lambda row: str(row)[:40])
def test_damaged_rows_are_skipped_with_a_note(folder, capsys, row):
    make_run("out/good", 2.0)
    metrics = make_run("out/a", 2.0, 1.9, 1.95, max_iters=300) / "metrics.jsonl"
    expected = run(capsys, "out/a", "out/good")
    if isinstance(row, dict):
        row = json.dumps({"iter": 150, "tokens": 1500, "seconds": 1.5} | row)
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([row, *lines[:3], row, *lines[3:], ""]))
    compare.main(["out/a", "out/good", "--picture=None"])
    table, errors = capsys.readouterr()
    assert table == expected
    assert errors == f"note: {metrics} has damaged lines, skipped: 2, the first is line 1\n"


def test_changed_bytes_of_metrics_are_a_note_at_most(folder, capsys):
    metrics = make_run("out/a", 2.0, 1.9, whole=1.95) / "metrics.jsonl"
    whole = metrics.read_bytes()
    rng = random.Random(0)
    for _ in range(200):
        changed = bytearray(whole)
        at = rng.randrange(len(whole))
        changed[at] = rng.randrange(256)
        metrics.write_bytes(changed)
        compare.main(["out/a", "--picture=None", "--group=True"])
        table, errors = capsys.readouterr()
        assert all(line.isprintable() for line in table.splitlines())
        line = whole[:at].count(b"\n") + 1
        note = (
            rf"note: {metrics} has damaged lines, skipped: [12], the first is line {line}\n"
        )
        assert not errors or re.fullmatch(note, errors)


def test_a_last_line_that_is_being_written_is_skipped_without_a_note(folder, capsys):
    metrics = make_run("out/a", 2.0, 1.9, quiet=0) / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"iter": 3')
    compare.main(["out/a", "--json=-", "--picture=None"])
    out, errors = capsys.readouterr()
    (row,) = json.loads(out)
    assert (row["state"], row["best_val_loss"], row["best_iter"]) == ("done", 1.9, 200)
    assert errors == ""


@pytest.mark.parametrize("losses", [(2.0, 1.9), ()])
def test_a_run_that_has_not_been_evaluated_shows_dashes_and_is_drawn_without_a_curve(
    folder, capsys, losses
):
    make_run("out/a", *losses, quiet=0)
    make_run("out/new", quiet=0)
    table = run(capsys, "out/a", "out/new", "--picture=out/compare.png")
    if losses:
        assert row_of(table, "new").split()[2:7] == ["0.0", "—", "—", "—", "—"]
    assert Path("out/compare.png").exists()


BROKEN = {
    '{"max_iters": 2': "Expecting ',' delimiter: line 1 column 16 (char 15)",
    '{"hidden_size": 768}': "max_iters is missing",
    json.dumps(DEFAULTS | {"max_iters": 0}): "max_iters must be an int from 1 to",
    json.dumps(DEFAULTS | {"dataset": "\x1b[2J\ud800"}): "it has unprintable characters",
}


@pytest.mark.parametrize("config", BROKEN, ids=BROKEN.values())
def test_a_folder_whose_config_is_damaged_is_one_note_and_the_rest_is_compared(
    folder, capsys, config
):
    make_run("out/good", 2.0)
    (make_run("out/bad", 2.0) / "config.json").write_text(config)
    compare.main(["out/good", "out/bad", "--picture=None"])
    out, errors = capsys.readouterr()
    assert errors.startswith(f"note: out/bad is not a run: {BROKEN[config]}")
    assert errors.count("\n") == 1 and errors.endswith("; skipped\n")
    assert row_of(out, "good") and "bad" not in out


@pytest.mark.parametrize("missing", ["config.json", "metrics.jsonl"])
def test_what_is_no_run_is_skipped_with_a_note(folder, capsys, missing):
    (make_run("out/a", 2.0) / missing).unlink()
    make_run("out/b", 2.0)
    compare.main(["out/a", "out/b", "out", "--picture=None"])
    lacks = "No such file or directory"
    assert capsys.readouterr().err.splitlines() == [
        f"note: out/a is not a run: cannot read out/a/{missing}: {lacks}; skipped",
        f"note: out is not a run: cannot read out/config.json: {lacks};"
        " for the runs in it: python compare.py out/*; skipped",
    ]
    with pytest.raises(UserError, match="no run to compare"):
        compare.main(["out/a"])


def test_bad_arguments_are_one_line(folder, fails):
    make_run("out/a", 2.0)
    for argv, complaint in {
        "": "no run to compare; try: python compare.py out/*",
        "out/a --pictur=x.png": "unknown key pictur",
        "out/a --picture=x.svg": "picture=x.svg must end in .png",
        "out/a --json=/": "cannot write /: it is not a regular file; name another",
        "out/a --baseline=b": "baseline=b is not a row of out: a",
    }.items():
        assert complaint in fails(compare.main, *argv.split())


def test_a_mistake_is_reported_without_loading_torch(folder):
    Path("out").mkdir()
    code = "import sys, compare\ntry: compare.main(['out'])\nexcept compare.UserError: print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr


# --------------------------------------------------------------------------------------
# Groups: --group=True


def make_seeds(path: str, *losses: float, **settings) -> list[str]:
    """The folders of a finished run for each lowest loss, with seeds from 1; {} in the path is the seed."""
    return [
        str(make_run(path.format(seed), 3.0, loss, seed=seed, **settings))
        for seed, loss in enumerate(losses, 1)
    ]


def test_runs_of_a_variant_that_differ_in_the_seed_alone_are_one_row_of_means_and_a_range(
    folder, capsys
):
    runs = make_seeds("out/heads/one-{}", 2.0, 1.4, 1.5, n_head=1)
    more = {"n_head": 4, "every": 110, "bleu": 30, "wandb_run_name": "x"}
    runs.append(str(make_run("out/heads/four-1", 1.9, 1.5, seed=1, **more)))
    more = {"n_head": 4, "every": 100, "bleu": 33, "log_interval": 7}
    runs.append(str(make_run("out/heads/four-2", 1.9, 1.3, seed=2, **more)))
    one, four = data_of(capsys, *runs, "--group=True")
    assert (one["group"], one["run"]) == ("heads", "one")
    assert (one["seeds"], one["state"]) == (3, "3 done")
    assert one["best_val_loss"] == pytest.approx(4.9 / 3)
    bits = [value / math.log(2) for value in (4.9 / 3, 1.4, 2.0)]
    measured = [one["best_bits_per_byte"], one["lowest"], one["highest"]]
    assert measured == pytest.approx(bits)
    assert (one["seconds"], four["seconds"], four["test_bleu"]) == (200, 210, 31.5)
    assert (one["n_head"], four["n_head"], "seed" in one) == (1, 4, False)


LAYOUTS = {
    "out/idea/{variant}-{seed}": ("idea", "with"),
    "out/idea/{variant}_seed={seed}": ("idea", "with"),
    "out/idea/{variant}/{seed}": ("idea", "with"),
    "out/idea/{variant}/seed{seed}": ("idea", "with"),
    "out/idea/{variant}_0.1-{seed}": ("idea", "with_0.1"),
    "out/idea/{variant}4-{seed}": ("idea", "with4"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_layouts_of_folders_are_recognised_and_the_baseline_can_be_named(
    folder, capsys, layout
):
    group, variant = LAYOUTS[layout]
    runs = make_seeds(
        layout.replace("{variant}", "with").format(seed="{}"), 1.5, 1.6, n_head=2
    )
    theirs = layout.replace("{variant}", "without").format(seed="{}")
    runs += make_seeds(theirs, 2.0, 2.1)
    first, second = data_of(capsys, *runs, "--group=True")
    assert (first["group"], first["run"], first["seeds"]) == (group, variant, 2)
    assert first["difference"] is None and second["difference"] > 0
    baseline = second["run"]
    first, second = data_of(capsys, *runs, "--group=True", f"--baseline={baseline}")
    assert [first["run"], second["run"]] == [baseline, variant]
    assert second["difference"] == pytest.approx(-0.5 / math.log(2))


def test_seeds_with_minutes_are_one_row_though_the_clock_chose_their_steps(folder, capsys):
    chosen = {"eval_interval": 50, "warmup_iters": 3, "dropout": 0.1, "weight_decay": 0.2}
    runs = make_seeds("out/idea/with-{}", 2.0, minutes=1.0)
    runs.append(str(make_run("out/idea/with-2", 2.2, minutes=1.0, seed=2, **chosen)))
    runs.append(str(make_run("out/idea/with-3", 2.2, minutes=1.0, n_layer=2)))
    assert [row["seeds"] for row in data_of(capsys, *runs, "--group=True")] == [2, 1]


def test_variants_in_folders_of_their_own_may_have_the_same_settings(folder, capsys):
    runs = make_seeds("out/idea/old/{}", 2.0, 2.1) + make_seeds("out/idea/new/{}", 1.9, 1.8)
    assert [row["seeds"] for row in data_of(capsys, *runs, "--group=True")] == [2, 2]


def test_runs_whose_settings_differ_are_not_merged_whatever_their_names(folder, capsys):
    runs = [str(make_run(f"out/idea/heads-{n}", 2.0, n_head=n)) for n in (1, 2, 4)]
    rows = data_of(capsys, *runs, "--group=True")
    assert [row["run"] for row in rows] == ["heads-1", "heads-2", "heads-4"]


def test_rows_are_compared_with_the_first_of_their_group_and_the_best_of_each_group_is_marked(
    folder, capsys
):
    bits = {  # lowest loss of each seed, in bits per byte; what the row says of it
        "out/a/first-{}": ((2.0, 2.1), (None, "")),
        "out/a/worse-{}": ((2.2, 2.5), (0.3, "")),
        "out/a/better-{}": ((1.9, 1.99), (-0.105, "")),
        "out/a/overlaps-{}": ((1.5, 2.05), (-0.275, "best")),
        "out/b/first-{}": ((4.0, 4.2), (None, "best")),
        "out/b/around-{}": ((3.92, 4.32), (0.02, "")),
        "out/c/first-{}": ((3.0, 3.2), (None, "")),
        "out/c/once-{}": ((2.9,), (-0.2, "best")),
    }
    runs = []
    for i, (path, (values, _)) in enumerate(bits.items()):
        runs += make_seeds(
            path, *(math.log(2) * value for value in values), max_iters=199 - i
        )
    rows = data_of(capsys, *runs, "--group=True")
    assert [row["remark"] for row in rows] == [said[1] for _, said in bits.values()]
    expected = [said[0] and pytest.approx(said[0]) for _, said in bits.values()]
    assert [row["difference"] for row in rows] == expected
    table = run(capsys, *runs[::2], *runs[1::2], "--group=True")  # in alternation
    titles = [line for line in table.splitlines() if line in ("a", "b", "c")]
    assert titles == ["a", "b", "c"]
    assert "-0.275  best" in row_of(table, "overlaps")
    assert row_of(table, "overlaps").endswith("2 done  max_iters=196")


def test_a_run_without_an_evaluation_counts_in_no_mean_and_a_group_may_have_none(
    folder, capsys, draw
):
    runs = [str(make_run("out/a/new-1", n_head=1, seed=1, quiet=0))]
    runs += make_seeds("out/a/old-{}", 2.0, 1.9)
    runs.append(str(make_run("out/a/old-3", quiet=0, seed=3)))
    new, old = data_of(capsys, *runs, "--group=True")
    assert (new["seeds"], new["best_val_loss"], old["difference"]) == (0, None, None)
    assert (old["seeds"], old["best_val_loss"]) == (2, pytest.approx(1.95))
    assert old["state"] == "2 done, 1 running at 0 %"
    (panel,) = draw(*runs, "--group=True")
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert labels == ["new-1", f"old  {1.95 / math.log(2):.3f}"]


def test_different_validation_text_is_noted_for_the_group_that_has_it(folder, capsys):
    runs = [*make_seeds("out/a/x-{}", 2.0), *make_seeds("out/a/y-{}", 2.0, n_head=1)]
    runs += make_seeds("out/b/x-{}", 2.0, n_head=1)
    runs += make_seeds("out/b/y-{}", 2.0, text="4567cdef")
    compare.main([*runs, "--group=True", "--picture=None"])
    table, errors = capsys.readouterr()
    assert errors == (
        "note: the runs of b were evaluated on different texts, so none is the best:"
        " x-1 on 1000 tokens, y-1 on 1000 tokens\n"
    )
    group_a, group_b = table.split("\nb\n")
    assert " best " in group_a and " best " not in group_b
    # nor are they compared
    assert "difference" in group_a and "difference" not in group_b


# --------------------------------------------------------------------------------------
# The table as data, and the picture


@pytest.mark.parametrize("group", ["True", "False"])
def test_json_holds_the_numbers_in_full_and_all_that_differs(folder, capsys, group):
    make_run("out/a", 2.123456789)
    make_run("out/b", 1.987654321, 1.9, n_head=1, dataset="has,comma")
    table = run(capsys, "out/a", "out/b", "--json=out/t.json", f"--group={group}")
    from_json = json.loads(Path("out/t.json").read_text())
    for row in from_json:
        shown = row_of(table, row["run"]).split()
        assert shown[1:3] == [f"{row['parameters']:,}", f"{row['seconds']:,.1f}"]
        assert shown[4:6] == [f"{row['best_val_loss']:.4f}", str(row["best_iter"])]
        assert shown[6] == f"{row['best_bits_per_byte']:.3f}"
    assert from_json[0]["best_val_loss"] == 2.123456789
    differing = [(row["n_head"], row["dataset"]) for row in from_json]
    assert differing == [(4, "shakespeare_char"), (1, "has,comma")]


def test_on_stdout_data_stands_alone(folder, capsys):
    make_run("out/a", 2.0)
    make_run("out/new")
    compare.main(["out/a", "out/new", "nowhere", "--json=-"])
    out, errors = capsys.readouterr()
    rows = json.loads(out)
    assert [row["run"] for row in rows] == ["a", "new"]
    assert rows[1]["best_val_loss"] is None
    assert "nowhere is not a run" in errors and "out/compare.png written" in errors


def test_the_picture_is_a_png_and_what_was_written_is_not_taken_for_a_run(folder, capsys):
    make_run("out/a", 2.0, 1.9)
    for _ in range(2):
        compare.main([*sorted(map(str, Path("out").iterdir())), "--json=out/table.json"])
        written = capsys.readouterr().err
        assert written == "out/table.json written\nout/compare.png written\n"
    assert Path("out/compare.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def draw(saved_figures):
    """Run compare.py and return the panels of its picture."""

    def run(*argv: str) -> list:
        compare.main([*argv, "--picture=x.png"])
        return saved_figures[-1].axes

    return run


@pytest.mark.parametrize("count", [1, 5, 20])
def test_each_run_has_one_look_of_its_own(folder, draw, count):
    left, right = draw(
        *(str(make_run(f"out/{i:02}", 2.5, 2 - i / 100)) for i in range(count))
    )
    assert len({(line.get_color(), line.get_linestyle()) for line in left.lines}) == count
    dots = right.lines[1::2]
    assert [dot.get_color() for dot in dots] == [line.get_color() for line in left.lines]
    labels = [label.get_text() for label in right.get_yticklabels()]
    assert labels == [f"{i:02}  {(2 - i / 100) / math.log(2):.3f}" for i in range(count)]


def test_the_first_point_of_a_curve_is_in_the_axes(folder, draw):
    make_run("out/a", *(1 + 4 / it for it in range(1, 10)))
    make_run("out/b", *(1 + 8 / it for it in range(1, 10)))
    left, _ = draw("out/a", "out/b")
    for line in left.lines:
        assert len(line.get_xydata()) == 9
        for point in line.get_xydata():
            assert left.bbox.contains(*left.transData.transform(point))


@pytest.mark.parametrize("count", [1, 11])
def test_groups_have_a_panel_each_in_which_the_first_row_is_grey(folder, draw, count):
    runs = []
    for i in range(count):
        runs += make_seeds(f"out/idea_{i:02}/without-{{}}", 2.0, 2.1, n_head=1)
        runs += make_seeds(f"out/idea_{i:02}/with-{{}}", 1.5, 1.6)
        runs += make_seeds(f"out/idea_{i:02}/again-{{}}", 2.05, 2.2, n_head=2)
    panels = draw(*runs, "--group=True")
    titles = [panel.get_title(loc="left") for panel in panels]
    assert titles == [f"idea_{i:02}" for i in range(count)]
    bits = [value / math.log(2) for value in (2.05, 1.55, 2.125)]
    names = [
        f"{name}  {x:.3f}"
        for name, x in zip(("without", "with", "again"), bits, strict=True)
    ]
    for panel in panels:
        assert [label.get_text() for label in panel.get_yticklabels()] == names
        ranges, dots = panel.lines[::2], panel.lines[1::2]
        colors = [line.get_color() for line in dots]
        assert colors == [compare.GREY, compare.BLUE, compare.BLUE]
        for bar, each in zip(panel.patches, bits, strict=True):
            ends = {round(bar.get_x(), 6), round(bar.get_x() + bar.get_width(), 6)}
            assert ends == {round(bits[0], 6), round(each, 6)}
        assert [x * math.log(2) for x in ranges[1].get_xdata()] == pytest.approx([1.5, 1.6])
        assert panel.get_ylim() == (2.5, -0.5)  # the first row is on top


def test_real_runs_are_compared(run_train, capsys):
    run_train("--out_dir=out/run")
    model = checkpoint.read(Path("out/run/best.pt"))["model"]
    first = json.loads(Path("out/run/config.json").read_text())
    Path("out/run").rename("out/first")
    run_train("--position=alibi")
    out = run(capsys, "out/first", "out/run", "--json=-")
    old, new = json.loads(out)
    assert (old["position"], new["position"]) == (first["position"], "alibi")
    assert old["state"] == new["state"] == "done" and old["iter"] == 6
    sizes = {tensor.data_ptr(): tensor.numel() for tensor in model.values()}
    assert old["parameters"] == sum(sizes.values())
    best = checkpoint.read(Path("out/run/best.pt"))["progress"]
    assert (new["best_val_loss"], new["best_iter"]) == (best["best_val_loss"], best["iter"])
    assert not {"out_dir", "seed"} & new.keys()
