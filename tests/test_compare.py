import csv
import io
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

import compare
from humptygpt.checkpoint import checkpoint
from model import ModelConfig
from train import TrainConfig

ROOT = Path(__file__).parent.parent
DEFAULTS = asdict(TrainConfig(max_iters=200)) | asdict(ModelConfig(vocab_size=65))


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def make_run(
    folder: str,
    *losses: float,
    every: int = 100,
    bytes_per_token: float = 1.0,
    quiet: float = 1e6,
    bleu: float | None = None,
    **settings,
) -> Path:
    """A folder as train.py leaves it: an evaluation of each loss, after each `every` steps (10 tokens, 1 s)."""
    path = Path(folder)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(DEFAULTS | {"out_dir": folder} | settings))
    rows = []
    for it, loss in enumerate(losses, start=1):
        clock = {"iter": it * every, "tokens": it * every * 10, "seconds": it * float(every)}
        bits = loss / math.log(2) / bytes_per_token
        rows.append(
            clock | {"train_loss": loss, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 10}
        )
        rows.append(
            clock | {"val_loss": loss, "val_bits_per_byte": bits, "val_perplexity": math.exp(loss)}
        )
    if bleu is not None:
        rows.append(clock | {"test_bleu": bleu, "test_chrf": 2 * bleu})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stamp = time.time() - quiet
    os.utime(path / "metrics.jsonl", (stamp, stamp))
    return path


def run(capsys, *argv: str) -> str:
    """What compare.py prints to stdout."""
    capsys.readouterr()
    compare.main(
        [*argv, *([] if any(a.startswith("--picture") for a in argv) else ["--picture=None"])]
    )
    return capsys.readouterr().out


def row_of(table: str, name: str) -> str:
    (line,) = [line for line in table.splitlines() if line.startswith(f"{name} ")]
    return line


# --------------------------------------------------------------------------------------
# The table


def test_a_row_shows_name_parameters_time_speed_loss_bits_and_state(folder, capsys):
    make_run("out/a", 2.5, 2.0)
    parameters = 65 * 128 + 64 * 128 + 4 * (12 * 128 * 128 + 2 * 128) + 128
    assert row_of(run(capsys, "out/a"), "a").split() == [
        *(
            "a",
            f"{parameters:,}",
            "200.0",
            "10",
            "2.0000",
            "200",
            f"{2 / math.log(2):.3f}",
            "best",
            "done",
        )
    ]


def test_only_settings_that_differ_are_shown_and_only_where_they_are_unusual(folder, capsys):
    make_run("out/a", 2.0)
    make_run("out/b", 2.0, position="none", n_head=1)
    make_run("out/c", 2.0, wandb_run_name="x", log_interval=7, init_from="resume")
    table = run(capsys, "out/a", "out/b", "out/c")
    assert table.splitlines()[-1] == "most runs: n_head=4 position=learned"
    assert row_of(table, "b").endswith("  n_head=1 position=none")
    assert "=" not in row_of(table, "a") + row_of(table, "c")


@pytest.mark.parametrize("count", [2, 3])
def test_where_no_value_is_common_every_row_shows_its_own(folder, capsys, count):
    for i in range(count):
        make_run(f"out/{i}", 2.0, learning_rate=0.1 * i)
    table = run(capsys, *(f"out/{i}" for i in range(count)))
    assert "most runs" not in table
    assert all(
        row_of(table, str(i)).split()[-1] == f"learning_rate={0.1 * i}" for i in range(count)
    )


def test_settings_that_need_more_lines_stay_in_their_column(folder, capsys, monkeypatch):
    make_run("out/a", 2.0, 1.9)
    make_run(
        "out/b",
        2.0,
        1.9,
        position="rotary",
        norm="rmsnorm",
        activation="silu",
        optimizer="muon",
        bias=True,
    )
    for columns in ("80", "120"):
        monkeypatch.setenv("COLUMNS", columns)
        lines = run(capsys, "out/a", "out/b").splitlines()
        (start,) = [number for number, line in enumerate(lines) if "settings" in line]
        column = lines[start].index("settings")
        assert len(lines) > start + 3 and all(
            line[column - 1] == " " != line[column] for line in lines[start:]
        )
        assert {
            line[:column].strip() for line in lines[start + 2 :] if not line.startswith("b ")
        } == {""}


def test_where_settings_do_not_fit_beside_the_numbers_they_follow_in_a_second_block(
    folder, capsys, monkeypatch
):
    make_run("out/a", 2.0)
    make_run("out/b", 2.0, n_head=2)
    monkeypatch.setenv("COLUMNS", "80")
    first, second = run(capsys, "out/a", "out/b").rstrip().split("\n\n")
    assert [line.split()[0] for line in first.splitlines()] == ["run", "a", "b"]
    assert [line.split() for line in second.splitlines()] == [
        ["run", "state", "settings"],
        *(
            ["a", "stopped", "at", "100", "of", "200", "n_head=4"],
            ["b", "stopped", "at", "100", "of", "200", "n_head=2"],
        ),
    ]


