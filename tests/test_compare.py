"""compare.py: the table, the groups and the picture of runs, finished or not, or damaged."""

import json
import math
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from humptygpt.model import ModelConfig

import compare
from humptygpt.cli import UserError
from humptygpt.formats import checkpoint
from humptygpt.training.settings import TrainConfig

SHAPE = ModelConfig(n_head=4, block_size=64, vocab_size=65)
DEFAULTS = asdict(TrainConfig(max_iters=200)) | asdict(SHAPE)
DEFAULTS |= {"_parameters": 804_096, "_model.py": "89abcdef"}


def make_run(
    folder: str,
    *losses: float,
    every: int = 100,
    bytes_per_token: float = 1.0,
    bleu: float | None = None,
    text: str = "0123abcd",
    whole: float | None = None,
    end: str | None = None,
    pace: float = 1.0,
    **settings,
) -> str:
    """Make a run's folder with an evaluation for each loss, after each `every` steps (10 tokens, 1 s).

    text: the checksum of the evaluated text. whole: the loss on the whole split. pace: how far each step brings a run.
    """
    path = Path(folder)
    path.mkdir(parents=True)
    settings = DEFAULTS | {"out_dir": folder} | settings
    (path / "config.json").write_text(json.dumps(settings))
    rows = []
    clock = {"iter": 0, "tokens": 0, "seconds": 0.0, "position": 0.0}
    for iters, loss in zip(range(every, 10**6, every), losses, strict=False):
        clock = {"iter": iters, "tokens": iters * 10, "seconds": float(iters)}
        clock["position"] = iters * pace
        bits = loss / math.log(2) / bytes_per_token
        row = {"val_loss": loss, "val_bits_per_byte": bits}
        row |= {"val_tokens": 1000, "val_text": text}
        train = {"kind": "train", "train_loss": loss, "lr": 1e-3}
        rows += [clock | train, clock | row | {"kind": "eval"}]
    if end or clock["position"] >= settings["max_iters"]:
        rows.append(clock | {"kind": "end", "end": end or "done"})
    if whole is not None:
        row = {"val_loss": whole, "val_bits_per_byte": whole / math.log(2)}
        row |= {"val_tokens": 5000, "val_text": "whole", "best_iter": every}
        rows.append(clock | row | {"kind": "whole"})
    if bleu is not None:
        rows.append(clock | {"kind": "test", "test_bleu": bleu, "test_chrf": 2 * bleu})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_seeds(path: str, *losses: float, **settings) -> list[str]:
    """The folders of a finished run for each lowest loss, with seeds from 1; {} in the path is the seed."""
    return [make_run(path.format(seed), 3.0, loss, seed=seed, **settings) for seed, loss in enumerate(losses, 1)]


@pytest.fixture
def run(capsys):
    """Run compare.py without a picture, and return what it prints to stdout and to stderr."""

    def run(*argv: str) -> tuple[str, str]:
        capsys.readouterr()
        compare.main(["--picture=None", *argv])
        return capsys.readouterr()

    return run


@pytest.fixture
def data(run):
    return lambda *argv: json.loads(run(*argv, "--json=True")[0])


def row_of(table: str, name: str) -> str:
    (line,) = [line for line in table.splitlines() if line.startswith(f"{name} ")]
    return line


# --------------------------------------------------------------------------------------
# The table


def test_a_row_shows_name_size_time_speed_the_lowest_loss_and_state(run):
    make_run("out/a", 2.5, 2.0, 2.2, max_iters=300)
    bits = 2 / math.log(2)
    row = f"a 804,096 300.0 10 2.0000 200 {bits:.3f} best done"
    assert row_of(run("out/a")[0], "a").split() == row.split()


def test_settings_that_differ_are_shown_but_for_those_that_do_not_matter(run):
    make_run("out/a", 2.0)
    make_run("out/b", 2.0, position="none", n_head=1)
    make_run("out/c", 2.0, wandb_run_name="x", log_interval=7)
    table, _ = run("out/a", "out/b", "out/c")
    assert row_of(table, "a").endswith("  n_head=4 position=learned")
    assert "difference" not in table  # only groups have a first row to compare with
    assert row_of(table, "b").endswith("  n_head=1 position=none")


