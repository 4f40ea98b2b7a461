"""Losses of short runs of every model, optimizer and position, in full precision, straight and resumed halfway.

    python tests/losses.py > after.json                         runs this checkout
    python tests/losses.py ../before > before.json              runs another one
    python tests/losses.py ../before . > resumed.json           starts with one and resumes with the other
    diff before.json after.json

A refactoring changes none of these numbers on one machine with one version of torch. They show the order in which
random numbers are drawn, which state belongs to which parameter, and whether a checkpoint is complete.
"""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from texts import make_pairs, make_text

sys.path.append(str(Path(__file__).parent.parent))

STEPS = 20
# a config file, because a key without effect is refused if it is typed; config files are made to be combined
COMMON = f"""
n_layer, n_head, n_embd, block_size, batch_size = 2, 4, 32, 32, 4
lr_decay_iters, eval_interval, log_interval, warmup_iters = {STEPS}, 10, 1, 4
device, compile, dtype = "cpu", False, "float32"
activation, mlp_conv, qk_norm, init, tie_weights = "gelu", 0, False, "gpt2", True
optimizer, learning_rate, schedule, min_lr, grad_clip = "adamw", 1e-3, "cosine", None, 1.0
muon_learning_rate, muon_momentum, beta2 = 0.02, 0.95, 0.99
"""
KEYS = ["iter", "tokens", "lr", "train_loss", "grad_norm", "val_loss", "val_bits_per_byte"]
BASE = "--dataset=text --position=rotary"  # the model that LoRA starts from
RUNS = {
    "gpt2": "--dataset=text --position=learned --dropout=0.1 --bias=True --activation=gelu_tanh",
    "demo": "--dataset=text --position=rotary --optimizer=normuon --muon_momentum=0.85 --mlp_conv=3 --init=zero"
    " --activation=relu_squared --qk_norm=True --tie_weights=False --schedule=linear --min_lr=0.0 --grad_clip=0.0",
    "muon": "--dataset=text --position=rotary --norm=rmsnorm --optimizer=muon --weight_decay=0.0 --n_kv_head=2",
    "post_norm": "--dataset=text --position=sinusoidal --block=post_norm --activation=relu --schedule=wsd",
    "alibi": "--dataset=text --position=alibi --n_kv_head=2 --window=8 --dropout=0.1",
    "no_residual": "--dataset=text --position=none --block=plain --mlp=none --norm=none",
    "window": "--dataset=text --model=window_mlp --window=4 --optimizer=muon --dropout=0.2",
    "transformer": "--dataset=pairs --model=transformer --position=sinusoidal --block=post_norm --label_smoothing=0.1"
    " --block_size=64 --dropout=0.1",
    "transformer_muon": "--dataset=pairs --model=transformer --position=rotary --norm=rmsnorm --optimizer=muon"
    " --block_size=64 --n_kv_head=2 --window=16",
    "gpt_translates": "--dataset=pairs --position=rotary --rope_factor=4.0 --rope_original_context=64 --mlp=gated"
    " --activation=silu --embed_norm=True --logit_soft_cap=15.0 --block_size=96 --gradient_accumulation_steps=2",
    "bfloat16": "--dataset=text --position=rotary --dropout=0.1 --n_kv_head=2 --optimizer=muon --dtype=bfloat16",
    "two_processes": "--dataset=text --position=rotary --optimizer=normuon --dropout=0.1",
    "frozen": "--dataset=text --position=learned --freeze=wte,blocks.0 --dropout=0.1",
    "lora": f"{BASE} --init_from=out/base --lora_rank=4 --lora_targets=q_proj,v_proj,up_proj --dropout=0.1",
}


def run(script: Path, folder: Path, argv: str, processes: int = 1) -> None:
    launch = f"-m torch.distributed.run --standalone --nproc_per_node={processes}".split()
    command = [sys.executable, *(launch if processes > 1 else []), script, *argv.split()]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{argv}\n{done.stderr[-2000:]}"


def read_rows(out_dir: Path) -> list[dict]:
    """The rows of metrics, without those that each end of a run adds."""
    rows = map(json.loads, (out_dir / "metrics.jsonl").read_text().splitlines())
    return [{key: row[key] for key in KEYS if key in row} for row in rows if row["kind"] in ("train", "eval")]


def losses(first: Path, second: Path, folder: Path, name: str) -> list[dict]:
    """The rows of a run by `first`. Asserts that a run which `second` resumes halfway has the same rows."""
    processes = 2 if name == "two_processes" else 1
    straight, resumed = f"--out_dir=out/{name}/straight", f"--out_dir=out/{name}/resumed"
    half, whole = f"--max_iters={STEPS // 2}", f"--max_iters={STEPS}"
    resume = f"--init_from=resume {resumed} {whole}"
    script, settings = first / "train.py", f"common.py {RUNS[name]}"
    run(script, folder, f"{settings} {straight} {whole}", processes)
    run(script, folder, f"{settings} {resumed} {half}", processes)
    run(second / "train.py", folder, resume, processes)
    rows = read_rows(folder / "out" / name / "straight")
    assert read_rows(folder / "out" / name / "resumed") == rows, name
    return rows


def main(argv: list[str]) -> None:
    roots = [Path(root).resolve() for root in argv or [Path(__file__).parent.parent]]
    first, second = roots[0], roots[-1]
    with (
        tempfile.TemporaryDirectory() as temporary,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        folder = Path(temporary)
        (folder / "text.txt").write_text(make_text(20_000))
        pairs = "".join(f"{source}\t{target}\n" for source, target in make_pairs())
        (folder / "pairs.tsv").write_text(pairs)
        (folder / "common.py").write_text(COMMON)
        prepare = first / "prepare_data.py"
        run(prepare, folder, "--input=text.txt --name=text")
        run(prepare, folder, "--input=pairs.tsv --name=pairs --tokenizer=byte")
        base = f"common.py {BASE} --out_dir=out/base --max_iters=10"
        run(first / "train.py", folder, base)
        rows = pool.map(lambda name: losses(first, second, folder, name), RUNS)
        print(json.dumps(dict(zip(RUNS, rows, strict=True)), indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