@pytest.mark.parametrize("width", [80, 120, 200])
def test_many_differences_and_long_names_fit_the_terminal(folder, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    unusual = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 64,
        "position": "rotary",
        "norm": "rmsnorm",
        "activation": "silu",
    }
    unusual |= {
        "learning_rate": 0.002,
        "beta2": 0.95,
        "weight_decay": 0.0,
        "optimizer": "muon",
        "seed": 1,
    }
    for name in ("a", "b"):
        make_run(f"out/{name}", 2.0, max_iters=2000)
    make_run("out/" + "a-long-name-" * 8 + "with-an-end", 1.9, **unusual)
    table = run(capsys, *sorted(map(str, Path("out").iterdir())))
    assert max(map(len, table.splitlines())) <= width
    assert all(f"{key}={value}" in table for key, value in unusual.items())
    assert "…" in table and "-an-end " in table


def test_rows_come_in_the_order_given_and_only_for_what_is_given(folder, capsys):
    for name in ("out/b", "out/a", "out/a/previous-1", "elsewhere/c"):
        make_run(name, 2.0)
    names = lambda *argv: [line.split()[0] for line in run(capsys, *argv).splitlines()[1:3]]  # noqa: E731
    assert names("out/b", "out/a") == ["b", "a"]
    assert names("out/a/", "out/a/previous-1") == ["a", "a/previous-1"]
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
    assert (
        "note: the runs differ in dataset; losses compare only on the same validation text"
        in errors
    )


def test_curves_are_drawn_over_bytes_so_that_tokens_of_any_length_compare(folder):
    make_run("out/bpe", 4.0, 3.9, bytes_per_token=4.0)
    curve = compare.curve(compare.read_run(Path("out/bpe")))
    assert curve == [
        pytest.approx((4000, 4 / 4 / math.log(2))),
        pytest.approx((8000, 3.9 / 4 / math.log(2))),
    ]


def test_a_run_with_settings_of_another_version_is_listed_without_parameters(folder, capsys):
    make_run("out/a", 2.0, 2.0)
    make_run("out/newer", 1.9, 1.9, n_experts=8)
    make_run("out/newest", 1.9, 1.9, position="quantum")
    table = run(capsys, "out/a", "out/newer", "out/newest")
    assert row_of(table, "newer").split()[1] == row_of(table, "newest").split()[1] == "—"
    assert row_of(table, "newer").endswith("done   n_experts=8")
    assert "most runs: position=learned n_experts=—" in table


def test_a_run_of_an_earlier_version_has_the_defaults_of_the_keys_that_came_later(folder, capsys):
    make_run("out/a-1", 2.0, seed=1)
    earlier = make_run("out/a-2", 1.8, seed=2) / "config.json"
    settings = json.loads(earlier.read_text())
    del settings["grad_clip"]
    earlier.write_text(json.dumps(settings))
    assert "grad_clip" not in run(capsys, "out/a-1", "out/a-2")
    assert rows_of(capsys, "out/a-1", "out/a-2")["a"]["seeds"] == 2


# --------------------------------------------------------------------------------------
# Runs in progress, and folders that are not runs


@pytest.mark.parametrize(
    ("losses", "settings", "state"),
    [
        ([2.0, 1.9], {}, "done"),
        ([2.0, 1.9], {"max_iters": 2000}, "stopped at 200 of 2000"),
        ([2.0, 1.9], {"max_iters": 500, "quiet": 0}, "running at 40 %"),
        ([], {"quiet": 0}, "running at 0 %"),
        ([], {}, "stopped at 0 of 200"),
        ([2.0, 2.1, 2.2], {"max_iters": 900, "early_stopping": 2}, "done early at 300 of 900"),
        ([2.0, 2.1, 1.9], {"max_iters": 900, "early_stopping": 2}, "stopped at 300 of 900"),
        ([2.0, 2.1], {"max_iters": 900, "early_stopping": 2}, "stopped at 200 of 900"),
        (
            [2.0, 1.9],
            {"max_iters": 900, "quiet": 600, "log_interval": 100},
            "running at 22 %",
        ),  # a line each 100 s
    ],
)
def test_a_row_shows_the_state_of_its_run(folder, capsys, losses, settings, state):
    make_run("out/a", *losses, **settings)
    assert row_of(run(capsys, "out/a"), "a").endswith(f"  {state}")


def test_a_run_without_its_last_evaluation_is_not_done(folder, capsys):
    metrics = make_run("out/a", 2.0, 1.9) / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    assert row_of(run(capsys, "out/a"), "a").endswith("running at 100 %")