def test_rows_come_in_the_order_given_and_only_for_what_is_given(run):
    for name in ("out/b", "out/a", "out/a/again", "elsewhere/c"):
        make_run(name, 2.0)
    for argv, names in {
        ("out/b", "out/a"): ["b", "a"],
        ("out/a/", "out/a/again"): ["a", "a/again"],
        ("out/a", "elsewhere/c"): ["out/a", "elsewhere/c"],
    }.items():
        assert [line.split()[0] for line in run(*argv)[0].splitlines()[1:]] == names


def test_runs_with_different_tokens_are_compared_by_bits_per_byte(run, draw):
    make_run("out/char", 1.5, 1.4)
    make_run("out/bpe", 4.0, 3.9, bytes_per_token=4.0, dataset="mine_bpe", vocab_size=1000)
    table, errors = run("out/char", "out/bpe")
    assert " best " in row_of(table, "bpe") and " best " not in row_of(table, "char")
    assert errors == ""
    panel = draw("out/bpe")[0]
    read, bits = panel.lines[0].get_data()
    assert read[:2] == pytest.approx([4000, 8000])
    assert bits[:2] == pytest.approx([4 / 4 / math.log(2), 3.9 / 4 / math.log(2)])


def test_of_runs_that_were_evaluated_on_different_texts_none_is_the_best(run):
    make_run("out/a", 2.0, whole=1.95)
    # equally many tokens, as if the data was prepared again
    make_run("out/b", 1.9, text="4567cdef")
    make_run("out/new")
    table, errors = run("out/a", "out/b", "out/new")
    assert " best" not in table and row_of(table, "a").split()[4] == "1.9500"
    problem = "were evaluated on different texts, so none is marked as the best"
    assert errors == f"note: the runs {problem}\n"


def test_the_whole_split_counts_if_all_runs_were_evaluated_on_it(run):
    make_run("out/a", 2.0, 1.9, text="a", whole=1.95)
    make_run("out/b", 1.8, 2.1, text="b", whole=2.05)
    table, errors = run("out/a", "out/b")
    assert errors == "" and " best " in row_of(table, "a")
    assert row_of(table, "b").split()[4:6] == ["2.0500", "100"]
    # one that still runs was evaluated on the sample only
    make_run("out/c", 1.7, text="b")
    table, _ = run("out/b", "out/c")
    assert [row_of(table, name).split()[4] for name in "bc"] == ["1.8000", "1.7000"]
    assert " best " in row_of(table, "c")


def test_only_evaluations_on_the_text_of_the_last_one_count(run):
    path = Path(make_run("out/a", 1.0, text="before"), "metrics.jsonl")
    first = path.read_text()
    second = Path(make_run("out/b", 2.0), path.name).read_text()
    for metrics, loss in ((first + second, "2.0000"), (first + second + first, "1.0000")):
        path.write_text(metrics)
        assert row_of(run("out/a")[0], "a").split()[4] == loss


def test_the_loss_before_the_first_step_is_not_the_run_s(run):
    path = Path(make_run("out/a", 2.7), "metrics.jsonl")
    row = json.loads(path.read_text().splitlines()[1]) | {"iter": 0, "val_loss": 0.7}
    path.write_text(json.dumps(row) + "\n" + path.read_text())
    assert row_of(run("out/a")[0], "a").split()[4:6] == ["2.7000", "100"]


def test_runs_with_the_same_settings_and_other_code_are_told_apart(run, data):
    make_run("out/idea-1", 2.0)
    make_run("out/idea-2", 2.0, **{"_model.py": "00000000"})
    assert row_of(run("out/idea-1", "out/idea-2")[0], "idea-1").endswith("=89abcdef")
    assert len(data("out/idea-1", "out/idea-2", "--group=True")) == 2


