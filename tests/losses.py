"""The losses of short runs of every model, optimizer and position, in full precision, with and without a resume.

    python tests/losses.py > after.json                       of this checkout
    python tests/losses.py ../before > before.json            of another one, by its own train.py
    diff before.json after.json

A refactoring changes none of these numbers on one machine with one version of torch: the order in which random numbers
are drawn, what belongs to which optimizer state, and what a checkpoint holds all show here.
"""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from texts import make_pairs, make_text

STEPS = 20
COMMON = f"--n_layer=2 --n_head=4 --n_embd=32 --block_size=32 --batch_size=4 --lr_decay_iters={STEPS}"
COMMON += " --eval_interval=10 --log_interval=1 --warmup_iters=4 --device=cpu --compile=False --dtype=float32"
RUNS = {
    "gpt2": "--dataset=text --position=learned --dropout=0.1 --bias=True --activation=gelu_tanh",
    "modern": "--dataset=text --position=rotary --norm=rmsnorm --activation=relu_squared --qk_norm=True --init=zero"
    " --tie_weights=False --optimizer=muon --schedule=linear --min_lr=0.0 --grad_clip=0.0",
    "ngrams": "--dataset=text --position=rotary --optimizer=muon --ngrams=3 --ngram_min_count=4 --ngram_dropout=0.3"
    " --ema_decay=0.9 --weight_decay=0.0",
    "post_norm": "--dataset=text --position=sinusoidal --block=post_norm --activation=relu --schedule=wsd",
    "alibi": "--dataset=text --position=alibi --block=parallel --n_kv_head=2 --window=8 --dropout=0.1",
    "no_residual": "--dataset=text --position=none --block=plain --mlp=none --norm=none",
    "number": "--dataset=text --model=window_mlp --embedding=number --n_embd=1 --window=8 --n_hidden=32",
    "window": "--dataset=text --model=window_mlp --window=4 --optimizer=muon --dropout=0.2 --ema_decay=0.9",
    "transformer": "--dataset=pairs --model=transformer --position=sinusoidal --block=post_norm --label_smoothing=0.1"
    " --block_size=64 --dropout=0.1",
    "transformer_muon": "--dataset=pairs --model=transformer --position=rotary --norm=rmsnorm --optimizer=muon"
    " --block_size=64 --ema_decay=0.9 --n_kv_head=2 --window=16",
    "transformer_ngrams": "--dataset=pairs --model=transformer --position=alibi --ngrams=2 --ngram_min_count=2"
    " --block_size=64 --gradient_accumulation_steps=2",
    "gpt_translates": "--dataset=pairs --position=rotary --rope_factor=4.0 --rope_original_context=64 --mlp=gated"
    " --activation=silu --embed_norm=True --logit_soft_cap=15.0 --block_size=96 --gradient_accumulation_steps=2",
    "bfloat16": "--dataset=text --position=rotary --dropout=0.1 --n_kv_head=2 --optimizer=muon --dtype=bfloat16",
    "bfloat16_pairs": "--dataset=pairs --model=transformer --position=alibi --block_size=64 --dtype=bfloat16",
}


def train(script: Path, folder: Path, *argv: str) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script), *argv], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{argv}\n{done.stderr[-2000:]}"


def losses(root: Path, folder: Path, name: str) -> dict[str, list]:
    """{"straight": the numbers of a run, "resumed": those of one that was resumed halfway}."""
    found = {}
    for way in ("straight", "resumed"):
        out_dir = f"out/{name}/{way}"
        argv = [*COMMON.split(), *RUNS[name].split(), f"--out_dir={out_dir}"]
        if way == "resumed":
            train(root / "train.py", folder, *argv, f"--max_iters={STEPS // 2}")
            argv = ["--init_from=resume", f"--out_dir={out_dir}"]
        train(root / "train.py", folder, *argv, f"--max_iters={STEPS}")
        rows = map(json.loads, (folder / out_dir / "metrics.jsonl").read_text().splitlines())
        keys = ("iter", "tokens", "lr", "train_loss", "grad_norm", "val_loss", "val_bits_per_byte", "test_bleu")
        found[way] = [{key: row[key] for key in keys if key in row} for row in rows]
        if way == "resumed":  # the test split is scored at each end
            found[way] = [row for row in found[way] if row["iter"] == STEPS or "test_bleu" not in row]
    assert found["straight"] == found["resumed"], name
    return found


def main(argv: list[str]) -> None:
    root = Path(argv[0] if argv else Path(__file__).parent.parent).resolve()
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(temporary)
        (folder / "text.txt").write_text(make_text(20_000))
        pairs = "".join(f"{source}\t{target}\n" for source, target in make_pairs())
        (folder / "pairs.tsv").write_text(pairs)
        train(root / "prepare_data.py", folder, "--input=text.txt", "--name=text")
        train(root / "prepare_data.py", folder, "--input=pairs.tsv", "--name=pairs", "--tokenizer=byte")
        found = pool.map(lambda name: losses(root, folder, name), RUNS)
        print(json.dumps(dict(zip(RUNS, found, strict=True)), indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