DAMAGED = [
    *(
        "[1]",
        '"text"',
        "7",
        "null",
        "true",
        "",
        "{",
        "[" * 100_000,
        '{"iter": 5}',
        "{'iter': 5}",
        "\x00\xff",
    ),
    *(
        {"iter": None},
        {"iter": "5"},
        {"tokens": [1]},
        {"seconds": {}},
        {"seconds": True},
        {"iter": -1},
    ),
    *({"seconds": math.nan}, {"seconds": math.inf}, {"tokens": 10**400}, {"iter": 1e300}),
    *({"val_loss": math.nan}, {"val_loss": "low"}, {"val_loss": None}, {"val_loss": -math.inf}),
    *({"val_loss": 0.1, "val_bits_per_byte": []}, {"val_loss": 0.1, "val_bits_per_byte": -1}),
    *({"test_bleu": None}, {"test_bleu": math.nan}, {"test_bleu": {"score": 30}}),
]


@pytest.mark.parametrize("row", DAMAGED, ids=lambda row: str(row)[:40])
def test_damaged_rows_are_skipped_with_a_note_wherever_they_stand(folder, capsys, row):
    make_run("out/good", 2.0)
    metrics = make_run("out/a", 2.0, 1.9, 1.95, max_iters=300) / "metrics.jsonl"
    line = (
        row
        if isinstance(row, str)
        else json.dumps({"iter": 150, "tokens": 1500, "seconds": 1.5} | row)
    )
    expected = run(capsys, "out/a", "out/good")
    lines = metrics.read_text().splitlines()
    for at in (0, 3, 6):
        metrics.write_text(
            "".join(
                f"{line}\n" for line in [*lines[:at], line, *lines[at:], ""][: 8 if at == 6 else 7]
            )
        )
        compare.main(["out/a", "out/good"])
        table, errors = capsys.readouterr()
        assert table == expected
        assert f"note: {metrics} has damaged lines, skipped: 1\n" in errors


def test_a_row_that_lacks_its_bits_per_byte_still_counts(folder, capsys):
    metrics = make_run("out/a", 2.0) / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"iter": 200, "tokens": 2000, "seconds": 20, "val_loss": 1.5}\n')
    compare.main(["out/a"])
    assert row_of(capsys.readouterr().out, "a").split()[3:6] == ["100", "1.5000", "200"]


def test_a_last_line_that_is_being_written_is_skipped_without_a_note(folder, capsys):
    metrics = make_run("out/a", 2.0, 1.9, quiet=0) / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"iter": 3')
    compare.main(["out/a", "--json=-", "--picture=None"])
    out, errors = capsys.readouterr()
    (row,) = json.loads(out)
    assert (row["state"], row["best_val_loss"], row["best_iter"], errors) == ("done", 1.9, 200, "")


def test_a_run_that_has_not_been_evaluated_shows_dashes_and_others_are_drawn(folder, capsys):
    make_run("out/a", 2.0, 1.9)
    make_run("out/new", quiet=0)
    table = run(capsys, "out/a", "out/new", "--picture=out/compare.png")
    assert row_of(table, "new").split()[2:7] == ["0.0", "—", "—", "—", "—"]
    assert Path("out/compare.png").exists()


def test_without_any_evaluation_there_is_no_picture_and_a_note(folder, capsys):
    make_run("out/new")
    compare.main(["out/new"])
    assert capsys.readouterr().err == "note: no run has bits per byte yet, so there is no picture\n"
    assert not Path("out/compare.png").exists()


def break_folder(how: str) -> str:
    if how == "a file":
        Path("out/bad").write_text("hello")
    elif how != "missing":
        path = make_run("out/bad", 2.0)
        config = path / "config.json"
        {
            "no config": config.unlink,
            "no metrics": (path / "metrics.jsonl").unlink,
            "damaged": lambda: config.write_text('{"max_iters": 2'),
            "not text": lambda: config.write_bytes(b"\xff\xfe"),
            "foreign": lambda: config.write_text('{"hidden_size": 768}'),
            "a list": lambda: config.write_text("[1]"),
            "no steps": lambda: config.write_text(json.dumps(DEFAULTS | {"max_iters": 0})),
            "nested": lambda: config.write_text("[" * 100_000),
            "control characters": lambda: config.write_text(
                json.dumps(DEFAULTS | {"dataset": "\x1b[2J\ud800"})
            ),
        }[how]()
    return "out/bad"


