"""The examples of docs/variants.md, typed into a copy of the repository, train, resume and write."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from texts import make_text

ROOT = Path(__file__).parent.parent
EXAMPLES = (ROOT / "docs/variants.md").read_text(encoding="utf-8")
# the settings that choose each example; those without a setting are in force in all
CASES = {
    "norm": ["--norm=scale"],
    "linear": ["--attention=linear"],
    "latent": ["--attention=latent"],
    "gated": ["--attention=gated"],
    "exclusive": ["--attention=exclusive"],
    "window": ["--window=4"],
    "lion": ["--optimizer=lion", "--learning_rate=1e-4"],
    "averaged": ["--optimizer=averaged"],
    "schedule": ["--schedule=sqrt", "--warmup_iters=0"],
    "copy": ["--dataset=copy"],
}
# those with a state or a schedule of their own are also stopped and resumed
RESUMED = ["lion", "averaged", "copy"]
SIZES = ["--n_layer=2", "--n_embd=32", "--position=learned", "--block_size=16"]
SIZES += ["--mlp_conv=0", "--device=cpu", "--dtype=float32", "--muon_dtype=float32"]
STEPS = ["--max_iters=10", "--eval_interval=5", "--eval_iters=2", "--log_interval=1"]
# in one process, because each start takes seconds
ALL = """
import json, os, signal, sys
import sample, train
from humptygpt import run as runs

stops = False
draw = runs.draw_losses


def stop(run, before):
    if stops and run.progress.iter == 6:
        os.kill(os.getpid(), signal.SIGINT)
    return 0.0


train.METRICS["stop"] = stop
for name, keys in json.loads(sys.argv[1]).items():
    runs.draw_losses = draw if name == "norm" else lambda rows, path: None
    assert train.main([*keys, f"--out_dir=out/{name}"]) == 0
    if name in sys.argv[2:]:
        stops, out = True, f"--out_dir=out/{name}_stopped"
        assert train.main([*keys, out]) == 128 + signal.SIGINT
        stops = False
        assert train.main(["--init_from=resume", out]) == 0
    which = "average" if name == "averaged" else "latest"
    keys = [f"--checkpoint={which}", "--max_new_tokens=9", "--device=cpu"]
    sample.main([f"--out_dir=out/{name}", *keys])
"""


@pytest.fixture(scope="module")
def edited(tmp_path_factory) -> Path:
    """A copy of the repository with all examples in it, in which each case has been trained."""
    folder = tmp_path_factory.mktemp("edited")
    for name in ("humptygpt", "config"):
        shutil.copytree(ROOT / name, folder / name)
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    for kind, text in re.findall("```(python|diff)\n(.*?)```", EXAMPLES, re.DOTALL):
        first, code = text.split("\n", 1)
        path = folder / first.removeprefix("--- ").removeprefix("# ")
        if path.suffix == ".py" and first[0] in "-#":
            path.write_text(apply(kind, path.read_text(encoding="utf-8"), code))
    (folder / "text.txt").write_text(make_text(4000))
    keys = {name: [*SIZES, *STEPS, *case] for name, case in CASES.items()}
    for name in keys.keys() - {"copy"}:
        keys[name] += ["--input=text.txt", "--dataset=text"]
    done = subprocess.run(
        [sys.executable, "-c", ALL, json.dumps(keys), *RESUMED],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # what the start says if a model does not hold what it should
    for words in ("cannot learn", "computes other", "fails", "sees later", "different"):
        assert words not in done.stderr
    return folder


def apply(kind: str, source: str, example: str) -> str:
    """Put an example at the end of a file, or below METRICS in train.py; a diff where its lines are."""
    if kind == "diff":
        lines = example.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] != "+")
        assert source.count(before) == 1, before
        return source.replace(before, "".join(x[1:] for x in lines if x[0] != "-"))
    if (line := "METRICS = {}\n") in source:
        return source.replace(line, f"{line}\n\n{example}\n\n")
    return f"{source}\n\n{example}"


def rows_of(folder: Path, name: str) -> list[dict]:
    lines = (folder / f"out/{name}/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_every_example_is_one_of_the_cases_or_in_force_in_all():
    """So that a new example is run."""
    named = set(re.findall(r"^[A-Z]+\[\"(\w+)\"\]", EXAMPLES, re.MULTILINE))
    chosen = {key.partition("=")[2] for case in CASES.values() for key in case}
    assert named - chosen == {"update_ratio"}


def losses_of(folder: Path, name: str) -> list[float]:
    keys = ("train_loss", "val_loss")
    return [row[key] for row in rows_of(folder, name) for key in keys if key in row]


@pytest.mark.parametrize("name", CASES)
def test_an_example_learns(edited, name):
    losses = losses_of(edited, name)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", RESUMED)
def test_an_example_with_a_state_or_a_schedule_is_resumed_exactly(edited, name):
    assert losses_of(edited, f"{name}_stopped") == losses_of(edited, name)


def test_each_example_changes_the_losses(edited):
    assert len({losses_of(edited, name)[-1] for name in CASES}) == len(CASES)


def test_terms_and_metrics_are_logged_under_their_names(edited):
    first, *_, last = [row for row in rows_of(edited, "norm") if "train_loss" in row]
    assert 0 < first["update_ratio"] < 1
    assert last["second"] == pytest.approx(first["second"] / 10, rel=0.3)
