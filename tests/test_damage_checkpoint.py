"""Damaged checkpoints and metrics are refused in one line, or read as if they were whole, as in test_damage.py."""

import io
import itertools
import json
import pickle
import random
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, make_text
from test_checkpoint import flatten
from test_damage import (
    SEEDS,
    Code,
    Target,
    change_entry,
    change_json,
    check_damages,
    cut_bytes,
    flip_bytes,
    replace_json,
)
from torch import Tensor, nn

import prepare_data
import sample
import train
from humptygpt.cli import UserError
from humptygpt.data import prepare as dataset
from humptygpt.formats import checkpoint
from humptygpt.models.build import restore_model
from humptygpt.training import evaluation

OUT = Path("out/run")
RUN = ["--n_layer=1", "--n_embd=16", "--max_iters=3", "--optimizer=muon"]
RUN += ["--bias=True", "--tie_weights=False", "--position=rotary", "--mlp=gated"]


# --------------------------------------------------------------------------------------
# Damages of the entries of a checkpoint, in a zip file that is whole


def change_entries(data: bytes, rng: random.Random) -> bytes:
    """Remove, rename, double or move entries, or change their values and types. Some of them are tensors."""
    entries = torch.load(io.BytesIO(data), weights_only=False)
    before = flatten(entries)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        entries = change_entry(entries, rng)
    for path, value in flatten(entries).items():
        was = before.get(path, value)
        if isinstance(value, Tensor) and value is not was and value.shape == was.shape:
            # one tensor in place of another of its shape cannot be detected
            return change_entries(data, rng)
    return to_bytes(entries)


def change_tensor(data: bytes, rng: random.Random) -> bytes:
    """Change the shape, dtype, layout, device, class or memory of a tensor."""
    entries = torch.load(io.BytesIO(data), weights_only=False)
    tensors = rng.choice([entries["model"], *entries.get("optimizer", {}).values()])
    name = rng.choice([name for name, x in tensors.items() if x.dim()])
    tensors[name] = rng.choice(OTHER_TENSORS)(tensors[name])
    return to_bytes(entries)


OTHER_TENSORS: list[Callable[[Tensor], object]] = [
    lambda x: x.T,
    lambda x: x.T.contiguous().T,
    lambda x: x[:1],
    lambda x: x[..., :0],
    lambda x: x.sum(),
    lambda x: torch.cat([x, x])[len(x) :],
    lambda x: x[:1].expand(x.shape),
    lambda x: x.flatten().as_strided(x.shape, [0] * x.dim()),
    lambda x: torch.empty_strided(x.shape, [2] * x.dim()).copy_(x) if x.dim() == 1 else x[:, ::2],
    lambda x: x.double(),
    lambda x: x.to(torch.complex64).conj().imag,
    lambda x: x.to(torch.float8_e4m3fn),
    lambda x: x.clone().view(torch.uint8),
    lambda x: x.to_sparse(),
    lambda x: x.to_sparse_csr() if x.dim() == 2 else x.to_sparse(),
    lambda x: torch.sparse_coo_tensor(torch.zeros(1, 1).long(), torch.ones(1), (2**40,)),
    lambda x: torch.empty(2**40, device="meta"),
    lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    lambda x: torch.nested.nested_tensor([x.float()]),
    lambda x: x.float().requires_grad_(),
    lambda x: torch.nn.Parameter(x.float()),
    lambda x: x.clone().untyped_storage(),
    lambda x: x.tolist(),
    lambda x: (x, x),
    lambda x: float(x.flatten()[0]),
]


def to_bytes(entries: object) -> bytes:
    file = io.BytesIO()
    torch.save(entries, file)
    return file.getvalue()


# --------------------------------------------------------------------------------------
# Damages of the records of the zip file, with checksums that fit