def test_a_run_with_settings_of_another_version_is_listed(run):
    make_run("out/a", 2.0)
    make_run("out/newer", 1.9, n_experts=8, position="quantum")
    table, _ = run("out/a", "out/newer")
    assert row_of(table, "newer").endswith("  n_experts=8 position=quantum")
    assert row_of(table, "a").endswith("  n_experts=None position=learned")


# --------------------------------------------------------------------------------------
# Runs in progress, and folders that are not runs


@pytest.mark.parametrize(
    ("losses", "settings", "state"),
    [
        ([2.0, 1.9], {}, "done"),
        ([2.0, 1.9], {"max_iters": 900, "end": "stopped"}, "at 22 %"),
        ([], {}, "at 0 %"),
        # by early stopping, and by --minutes: faster and slower than was planned
        ([2.0, 1.9], {"max_iters": 900, "end": "done"}, "done"),
        ([2.0, 1.9], {"max_iters": 900, "pace": 4}, "at 88 %"),
        ([2.0, 1.9], {"max_iters": 100, "pace": 0.4}, "at 80 %"),
    ],
)
def test_a_row_shows_how_far_its_run_is(run, losses, settings, state):
    make_run("out/a", *losses, **settings)
    assert row_of(run("out/a")[0], "a").endswith(f"  {state}")


DAMAGED = ["[" * 100_000, "\x00\xff", '{"iter": 150}']
TIMES = '{"iter": 150, "tokens": 9, "seconds": 9, "kind": '
DAMAGED += [TIMES + f'"eval", "{key}": {{}}}}' for key in ("val_loss", "val_text", "best_iter")]
DAMAGED.append(TIMES + '"other"}')


@pytest.mark.parametrize("row", DAMAGED, ids=lambda row: row[:40])
def test_damaged_rows_are_skipped_with_a_note(run, row):
    path = Path(make_run("out/a", 2.0, 1.9, 1.95, max_iters=300), "metrics.jsonl")
    expected = run("out/a")[0]
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], row, *lines[3:], ""]))
    table, errors = run("out/a")
    assert table == expected
    assert errors.startswith(f"note: {path}:4: skipped a damaged row: ")
    assert errors.count("\n") == 1


def test_a_row_without_a_loss_is_no_evaluation_and_damage_that_is_not_shown_does_not_matter(
    run,
):
    path = Path(make_run("out/a", 2.0, 1.9), "metrics.jsonl")
    expected = run("out/a")[0]
    rows = path.read_text().replace('"val_tokens": 1000', '"val_tokens": "many"')
    path.write_text(TIMES + '"eval", "val_bits_per_byte": 1.0}\n' + rows)
    assert run("out/a", "--picture=out/x.png") == (expected, "out/x.png written\n")


def test_a_last_line_that_is_being_written_is_skipped_without_a_note(run):
    with Path(make_run("out/a", 2.0, 1.9), "metrics.jsonl").open("a") as file:
        file.write('{"iter": 3')
    table, errors = run("out/a")
    assert row_of(table, "a").split()[4:6] == ["1.9000", "200"] and errors == ""


def test_a_run_that_has_not_been_evaluated_shows_dashes_and_is_drawn_without_a_curve(run):
    make_run("out/new")
    for runs in (["out/new"], [make_run("out/a", 2.0), "out/new"]):
        table, _ = run(*runs, "--picture=out/compare.png")
    assert row_of(table, "new").split()[2:7] == ["0.0", "—", "—", "—", "—"]


BROKEN = {
    '{"max_iters": 2': "Expecting ',' delimiter: line 1 column 16 (char 15)",
    '{"hidden_size": 768}': "max_iters is missing",
}


@pytest.mark.parametrize("config", BROKEN)
def test_a_folder_that_is_no_run_is_one_note_and_the_rest_is_compared(run, config):
    make_run("out/good", 2.0)
    Path(make_run("out/bad", 2.0), "config.json").write_text(config)
    table, errors = run("out/good", "out/bad", "out")
    bad, missing = errors.splitlines()
    assert bad == f"note: skipped out/bad, which is not a run: {BROKEN[config]}"
    assert missing.startswith("note: skipped out, which is not a run: [Errno 2] No such file")
    assert row_of(table, "good") and "bad" not in table


