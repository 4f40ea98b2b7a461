"""A night of experiments on the demo: one change after another, each tried with three seeds and kept if it helps.

    python benchmarks/night.py                              one line per experiment; about five minutes each on 2 cores
    python benchmarks/night.py --dtype=bfloat16             keys for all runs, as for train.py

An experiment adds one change to the settings kept so far. It is kept if its bits per byte are lower than those of the
best experiment so far, and p, by Student's t for three pairs of runs, is below 0.02: of a hundred changes that do
nothing, one is kept. The decision reads nothing but the last row of each run's metrics and `compare.py --json=True`. At
the end, the whole demo runs with and without what was kept.

Runs are in out/night. A run that has finished is not repeated, so the script may be stopped at any moment and started
again. To try changes of your own, edit CHANGES.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

OUT = Path("out/night")
SEEDS = (1, 2, 3)
STEPS = 800  # a third of the demo
LARGEST_P = 0.02  # of a change that is kept
CHANGES = """
learning_rate=4.5e-3
learning_rate=8e-3
muon_learning_rate=0.022
muon_learning_rate=0.04
muon_momentum=0.8
muon_momentum=0.9
beta2=0.9
beta2=0.98
weight_decay=0.05
weight_decay=0.2
warmup_iters=40
schedule=cosine
schedule=wsd
min_lr=3e-4
grad_clip=1.0
n_head=1
n_head=4
n_kv_head=1
block_size=128 batch_size=8
batch_size=2 max_iters=1600
mlp_conv=2
mlp_conv=5
mlp=gated activation=silu
activation=gelu
norm=rmsnorm
embed_norm=True
logit_soft_cap=15
position=alibi
rope_base=1000
n_layer=6 n_embd=104
"""


def main(keys: list[str]) -> None:
    kept = []
    best = run_all("00-demo", [f"--max_iters={STEPS}", *keys])
    for number, change in enumerate(CHANGES.split("\n")[1:-1], start=1):
        changed = [f"--{key}" for key in change.split()]
        name = f"{number:02}-{change.replace(' ', ',')}"
        new = run_all(name, [f"--max_iters={STEPS}", *keys, *kept, *changed])
        if is_better(change, best, new):
            kept += changed
            best = new
    print(f"kept: {' '.join(kept) or 'nothing'}")
    if not kept:
        return
    # whether the gain holds in the whole demo
    full = run_all("full-demo", keys)
    is_better("the whole demo", full, run_all("full-kept", [*keys, *kept]))


def run_all(name: str, keys: list[str]) -> Path:
    """Train with each seed, unless that run has finished already. Returns the folder of the runs."""
    folder = OUT / name

    def train(seed: int) -> None:
        out_dir = folder / str(seed)
        if read_result(out_dir).get("end") == "finished":
            return
        command = ["train.py", "config/shakespeare_char.py", "--threads=1"]
        command += [*keys, f"--seed={seed}", f"--out_dir={out_dir}", "--overwrite=True"]
        log = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        if log.returncode:
            print(f"{out_dir}: {log.stderr.strip()[-300:]}", file=sys.stderr)

    with ThreadPoolExecutor(len(SEEDS)) as pool:
        list(pool.map(train, SEEDS))
    return folder


def read_result(out_dir: Path) -> dict:
    """Read the last row of metrics, which says how a run ended."""
    path = out_dir / "metrics.jsonl"
    return json.loads(path.read_text().splitlines()[-1]) if path.exists() else {}


def is_better(change: str, best: Path, new: Path) -> bool:
    """Compare two experiments and print a line of the table. Returns whether the new one is clearly better."""
    results = [read_result(new / str(seed)) for seed in SEEDS]
    ends = {result.get("end") for result in results}
    if ends != {"finished"}:
        print(f"| {change} | {', '.join(map(str, ends))} | | | no |", flush=True)
        return False
    folders = [str(folder / str(seed)) for folder in (best, new) for seed in SEEDS]
    command = ["compare.py", *folders, "--group=True", "--json=True"]
    command += ["--picture=None"]
    table = subprocess.check_output([sys.executable, *command], text=True)
    rows = json.loads(table)
    if len(rows) != 2:
        differ = "; ".join(f"{row['run']}: {row['settings']}" for row in rows)
        sys.exit(f"seeds of one experiment differ in more than the seed: {differ}")
    row = rows[1]
    difference, error = row["difference"], row["difference_error"]
    better = row["comparable"] and difference < 0 and row["p"] < LARGEST_P
    print(
        f"| {change} | {row['best_bits_per_byte']:.4f} | {difference:+.4f} ± {error:.4f}, p {row['p']:.3f}"
        f" | {mean(result['seconds'] for result in results):.0f} | {'yes' if better else 'no'} |",
        flush=True,
    )
    return better


if __name__ == "__main__":
    main(sys.argv[1:])