def read_records(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {name: file.read(name) for name in file.namelist()}


def write_records(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in records.items():
            file.writestr(name, content)
    return buffer.getvalue()


def change_records(data: bytes, rng: random.Random) -> bytes:
    """Remove a record, or change its name, length, compression or place."""
    records = read_records(data)
    name = rng.choice(list(records))
    content = records.pop(name)
    changed = [
        {},
        {f"{name}x": content},
        {f"../{name}": content},
        {name: content[: rng.randrange(len(content))]},
        {name: content + bytes(rng.randrange(1, 100))},
        {name: content},
    ]
    compression = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    return write_records(records | rng.choice(changed), compression)


PICKLE = "archive/data.pkl"
ENTRIES = ["train_config", "model_config", "tokenizer", "task", "data", "progress", "model"]


def change_pickle(data: bytes, rng: random.Random) -> bytes:
    """Change opcodes, which may then describe another checkpoint."""
    records = read_records(data)
    records[PICKLE] = rng.choice([flip_bytes, flip_bytes, cut_bytes])(records[PICKLE], rng)
    return write_records(records)


def hide_code(data: bytes, rng: random.Random) -> bytes:
    """Hide code as a value, as a key, before the right content, or behind names that torch allows."""
    records = read_records(data)
    entries = {"format": checkpoint.FORMAT, "model": {}}
    code = pickle.dumps(Code(), protocol=2)
    hidden = [
        code,
        code[:-1] + b"0" + records[PICKLE],
        pickle.dumps(entries | {rng.choice(ENTRIES): Code()}, protocol=2),
        pickle.dumps({Code(): entries}, protocol=2),
        b"cos\nsystem\n(S'touch ran'\ntR" + records[PICKLE],
        b"ctorch\nhub.load\n(S'x'\ntR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(S'x'\ntR.",
        b"\x80\x02ccollections\nOrderedDict\n)R}U\x06__dict__cpathlib\nPath\nsb.",
        b"\x80\x02r\xff\xff\xff\xff.",
        rng.randbytes(rng.randrange(1000)),
    ]
    return rng.choice([write_records(records | {PICKLE: found}) for found in hidden] + hidden)


# --------------------------------------------------------------------------------------
# The programs that read a checkpoint


def contents(tensors: dict[str, Tensor]) -> dict[str, tuple]:
    return {name: (x.dtype, x.shape, x.detach().numpy().tobytes()) for name, x in tensors.items()}


def resume() -> list:
    """Resume the run. Returns the tensors that it starts from."""
    found = []

    def setup(*configs, setup=train.setup) -> train.Run:
        run = setup(*configs)
        found.append(contents(run.model.state_dict()))
        found.extend(map(contents, run.optimizer.state.values()))
        return run

    one = torch.ones(())
    losses = {"train_loss": one}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "setup", setup)
        # damages may ask for more steps, larger batches, compiling, other data and Weights & Biases
        patch.setattr(train, "train_step", lambda run: (losses, one, 1))
        patch.setattr(evaluation, "validation_loss", lambda *args: (1.0, 0.1))
        patch.setattr(torch, "compile", lambda *args, **settings: 1 / 0)
        patch.setattr(dataset, "prepare", refuse)
        patch.setitem(sys.modules, "wandb", None)
        code = train.main(["--init_from=resume", "--out_dir=out/run", "--max_iters=3"])
    assert code in (0, 1)  # 1: the loss of an earlier step is not finite
    return found


def refuse(config: object) -> None:
    raise UserError("there is no such data")


def write() -> dict:
    """Sample from the run. Returns the tensors of the model."""
    found = {}

    def spy(model, weights: dict) -> nn.Module:
        model = restore_model(model, weights)
        found.update(contents(model.state_dict()))
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("humptygpt.formats.load.restore_model", spy)
        sample.main(["--out_dir=out/run", "--device=cpu", "--max_new_tokens=2"])
    return found


def train_run() -> None:
    Path("tiny.txt").write_text(make_text())
    prepare_data.main(["--input=tiny.txt", "--name=tiny"])
    assert train.main([*TINY_RUN, *RUN]) == 0


DAMAGES = (*[change_entries] * 3, *[change_tensor] * 3, change_records, hide_code)
DAMAGES += (flip_bytes, flip_bytes, cut_bytes)
KINDS = {
    "ckpt.pt, resumed": ("ckpt.pt", resume, DAMAGES),
    "best.pt, sampled": ("best.pt", write, DAMAGES),
    # a changed pickle may describe another checkpoint, so the tensors are not compared
    "other pickle, resumed": ("ckpt.pt", lambda: resume() and 0, (change_pickle,)),
    "other pickle, sampled": ("best.pt", lambda: write() and 0, (change_pickle,)),
}


@pytest.mark.parametrize("seeds", SEEDS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_is_refused_in_one_line_or_gives_the_same_tensors_and_never_runs_code(kind, seeds):
    train_run()
    name, read, damages = KINDS[kind]
    check_damages(kind, Target(OUT / name, read, damages), seeds)


def test_a_record_that_is_shorter_than_its_tensor_is_refused(folder):
    torch.save({"first": torch.ones(8), "second": torch.zeros(8)}, "file.pt")
    records = read_records(Path("file.pt").read_bytes())
    name = next(name for name in records if name.endswith("/data/0"))
    Path("file.pt").write_bytes(write_records(records | {name: records[name][:16]}))
    with pytest.raises(UserError, match="truncated or damaged, or holds more"):
        checkpoint.read_plain(Path("file.pt"))


# --------------------------------------------------------------------------------------
# Metrics


def change_line(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = rng.choice([change_json, change_json, replace_json])(lines[at], rng)
    return b"\n".join(lines) + b"\n"


@pytest.mark.whole_ending
@pytest.mark.parametrize("seeds", [range(4), pytest.param(range(4, 1000), marks=pytest.mark.long)], ids=str)
def test_of_damaged_metrics_the_rows_before_the_damage_are_kept_and_drawn(seeds):
    train_run()
    path = OUT / "metrics.jsonl"
    whole = path.read_bytes().splitlines()
    for seed in seeds:
        rng = random.Random(f"metrics.jsonl {seed}")
        damage = rng.choice([change_line, change_line, flip_bytes, cut_bytes])
        damaged = damage(b"\n".join(whole) + b"\n", rng)
        path.write_bytes(damaged)
        case = f"seed {seed}, {damage.__name__}"
        try:
            resume()
        except Exception as error:
            pytest.fail(f"{case}: {error!r}")
        pairs = zip(whole, damaged.splitlines(), strict=False)
        intact = [a for a, b in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
        kept = path.read_bytes().splitlines()[: len(intact)]
        assert [*map(json.loads, kept)] == [*map(json.loads, intact)], case