def test_control_characters_of_a_stranger_s_config_are_not_printed(run):
    make_run("out/a", 2.0)
    make_run("out/b", 2.0, dataset="\x1b[2J\ud800", **{"\n": 1})
    table, _ = run("out/a", "out/b")
    assert len(table.splitlines()) == 3 and table.replace("\n", "").isprintable()


def test_bad_arguments_are_one_line(fails):
    Path("d.png").mkdir()
    make_run("out/a", 2.0)
    for argv, complaint in {
        "": "no runs to compare; try: python compare.py out/*",
        "out/a --picture=x.gif": "picture=x.gif must end in .png, .svg or .pdf",
        "out/a --picture=d.png": "cannot write d.png: it is not a regular file; choose another path",
    }.items():
        assert complaint in fails(compare.main, *argv.split())


def test_runs_are_compared_without_loading_torch():
    make_run("out/a", 2.0)
    code = "import sys, compare; compare.main(sys.argv[1:]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(Path("out/a").resolve()), "--picture=None"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("\nFalse\n"), done.stderr


# --------------------------------------------------------------------------------------
# Groups: --group=True


def test_runs_of_a_variant_that_differ_only_in_the_seed_are_one_row_of_means_and_a_range(
    data,
):
    runs = make_seeds("out/heads/one-{}", 2.0, 1.4, 1.5, n_head=1)
    more = {"every": 110, "bleu": 30, "wandb_run_name": "x"}
    runs.append(make_run("out/heads/four-1", 1.9, 1.5, seed=1, **more))
    more = {"every": 100, "bleu": 33, "log_interval": 7}
    runs.append(make_run("out/heads/four-2", 1.9, 1.3, seed=2, **more))
    one, four = data(*runs, "--group=True")
    assert (one["group"], one["run"]) == ("out/heads", "one")
    assert (one["seeds"], one["state"]) == (3, "3 done")
    assert one["best_val_loss"] == pytest.approx(4.9 / 3)
    assert one["best_bits_per_byte"] == pytest.approx(4.9 / 3 / math.log(2))
    assert (one["seconds"], four["seconds"], four["test_bleu"]) == (200, 210, 31.5)
    assert (one["n_head"], four["n_head"], "seed" in one) == (1, 4, False)
    pairs = [1.5 - 2.0, 1.3 - 1.4]  # of seeds 1 and 2, in nats
    assert four["difference"] == pytest.approx(statistics.mean(pairs) / math.log(2))
    expected = statistics.stdev(pairs) / 2**0.5 / math.log(2)
    assert four["difference_error"] == pytest.approx(expected)
    t = abs(four["difference"]) / expected
    # the formula for two pairs
    assert four["p"] == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-4)
    assert one["comparable"] is four["comparable"] is True


@pytest.mark.parametrize("sweep", [["--group=True"], ["--x=n_layer"]])
def test_runs_that_started_from_different_models_do_not_share_a_row(data, sweep):
    runs = make_seeds("out/idea/with-{}", 1.0, 1.2, init_from="out/a")
    runs += make_seeds("out/idea/with/{}", 2.0, 2.2, init_from="out/b")
    rows = data(*runs, *sweep)
    assert [(row["init_from"], row["seeds"]) for row in rows] == [
        ("out/a", 2),
        ("out/b", 2),
    ]
    assert [row["best_val_loss"] for row in rows] == pytest.approx([1.1, 2.1])


# (pairs, t): beyond it lie 5 % of Student's distribution, from any printed table
FIVE_PERCENT = [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (10, 2.262), (31, 2.042)]