BROKEN = {
    "missing": "out/bad is not a run: out/bad/config.json: No such file or directory",
    "a file": "out/bad is not a run: out/bad/config.json: Not a directory",
    "no config": "out/bad is not a run: out/bad/config.json: No such file or directory",
    "no metrics": "out/bad is not a run: out/bad/metrics.jsonl: No such file or directory",
    "damaged": "out/bad is not a run: its config.json is damaged: Expecting ',' delimiter: line 1 column 16 (char 15)",
    "not text": "out/bad is not a run: its config.json is damaged: 'utf-8' codec can't decode byte 0xff in position 0:"
    " invalid start byte",
    "foreign": "out/bad is not a run: its config.json is damaged: max_iters is missing",
    "a list": "out/bad is not a run: its config.json is damaged: the content must be a dictionary",
    "no steps": "out/bad is not a run: its config.json is damaged: max_iters must be an integer from 1 to "
    "9,007,199,254,740,991",
    "nested": "out/bad is not a run: its config.json is damaged: it is nested too deeply",
    "control characters": "out/bad is not a run: its config.json is damaged: it has unprintable characters",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_folder_that_is_not_a_run_is_one_note_and_the_rest_is_compared(folder, capsys, how):
    make_run("out/good", 2.0)
    compare.main(["out/good", break_folder(how), "--picture=None"])
    out, errors = capsys.readouterr()
    assert errors == f"note: {BROKEN[how]}; skipped\n"
    assert row_of(out, "good") and "bad" not in out


def test_nothing_left_to_compare_is_one_line_and_exit_code_2(folder, fails):
    Path("out").mkdir()
    bad = break_folder("foreign")
    assert fails(compare.main, bad) == f"nothing to compare: {BROKEN['foreign']}\n"
    assert "(nor are 2 others)" in fails(compare.main, bad, "out", "nowhere")
    assert "no run to compare; try: python compare.py out/*" in fails(compare.main)


def test_bad_arguments_are_one_line(folder, fails):
    make_run("out/a", 2.0)
    assert "unknown key pictur; did you mean picture?" in fails(
        compare.main, "out/a", "--pictur=x.png"
    )
    assert "picture=x.svg must end in .png" in fails(compare.main, "out/a", "--picture=x.svg")
    assert "csv=- and json=- cannot both have stdout" in fails(
        compare.main, "out/a", "--csv=-", "--json=-"
    )
    for key in ("csv", "json"):
        assert "cannot write /: it is a folder; name a file in it" in fails(
            *(compare.main, "out/a", f"--{key}=/", "--picture=None")
        )
    assert fails(compare.main, "out/a/metrics.jsonl").endswith("Not a directory; write out/a\n")
    assert fails(compare.main, "out").endswith("; for the runs in it write out/*\n")
    assert fails(compare.main, "out/aa").endswith("; did you mean out/a?\n")


def test_a_mistake_is_reported_without_loading_torch(folder):
    Path("out").mkdir()
    code = "import sys, compare\ntry: compare.main(['out'])\nexcept ValueError: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


# --------------------------------------------------------------------------------------
# Groups: --group=True


def make_seeds(path: str, *losses: float, **settings) -> list[str]:
    """The folders of a finished run for each lowest loss, with seeds from 1."""
    return [
        str(make_run(f"{path}-{seed}", 3.0, loss, seed=seed, **settings))
        for seed, loss in enumerate(losses, 1)
    ]


def rows_of(capsys, *argv: str) -> dict[str, dict]:
    """{run: its row} of the JSON."""
    return {row["run"]: row for row in json.loads(run(capsys, *argv, "--group=True", "--json=-"))}


def test_runs_of_a_folder_that_differ_in_the_seed_alone_are_one_row_of_means_ranges_and_the_median_time(
    folder, capsys
):
    runs = make_seeds("out/heads/one", 2.0, 1.4, 1.5, n_head=1)
    runs.append(
        str(make_run("out/heads/four-1", 1.9, 1.5, n_head=4, seed=1, bleu=30, wandb_run_name="x"))
    )
    runs.append(
        str(
            make_run(
                "out/heads/four-2", 1.9, 1.3, n_head=4, seed=2, bleu=33, log_interval=7, every=110
            )
        )
    )
    runs.append(str(make_run("out/heads/four-3", 1.9, 1.2, n_head=4, seed=3, bleu=36, every=500)))
    rows = rows_of(capsys, *runs)
    one, four = rows["one"], rows["four"]
    assert [one["group"], one["folder"], one["seeds"], one["state"]] == [
        "heads",
        "out/heads",
        3,
        "3 done",
    ]
    assert [one["best_val_loss"], one["best_val_loss_low"], one["best_val_loss_high"]] == [
        pytest.approx(4.9 / 3),
        1.4,
        2.0,
    ]
    bits = [value / math.log(2) for value in (4.9 / 3, 1.4, 2.0)]
    assert [one[f"best_bits_per_byte{end}"] for end in ("", "_low", "_high")] == pytest.approx(bits)
    assert (one["seconds"], four["seconds"]) == (200, 220)
    assert [four["test_bleu"], four["test_bleu_low"], four["test_bleu_high"]] == [33, 30, 36]
    assert (one["n_head"], four["n_head"], "seed" in one) == (1, 4, False)


def test_without_groups_runs_that_differ_in_the_seed_alone_are_rows_of_their_own(folder, capsys):
    table = run(capsys, *make_seeds("out/heads/one", 2.0, 1.4))
    assert row_of(table, "one-1").endswith("done   seed=1") and row_of(table, "one-2").endswith(
        "done   seed=2"
    )


def test_equal_runs_of_two_folders_are_two_groups(folder, capsys):
    runs = [*make_seeds("out/a/one", 2.0, 1.9), *make_seeds("out/b/one", 1.8, 1.7)]
    lines = run(capsys, *runs[::2], *runs[1::2], "--group=True").splitlines()  # in alternation
    assert [line.split(" ")[0] for line in lines] == ["run", "", "a", "one", "", "b", "one"]


def test_rows_are_compared_with_the_first_of_their_group_and_the_best_of_each_group_is_marked(
    folder, capsys
):
    bits = {  # lowest loss of each seed, in bits per byte
        "out/a/first": (2.0, 2.1),
        "out/a/worse": (2.2, 2.5),
        "out/a/better": (1.9, 1.99),
        "out/a/overlaps": (1.5, 2.05),  # also the best
        "out/b/first": (4.0, 4.2),
        "out/b/around": (3.92, 4.32),
        "out/c/alone": (4.0, 4.2),
        "out/d/first": (3.0, 3.2),
        "out/d/once": (2.9,),
    }
    runs = []
    for i, (path, values) in enumerate(bits.items()):
        runs += make_seeds(path, *(math.log(2) * value for value in values), max_iters=199 - i)
    table = run(capsys, *runs, "--group=True")
    shown = [re.split(r"  +", line) for line in table.splitlines() if " done" in line]
    heading = [
        "run",
        "seconds",
        "val loss",
        "bits/byte",
        "lowest",
        "highest",
        "difference",
        "seeds",
        "settings",
    ]
    assert re.split(r"  +", table.splitlines()[0]) == heading
    marks = [[cell for cell in cells[6:] if not re.search("done|=", cell)] for cells in shown]
    assert [[cells[0], *mark] for cells, mark in zip(shown, marks, strict=True)] == [
        ["first"],
        ["worse", "+0.300"],
        ["better", "-0.105"],
        ["overlaps", "-0.275 best, within seeds"],
        ["first", "best"],
        ["around", "+0.020 within seeds"],
        ["alone"],
        ["first"],
        ["once-1", "-0.200 best, one seed"],
    ]
    assert shown[0][1:6] == ["200.0", f"{2.05 * math.log(2):.4f}", "2.050", "2.000", "2.100"]
    rows = json.loads(run(capsys, *runs, "--group=True", "--json=-"))
    assert [row["within_seeds"] for row in rows] == [
        None,
        False,
        False,
        True,
        None,
        True,
        None,
        None,
        None,
    ]
    assert rows[1]["difference"] == pytest.approx(0.3) and rows[0]["difference"] is None


def test_settings_are_shown_where_they_differ_within_a_group(folder, capsys):
    runs = [
        *make_seeds("out/heads/one", 2.0, 1.9, n_head=1),
        *make_seeds("out/heads/four", 1.8, 1.7, n_head=4),
    ]
    runs += make_seeds("out/wide/32", 2.0, 1.9, n_embd=32, n_head=1, norm="rmsnorm")
    runs += make_seeds("out/wide/64", 2.0, 1.9, n_embd=64, n_head=1, norm="rmsnorm")
    lines = run(capsys, *runs, "--group=True").splitlines()
    settings = [line.split("2 done  ")[1].strip() for line in lines if " done" in line]
    assert settings[:2] == ["n_head=1", "n_head=4"]
    assert [re.sub(r"[\d,]+$", "N", text) for text in settings[2:]] == [
        "n_embd=32 parameters=N",
        "n_embd=64 parameters=N",
    ]


def test_a_row_of_a_group_shows_all_that_differs_even_where_most_rows_agree(folder, capsys):
    runs = [
        *make_seeds("out/clip/1-adamw", 2.0),
        *make_seeds("out/clip/2-muon", 1.9, optimizer="muon"),
    ]
    runs += make_seeds("out/clip/3-clip", 1.8, optimizer="muon", grad_clip=0.9)
    lines = run(capsys, *runs, "--group=True").splitlines()
    settings = [
        "optimizer=adamw grad_clip=1.0",
        "optimizer=muon grad_clip=1.0",
        "optimizer=muon grad_clip=0.9",
    ]
    assert [line.split("1 done  ")[1] for line in lines[3:]] == settings


@pytest.mark.parametrize("width", [80, 120, 200])
def test_groups_fit_the_terminal(folder, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    runs = make_seeds("out/heads/first", 2.0, 2.1)
    runs += make_seeds(
        "out/heads/" + "a-long-name-" * 8 + "with-an-end",
        1.9,
        2.0,
        n_head=1,
        position="rotary",
        bias=True,
    )
    lines = run(capsys, *runs, "--group=True").splitlines()
    assert max(map(len, lines)) <= width
    assert [line.strip() for line in lines].count("heads") == (1 if width == 200 else 2)
    text = " \n".join([*lines, ""])
    assert "-an-end " in text and " best, within seeds" in text
    assert all(
        f"{setting} " in text
        for setting in ("n_head=1", "n_head=4", "position=rotary", "position=learned")
    )
    assert ("val loss" in text) == (width == 200)


NAMES = [
    (["without-1", "without-2"], "without"),
    (["without-10", "without-12"], "without"),
    (["n_head=4_seed=1", "n_head=4_seed=22"], "n_head=4"),
    (["dropout_0.1-1", "dropout_0.1-2"], "dropout_0.1"),
    (["heads4", "heads4-2"], "heads4"),
    (["seed1", "seed2"], "seed1"),
    (["1", "2"], "1"),
    (["a", "b"], "a"),
    (["heads-4"], "heads-4"),
]


@pytest.mark.parametrize(("names", "name"), NAMES, ids=[name for _, name in NAMES])
def test_a_row_is_named_after_what_its_runs_share_before_the_number_of_the_seed(
    folder, capsys, names, name
):
    runs = [str(make_run(f"out/group/{name}", 2.0, seed=seed)) for seed, name in enumerate(names)]
    assert list(rows_of(capsys, *runs)) == [name]


def test_rows_that_would_have_the_same_name_are_named_after_their_first_runs(folder, capsys):
    runs = [
        str(make_run(f"out/group/run-{i}", 2.0, seed=i % 2, n_head=1 + i // 2)) for i in range(4)
    ]
    assert list(rows_of(capsys, *runs)) == ["run-0", "run-2"]


def test_a_run_without_an_evaluation_counts_in_no_mean_and_a_group_may_have_none(
    folder, capsys, draw
):
    runs = [
        str(make_run("out/a/new-1", n_head=1, seed=1, quiet=0)),
        *make_seeds("out/a/old", 2.0, 1.9),
    ]
    runs.append(str(make_run("out/a/old-3", quiet=0, seed=3)))
    runs += [str(make_run("out/b/new-1", quiet=0)), *make_seeds("out/b/once", 1.9, n_head=1)]
    new, old, alone, once = json.loads(run(capsys, *runs, "--group=True", "--json=-"))
    assert (new["seeds"], new["best_val_loss"], new["best_bits_per_byte"], old["difference"]) == (
        0,
        None,
        None,
        None,
    )
    assert (old["seeds"], old["best_val_loss"], old["state"]) == (
        2,
        pytest.approx(1.95),
        "2 done, 1 running at 0 %",
    )
    assert (alone["seeds"], alone["best_val_loss_low"]) == (0, None)
    a, b = draw(*runs, "--group=True")
    assert [text.get_text() for text in a.texts] == [
        "not evaluated yet",
        f"{1.95 / math.log(2):.3f}",
    ]
    assert [text.get_text() for text in b.texts] == [
        "not evaluated yet",
        f"{1.9 / math.log(2):.3f}",
    ]
    assert [set(line.get_xdata()) for line in b.lines] == 3 * [{once["best_bits_per_byte"]}]
    assert b.lines[-1].get_markerfacecolor() == "white"  # one seed shows no clear difference
    assert all(x > 2 for line in a.lines for x in line.get_xdata())


def test_a_run_that_repeats_settings_and_seed_is_skipped_with_a_note(folder, capsys):
    for name, loss in (("a-1", 2.0), ("a-2", 1.0), ("a-3", 1.5)):
        make_run(f"out/group/{name}", loss, seed=7)
    runs = [f"out/group/a-{i}" for i in (1, 2, 3)]
    compare.main([*runs, "--group=True", "--json=-", "--picture=None"])
    out, errors = capsys.readouterr()
    note = "note: out/group/a-{} has the settings and the seed of out/group/a-1; skipped\n"
    assert errors == note.format(2) + note.format(3)
    assert [(row["seeds"], row["best_val_loss"]) for row in json.loads(out)] == [(1, 2.0)]


def test_different_validation_text_is_noted_for_the_group_that_has_it(folder, capsys):
    runs = [*make_seeds("out/a/x", 2.0), *make_seeds("out/a/y", 2.0, n_head=1)]
    runs += [
        *make_seeds("out/b/x", 2.0, dataset="other"),
        *make_seeds("out/b/y", 2.0, eval_iters=3),
    ]
    compare.main([*runs, "--group=True", "--picture=None"])
    notes = "note: the runs of b differ in dataset and eval_iters; losses compare only on the same validation text\n"
    assert "".join(sorted(capsys.readouterr().err.splitlines(keepends=True))) == notes


def test_data_of_groups_are_the_same_in_csv_and_json(folder, capsys):
    runs = [
        *make_seeds("out/a/x", 2.0, 2.1),
        *make_seeds("out/a/y", 1.9, n_embd=64),
        *make_seeds("out/b/z", 2.0, n_head=1),
    ]
    run(capsys, *runs, "--group=True", "--csv=t.csv", "--json=t.json")
    from_json, from_csv = (
        json.loads(Path("t.json").read_text()),
        list(csv.DictReader(io.StringIO(Path("t.csv").read_text()))),
    )
    assert [
        {key: "" if value is None else str(value) for key, value in row.items()}
        for row in from_json
    ] == from_csv
    assert {type(row["parameters"]) for row in from_json} == {int}
    assert [row["n_embd"] for row in from_json] == [128, 64, 128]


# --------------------------------------------------------------------------------------
# The table as data, and the picture


def test_csv_and_json_hold_the_numbers_of_the_table_and_all_that_differs(folder, capsys):
    make_run("out/a", 2.123456789)
    make_run("out/b", 1.987654321, 1.9, n_head=1, dataset="has,comma")
    table = run(capsys, "out/a", "out/b", "--csv=out/t.csv", "--json=out/t.json")
    from_json = json.loads(Path("out/t.json").read_text())
    from_csv = list(csv.DictReader(io.StringIO(Path("out/t.csv").read_text())))
    assert [
        {key: "" if value is None else str(value) for key, value in row.items()}
        for row in from_json
    ] == from_csv
    for row in from_json:
        shown = row_of(table, row["run"]).split()
        assert shown[1] == f"{row['parameters']:,}"
        assert float(shown[2]) == row["seconds"] and shown[3] == f"{row['tokens_per_second']:,.0f}"
        assert shown[4:6] == [f"{row['best_val_loss']:.4f}", str(row["best_iter"])]
        assert shown[6] == f"{row['best_bits_per_byte']:.3f}"
    assert from_json[0]["best_val_loss"] == 2.123456789
    assert [(row["n_head"], row["dataset"]) for row in from_json] == [
        (4, "shakespeare_char"),
        (1, "has,comma"),
    ]


@pytest.mark.parametrize("form", ["csv", "json"])
def test_on_stdout_data_stands_alone(folder, capsys, form):
    make_run("out/a", 2.0)
    make_run("out/new")
    compare.main(["out/a", "out/new", "nowhere", f"--{form}=-"])
    out, errors = capsys.readouterr()
    rows = json.loads(out) if form == "json" else list(csv.DictReader(io.StringIO(out)))
    assert [row["run"] for row in rows] == ["a", "new"]
    assert rows[1]["best_val_loss"] == (None if form == "json" else "")
    assert "nowhere is not a run" in errors and "out/compare.png written" in errors


def test_the_picture_is_a_png_and_what_was_written_is_not_taken_for_a_run(folder, capsys):
    make_run("out/a", 2.0, 1.9)
    for _ in range(2):
        compare.main([*sorted(map(str, Path("out").iterdir())), "--json=out/table.json"])
        assert capsys.readouterr().err == "out/table.json written\nout/compare.png written\n"
    assert Path("out/compare.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written_leaves_the_old_one(folder, fails, monkeypatch):
    make_run("out/a", 2.0)
    Path("pictures").mkdir()
    Path("pictures/x.png").write_text("old")

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "cannot write pictures/x.png: No space left" in fails(
        compare.main, "out/a", "--picture=pictures/x.png"
    )
    assert [path.name for path in Path("pictures").iterdir()] == ["x.png"]
    assert Path("pictures/x.png").read_text() == "old"


@pytest.fixture
def draw(monkeypatch):
    """Run compare.py and return the panels of its picture."""
    import matplotlib.pyplot as plt

    def run(*argv: str) -> list:
        with monkeypatch.context() as patch:
            patch.setattr(plt, "close", lambda figure: None)
            compare.main([*argv, "--picture=x.png"])
        return plt.gcf().axes

    yield run
    plt.close("all")


@pytest.mark.parametrize("count", [1, 2, 5, 13, 20])
def test_each_run_has_one_look_of_its_own_in_both_panels(folder, draw, count):
    left, right = draw(*(str(make_run(f"out/{i:02}", 2.5, 2 - i / 100)) for i in range(count)))
    colors = [line.get_color() for line in left.lines]
    assert colors == [compare.COLORS[i % 10] for i in range(count)]
    assert len({(line.get_color(), line.get_linestyle()) for line in left.lines}) == count
    bars = [bar.get_facecolor() for bar in right.patches]
    assert bars == [pytest.approx(to_rgba(color)) for color in colors]
    assert [label.get_text() for label in right.get_yticklabels()] == [
        f"{i:02}" for i in range(count)
    ]
    assert [text.get_fontweight() for text in right.texts] == ["normal"] * (count - 1) + ["bold"]


@pytest.mark.parametrize("count", [1, 2, 7, 45])
def test_the_first_point_of_a_curve_is_in_the_axes_and_has_a_mark(folder, draw, count):
    make_run("out/a", *(1 + 4 / it for it in range(1, count + 1)))
    make_run("out/b", *(1 + 8 / it for it in range(1, count + 1)))
    left, right = draw("out/a", "out/b")
    left.figure.savefig(io.BytesIO())
    for line in left.lines:
        assert len(line.get_xydata()) == count and isinstance(
            line.get_markevery(), int
        )  # the first is one of them
        for point in line.get_xydata():
            assert left.bbox.contains(*left.transData.transform(point))
    for text, bar in zip(right.texts, right.patches, strict=True):
        assert text.get_window_extent().x0 >= bar.get_window_extent().x1


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 11])
def test_groups_have_a_panel_each_named_without_its_number_and_the_first_row_is_grey_in_all(
    folder, draw, count
):
    runs = []
    for i in range(count):
        runs += make_seeds(f"out/{i:02}_idea_{i}/1-without", 2.0, 2.1, n_head=1)
        runs += make_seeds(f"out/{i:02}_idea_{i}/2-with", 1.5, 1.6)
        runs += make_seeds(f"out/{i:02}_idea_{i}/3-again", 2.05, 2.2, n_head=2)
    panels = draw(*runs, "--group=True")
    assert [panel.get_title(loc="left") for panel in panels] == [f"idea {i}" for i in range(count)]
    assert len({panel.get_position().bounds for panel in panels}) == count
    for panel in panels:
        assert [label.get_text() for label in panel.get_yticklabels()] == [
            "without",
            "with",
            "again",
        ]
        bits = [value / math.log(2) for value in (2.05, 1.55, 2.125)]
        labels = [f"{bits[0]:.3f}", *(f"{value:.3f}  {value - bits[0]:+.3f}" for value in bits[1:])]
        assert [text.get_text() for text in panel.texts] == labels
        assert [text.get_fontweight() for text in panel.texts] == ["normal", "bold", "normal"]
        bars, ranges, dots = (panel.lines[i::3] for i in range(3))
        assert [line.get_color() for line in dots] == [compare.GREY, compare.BLUE, compare.BLUE]
        assert [line.get_markerfacecolor() for line in dots] == [
            compare.GREY,
            compare.BLUE,
            "white",
        ]  # within seeds
        assert [list(line.get_xdata()) for line in bars] == [
            pytest.approx([bits[0], value]) for value in bits
        ]
        assert [value * math.log(2) for value in ranges[1].get_xdata()] == pytest.approx([1.5, 1.6])
        assert panel.get_ylim() == (2.5, -0.5)  # the first row is on top


def test_a_small_difference_looks_small(folder, draw):
    runs = [
        *make_seeds("out/group/1-without", 2.0, 2.001),
        *make_seeds("out/group/2-with", 1.999, 2.0, n_head=1),
    ]
    (panel,) = draw(*runs, "--group=True")
    low, high = panel.get_xlim()
    assert high - low > 0.1 and low < 1.999 / math.log(2) < 2.001 / math.log(2) < high


def to_rgba(color: str) -> tuple[float, ...]:
    return (*(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)), 1.0)


def test_real_runs_are_compared(run_train, capsys):
    run_train("--out_dir=out/run")
    model = checkpoint.load(Path("out/run/best.pt"))["model"]
    first = json.loads(Path("out/run/config.json").read_text())
    run_train("--position=rotary")  # the first run is in previous-1 now
    out = run(capsys, "out/run/previous-1", "out/run", "--json=-")
    old, new = json.loads(out)
    assert (old["position"], new["position"]) == (first["position"], "rotary")
    assert old["state"] == new["state"] == "done" and old["iter"] == 6
    assert old["parameters"] == sum(
        {value.data_ptr(): value.numel() for value in model.values()}.values()
    )
    best = checkpoint.load(Path("out/run/best.pt"))["progress"]
    assert (new["best_val_loss"], new["best_iter"]) == (best["best_val_loss"], best["iter"])
    assert not re.search(r"out_dir|seed", out)