@pytest.mark.parametrize(("pairs", "t"), FIVE_PERCENT)
def test_p_is_that_of_student_s_t_for_the_number_of_pairs(pairs, t):
    errors = [(-1.0) ** i for i in range(pairs // 2 * 2)] + [0.0] * (pairs % 2)
    error = statistics.stdev(errors) / pairs**0.5
    for sign in (1, -1):
        tested = compare.t_test([sign * t * error + each for each in errors])
        assert tested["difference_error"] == pytest.approx(error)
        assert tested["p"] == pytest.approx(0.05, abs=1e-4)
    assert compare.t_test([0.0] * pairs)["p"] == 1
    assert compare.t_test([0.1] * pairs)["p"] == pytest.approx(0, abs=1e-9)


LAYOUTS = {
    "out/idea/{variant}-{seed}": "with",
    "out/idea/{variant}/seed{seed}": "with",
    "out/idea/{variant}_0.1-{seed}": "with_0.1",
    "out/idea/{variant}4-{seed}": "with4",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_layouts_of_folders_are_recognised_and_the_first_row_is_the_baseline(data, layout):
    mine, theirs = (layout.format(variant=variant, seed="{}") for variant in ("with", "without"))
    # both variants have the same settings
    mine, theirs = make_seeds(mine, 1.5, 1.6), make_seeds(theirs, 2.0, 2.1)
    first, second = data(*mine, *theirs, "--group=True")
    assert (first["group"], first["run"]) == ("out/idea", LAYOUTS[layout])
    assert first["seeds"] == second["seeds"] == 2
    assert first["difference"] is None and second["difference"] > 0
    baseline = second["run"]
    first, second = data(*theirs, *mine, "--group=True")
    assert [first["run"], second["run"]] == [baseline, LAYOUTS[layout]]
    assert second["difference"] == pytest.approx(-0.5 / math.log(2))


def test_runs_whose_settings_differ_are_not_merged_whatever_their_names(data):
    runs = [make_run(f"out/idea/heads-{n}", 2.0, n_head=n) for n in (1, 2, 4)]
    rows = data(*runs, "--group=True")
    assert [row["run"] for row in rows] == ["heads-1", "heads-2", "heads-4"]


def test_rows_are_compared_with_the_first_of_their_group_and_each_group_has_a_best(run, data):
    expected = {  # bits per byte; the difference and the remark in its row
        "out/a/first": (2.0, None, ""),
        "out/b/first": (4.0, None, "best"),
        "out/a/worse": (2.25, pytest.approx(0.25), ""),
        "out/a/better": (1.5, pytest.approx(-0.5), "best"),
        "out/b/worse": (4.5, pytest.approx(0.5), ""),
    }
    runs = [make_run(path, math.log(2) * row[0]) for path, row in expected.items()]
    for row in data(*runs, "--group=True"):
        assert (row["difference"], row["remark"]) == expected[row["folder"]][1:]
    table, _ = run(*runs, "--group=True")
    titles = [line for line in table.splitlines() if line in ("out/a", "out/b")]
    assert titles == ["out/a", "out/b"]
    assert "-0.500  best" in row_of(table, "better")


def test_a_run_without_an_evaluation_counts_in_no_mean_and_a_group_may_have_none(data):
    runs = [make_run("out/a/new-1", n_head=1, seed=1)]
    runs += make_seeds("out/a/old-{}", 2.0, 1.9)
    runs.append(make_run("out/a/old-3", seed=3))
    new, old = data(*runs, "--group=True")
    assert (new["seeds"], new["best_val_loss"], old["difference"]) == (0, None, None)
    assert (old["seeds"], old["best_val_loss"]) == (2, pytest.approx(1.95))
    assert old["state"] == "2 done, 1 at 0 %"


# --------------------------------------------------------------------------------------
# The table as data, and the picture


def test_json_holds_the_numbers_in_full_and_all_that_differs(run):
    make_run("out/a", 2.123456789)
    make_run("out/b", 1.987654321, 1.9, n_head=1, dataset="has,comma")
    table, _ = run("out/a", "out/b")
    rows = json.loads(run("out/a", "out/b", "--json=True")[0])
    for row in rows:
        shown = row_of(table, row["run"]).split()
        assert shown[1:3] == [f"{row['parameters']:,}", f"{row['seconds']:,.1f}"]
        assert shown[4:6] == [f"{row['best_val_loss']:.4f}", str(row["best_iter"])]
        assert shown[6] == f"{row['best_bits_per_byte']:.3f}"
    assert rows[0]["best_val_loss"] == 2.123456789
    differing = [(row["n_head"], row["dataset"]) for row in rows]
    assert differing == [(4, "shakespeare_char"), (1, "has,comma")]


@pytest.mark.parametrize("kind, mark", [("png", b"\x89PNG"), ("svg", b"<svg"), ("pdf", b"%PDF")])
def test_the_picture_has_its_format_and_files_are_not_taken_for_runs(run, kind, mark):
    make_run("out/a", 2.0, 1.9)
    for earlier in ("", ", in place of an earlier one"):
        runs = sorted(map(str, Path("out").iterdir()))
        out, errors = run(*runs, "--json=True", f"--picture=out/x.{kind}")
        assert errors == f"out/x.{kind} written{earlier}\n" and len(json.loads(out)) == 1
    assert mark in Path(f"out/x.{kind}").read_bytes()


@pytest.fixture
def draw(saved_figures):
    """Run compare.py and return the panels of its picture."""

    def run(*argv: str) -> list:
        compare.main([*argv, "--picture=x.png"])
        return saved_figures[-1].axes

    return run


def texts_of(panel) -> list[str]:
    return [text.get_text() for text in panel.get_legend().get_texts()]


@pytest.mark.parametrize("count", [1, 20])
def test_each_run_has_one_look_of_its_own_within_the_axes(draw, count):
    losses = [1 + 8 / step for step in range(1, 10)]
    (panel,) = draw(*(make_run(f"out/{i:02}", *losses, 2 - i / 100) for i in range(count)))
    looks = {(line.get_color(), line.get_linestyle()) for line in panel.lines}
    assert len(looks) == count
    assert texts_of(panel) == [f"{i:02}  {min(2 - i / 100, 1 + 8 / 9) / math.log(2):.3f}" for i in range(count)]
    for line in panel.lines:
        points = line.get_xydata()[:-1]
        assert len(points) == 10
        for point in points:
            assert panel.bbox.contains(*panel.transData.transform(point))


def test_groups_have_a_panel_each_in_which_the_seeds_of_a_row_are_one_line(draw):
    runs = []
    for group in "ab":
        runs += make_seeds(f"out/{group}/without-{{}}", 2.0, 2.1, n_head=1)
        runs += make_seeds(f"out/{group}/with-{{}}", 1.5)
    panels = draw(*runs, "--group=True")
    assert [panel.get_title() for panel in panels] == ["out/a", "out/b"]
    mean, best = (value / math.log(2) for value in (2.05, 1.5))
    for panel in panels:
        names = [f"without  {mean:.3f}", f"with-1  {best:.3f}"]
        assert texts_of(panel) == names
        bits = panel.lines[0].get_ydata() * math.log(2)
        seeds = [3.0, 2.0, math.nan, 3.0, 2.1, math.nan]
        assert list(bits) == pytest.approx(seeds, nan_ok=True)


def test_plot_draws_another_number_at_the_text_read_with_its_last_value_in_the_legend(draw):
    make_run("out/bpe", 4.0, 3.5, bytes_per_token=4.0)
    make_run("out/new")
    with Path("out/bpe/metrics.jsonl").open("a") as file:
        # one that a user's code logs, and one that the machine could not measure
        file.write(TIMES + '"train", "train_loss": 3.25, "entropy": -0.5, "grad_norm": null}\n')
    (panel,) = draw("out/bpe", "out/new", "--plot=train_loss")
    assert texts_of(panel) == ["bpe  3.250", "new"] and panel.get_ylabel() == "train_loss"
    # 10 tokens a step, of 4 bytes each; the last row says 9 tokens
    expected = [[4000, 4.0], [8000, 3.5], [36, 3.25]]
    assert panel.lines[0].get_xydata()[:-1] == pytest.approx(np.array(expected))
    assert panel.get_yscale() == "log"
    (panel,) = draw("out/bpe", "--plot=entropy")
    assert texts_of(panel) == ["bpe  -0.5000"] and panel.get_yscale() == "linear"


def make_sweep(folder: str = "out/sweep", **settings) -> list[str]:
    """Two seeds of two rates of two widths: 4 and 6 bits per byte, and 2 more each for the second rate and width."""
    runs = []
    for wide, width in enumerate((100, 20)):
        for fast, rate in enumerate((0.01, 0.001)):
            low = 4.0 + 2 * wide + 2 * fast
            for seed, bits in enumerate((low, low + 2), 1):
                chosen = {"n_embd": width, "learning_rate": rate, "seed": seed} | settings
                # folders in which no seed can be recognised
                name = f"{folder}/{width}_{rate}_s{seed}x"
                runs.append(make_run(name, 7.0, bits * math.log(2), **chosen))
    return runs


def lines_of(panel) -> dict[str, tuple]:
    """{label: x, y and half the length of the bar at each point}."""
    found = {}
    for bars in panel.containers:
        line, _, (errors,) = bars.lines
        spans = [segment[:, 1] for segment in errors.get_segments()]
        halves = [(high - low) / 2 for low, high in spans]
        found[bars.get_label()] = (*map(list, line.get_data()), halves)
    return found


def test_a_sweep_is_a_line_for_each_value_whose_points_are_means_over_seeds_with_their_error(draw, data):
    runs = make_sweep()
    sweep = ["--x=learning_rate", "--lines=n_embd"]
    (panel,) = draw(*runs, *sweep)
    rates, errors = [0.001, 0.01], pytest.approx([1.0, 1.0])  # sqrt(2) / sqrt(2)
    assert lines_of(panel) == {
        "n_embd=20": (rates, pytest.approx([9.0, 7.0]), errors),
        "n_embd=100": (rates, pytest.approx([7.0, 5.0]), errors),
    }
    assert list(lines_of(panel)) == texts_of(panel) == ["n_embd=20", "n_embd=100"]
    assert panel.get_xscale() == "log" and panel.get_xlabel() == "learning_rate"
    assert list(panel.get_xticks()) == pytest.approx(rates)
    rows = data(*runs, *sweep)[:4]
    assert [row["group"] for row in rows] == ["n_embd=20"] * 2 + ["n_embd=100"] * 2
    assert [(row["seeds"], row["state"]) for row in rows] == [(2, "2 done")] * 4


def make_lines(best: int) -> list[str]:
    """Three seeds of AdamW and Lion at three rates. AdamW is best at the second, Lion at number `best`.

    Each at its best, Lion is 0.3 better, give or take 0.1.
    """
    runs = []
    for name, at, gain in (("adamw", 1, 0.0), ("lion", best, 0.3)):
        for number, rate in enumerate((0.001, 0.002, 0.004)):
            for seed, chance in enumerate((-0.1, 0.0, 0.1), 1):
                bits = 4 + 0.2 * abs(number - at) - gain + chance * (name == "lion")
                chosen = {"optimizer": name, "learning_rate": rate, "seed": seed}
                path = f"out/{name}-{rate}-{seed}"
                runs.append(make_run(path, bits * math.log(2), **chosen))
    return runs


def test_lines_are_compared_at_each_x_and_each_at_its_best(data, run):
    runs = make_lines(best=1)
    sweep = ["--x=learning_rate", "--lines=optimizer"]
    *rows, first, other = data(*runs, *sweep)
    error = 0.1 / 3**0.5
    for row in rows[:3]:
        assert row["difference"] is row["p"] is None
    for row in (*rows[3:], other):
        assert row["difference"] == pytest.approx(-0.3)
        assert row["difference_error"] == pytest.approx(error)
        assert row["p"] == rows[3]["p"] < 0.05
    assert first["run"] == "optimizer=adamw: learning_rate=0.002"
    assert first["difference"] is None
    assert other["run"] == "optimizer=lion: learning_rate=0.002"
    assert "edge" not in run(*runs, *sweep)[1]


def test_each_line_counts_at_its_own_best_and_one_at_the_edge_is_noted(data, run):
    runs = make_lines(best=2)
    sweep = ["--x=learning_rate", "--lines=optimizer"]
    *rows, _, other = data(*runs, *sweep)
    at_each = [row["difference"] for row in rows[3:]]
    assert at_each == pytest.approx([-0.1, 0.1 - 0.2, -0.5])
    assert other["difference"] == pytest.approx(-0.3)
    note = "note: optimizer=lion: learning_rate=0.004 is the best, but at the edge of what was tried; try more"
    assert run(*runs, *sweep)[1].count(note) == 1
    assert "edge" not in run(*runs, "--x=seconds")[1]


def test_a_point_of_one_seed_has_no_bar_and_nearby_values_are_on_a_linear_axis(draw):
    runs = [make_run(f"out/{n}", math.log(2) * n, n_layer=n, seed=n) for n in (3, 2, 4)]
    (panel,) = draw(*runs, "--x=n_layer")
    points = [2, 3, 4], pytest.approx([2.0, 3.0, 4.0]), [0, 0, 0]
    assert lines_of(panel) == {"all runs": points}
    assert panel.get_xscale() == panel.get_yscale() == "linear"


def test_each_of_a_few_values_has_a_tick_but_not_each_of_many(draw):
    runs = [make_run(f"out/{n}", 2.0, batch_size=n) for n in (*range(10, 28, 2), 99, 101)]
    for count, ticks in ((10, {*range(10, 28, 2), 99}), (11, {10, 100})):
        (panel,) = draw(*runs[:count], "--x=batch_size")
        low, high = panel.get_xlim()
        assert {tick for tick in panel.get_xticks() if low <= tick <= high} == ticks


def test_a_sweep_can_show_the_last_value_of_another_number(draw):
    runs = make_sweep()
    (panel,) = draw(*runs, "--x=n_embd", "--lines=learning_rate", "--plot=train_loss")
    points = lines_of(panel)["learning_rate=0.01"]
    assert points[1] == pytest.approx([7 * math.log(2), 5 * math.log(2)])


def test_the_size_of_the_training_text_can_be_the_x_of_a_sweep(draw):
    runs = [
        make_run(f"out/{n}", math.log(2) * bits, _train_tokens=10_000_000 * n, n_layer=n)
        for n, bits in ((1, 5.0), (2, 4.0))
    ]
    (panel,) = draw(*runs, "--x=train_tokens")
    (points,) = lines_of(panel).values()
    assert points[:2] == ([10_000_000, 20_000_000], pytest.approx([5.0, 4.0]))


def test_keys_that_cannot_be_plotted_are_one_line(run):
    runs = make_sweep()
    for key, near in {"plot": "train_los", "x": "parameter", "lines": "n_embed"}.items():
        right = {"plot": "train_loss", "x": "parameters", "lines": "n_embd"}[key]
        with pytest.raises(UserError) as error:
            run(*runs, f"--{key}={near}")
        message = f"unknown key {near}; did you mean {right}? (a key of config.json or metrics.jsonl)"
        assert str(error.value) == message
    for key in ("n_head", "optimizer"):  # a single value, and no number
        with pytest.raises(UserError) as error:
            run(*runs, f"--x={key}", "--picture=x.png")
        message = f"x={key} is not a number with two values, in evaluated runs"
        assert str(error.value) == message
    runs = [make_run("out/a", n_layer=1), make_run("out/b", n_layer=2)]
    with pytest.raises(UserError, match="x=n_layer is not a number with two values"):
        run(*runs, "--x=n_layer", "--picture=x.png")


def test_real_runs_are_compared(run_train, data):
    run_train("--out_dir=out/run")
    model = checkpoint.read(Path("out/run/best.pt"))["model"]
    Path("out/run").rename("out/first")
    run_train("--position=alibi")
    old, new = data("out/first", "out/run")
    assert new["position"] == "alibi" != old["position"]
    assert old["state"] == new["state"] == "done" and old["iter"] == 6
    sizes = {tensor.data_ptr(): tensor.numel() for tensor in model.values()}
    assert old["parameters"] == sum(sizes.values())
    best = checkpoint.read(Path("out/run/best.pt"))["progress"]
    assert (new["best_val_loss"], new["best_iter"]) == (best["best_val_loss"], best["iter"])
    assert not {"out_dir", "seed"} & new.keys()
