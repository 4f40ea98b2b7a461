"""How fast, side by side with others on this machine. The last line is one JSON object.

    python bench.py --what=train --nanogpt=../nanoGPT     ten steps of ours, ten of nanoGPT's, alternating
    python bench.py --what=loss --nanogpt=../nanoGPT      how long to a loss, and which loss in equal time
    python bench.py --what=profile                        where a step's time goes
    python bench.py --what=prepare --input=FILE.txt       prepare_data.py with GPT-2's tokens, and tiktoken alone
    python bench.py --what=read --dataset=NAME            batches out of token files, on one core
    python bench.py --what=sample --nanogpt=../nanoGPT    generation on a CPU, beside every other program installed
    python bench.py --what=page --page=PAGE.html          keystrokes in a page of explain.py, in an installed Chromium

train: same shapes, same math (nanoGPT's CPU preset and AdamW, or a --config), same text; medians in milliseconds, and
`speedup`, nanoGPT's median over ours. Each runs in a process of its own, as its users have it; nanoGPT computes in
float32 on a CPU and in bfloat16 on a GPU, ours as --dtype says.
loss: nanoGPT's CPU preset as it is, then --config with as many steps as should take 0.8 of its seconds, for each seed.
Both are scored by the same function on the whole validation split, in blocks of their own block_size, and as nanoGPT
does it, on 200 batches of random crops. Seconds are those of training alone; those to --target are interpolated between
the evaluations around it, and `speedup` is their ratio.
profile: read, forward, backward and so on, measured one by one, without compiling.
prepare: MB/s of both, the peak memory of all processes together, and `efficiency`, our speed over that of tiktoken on
one core times the number of cores. read: tokens per second, and how much memory grew.
sample: milliseconds to the first token, which are those of reading the prompt, tokens per second after it, all texts
together, and memory, beside nanoGPT, transformers, CTranslate2 and llama.cpp. Those that are missing are named; `pip
install transformers ctranslate2 xllamacpp gguf` brings all but the first. All have random weights and as many threads,
and take turns; the figures are medians over the rounds. A size of GPT-2 is the same network for all; as 0.8M ours is
the demo's, and the others' that of nanoGPT's CPU preset, all but nanoGPT's own with bias terms. All take the most
probable token, but nanoGPT can only sample. llama.cpp has one text at a time, and its `version` lists the instructions
that its package was compiled for. Ours, nanoGPT and transformers leave out the rest of the tokens after 20 seconds.
Memory is the peak of a process, loading included, minus that of one that has imported torch and this program alone.
`ratio` is ours divided by theirs. The limit is memory bandwidth divided by the bytes of all matrices, which each step
reads once, times the texts; matrices as small as those of 0.8M stay in the cache, and it does not hold for them.
page: milliseconds from the press of a key until the page has been painted, medians and 95th percentiles: a character
appended to a text of 64 tokens, one typed anywhere in it, and the same where the context is full, so that all tokens
move. It is for runs whose tokens are characters. `pip install playwright` brings what drives the browser.
A --config's own device, dtype, compile and evaluation settings do not count here.
"""

import json
import math
import multiprocessing
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from humptygpt.core import limits

if __name__ == "__main__":
    limits.start(limits.TORCH)  # before numpy and torch are loaded

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from tqdm import tqdm, trange

import train
from benchmarks import rivals
from humptygpt.core import settings as configurator
from humptygpt.core.device import DTYPES, autocast, peak_flops, pick_device, pick_dtype, to_device
from humptygpt.core.errors import UserError
from humptygpt.core.settings import check, setting, without_effect
from humptygpt.data.batches import Dataset, TokenDataset
from humptygpt.tokenizer.tokenizers import GPT2Tokenizer
from humptygpt.training.evaluation import evaluate
from humptygpt.training.settings import TrainConfig
from model import ModelConfig, build, flops_per_token

# nanoGPT's preset for a laptop's CPU, as the command in its README sets it
SHAPE = ModelConfig(block_size=64, n_layer=4, n_head=4, n_embd=128, dropout=0.0, bias=False)
PRESET = TrainConfig(
    batch_size=12, max_iters=2000, learning_rate=1e-3, min_lr=1e-4, warmup_iters=100, beta2=0.99
)
PREPARE = Path(__file__).with_name("prepare_data.py")
DEMO = Path(__file__).parent / "config" / "shakespeare_char.py"
OF_GPT2 = {"block_size": 1024, "vocab_size": 50257, "bias": True, "activation": "gelu_tanh"}
GPT2 = {
    "gpt2": ModelConfig(n_layer=12, n_head=12, n_embd=768, **OF_GPT2),
    "gpt2-medium": ModelConfig(n_layer=24, n_head=16, n_embd=1024, **OF_GPT2),
    "gpt2-large": ModelConfig(n_layer=36, n_head=20, n_embd=1280, **OF_GPT2),
    "gpt2-xl": ModelConfig(n_layer=48, n_head=25, n_embd=1600, **OF_GPT2),
}
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}  # of a weight
READ_BYTES = 4_000_000_000  # to measure how fast memory is read
WARMUP = 20  # steps that are not counted
FIRST_KEYS = 10  # keystrokes that are not counted, while the browser compiles
TRAINS = ("train", "loss", "profile")
LOSS = {"only_with": {"what": "loss"}}
READ = {"only_with": {"what": "read"}}
SAMPLE = {"only_with": {"what": "sample"}}
PAGE = {"only_with": {"what": "page"}}


@dataclass(frozen=True)
class BenchConfig:
    what: str = setting(
        "train", "train, loss, profile, prepare, read, sample or page: see above", "benchmark"
    )
    nanogpt: str | None = setting(
        None, "a nanoGPT checkout to compare with", only_with={"what": ("train", "loss", "sample")}
    )
    config: str | None = setting(
        None, "config file; None: nanoGPT's CPU preset, or the demo", only_with={"what": TRAINS}
    )
    steps: int = setting(300, "timed steps", at_least=1, only_with={"what": ("train", "profile")})
    target: float = setting(1.88, "the validation loss to be reached", above=0, **LOSS)
    seeds: int = setting(3, "runs of each, one of ours after one of nanoGPT's", at_least=1, **LOSS)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1 or mps", only_with={"what": TRAINS})
    dtype: str | None = setting(
        None,
        "of ours; None: float32 in train, else auto",
        choices=("auto", *DTYPES),
        only_with={"what": TRAINS},
    )
    input: str | None = setting(
        None, "a text file, the larger the better", only_with={"what": "prepare"}
    )
    dataset: str | None = setting(
        None, "folder in data/; None: the config's", only_with={"what": (*TRAINS, "read")}
    )
    block_size: int = setting(1024, "length of a sequence", at_least=1, **READ)
    batch_size: int = setting(12, "sequences in a batch", at_least=1, **READ)
    batches: int = setting(100_000, "batches to read", at_least=1, **READ)
    sizes: tuple[str, ...] = setting(
        ("0.8M", "gpt2"), "models: 0.8M, " + ", ".join(GPT2) + "; several may be given", **SAMPLE
    )
    dtypes: tuple[str, ...] = setting(
        tuple(BYTES), "of the weights; several may be given", **SAMPLE
    )
    cases: tuple[str, ...] = setting(
        ("1x8", "16x8", "1x512", "16x512"),
        "texts x tokens of the prompt; several may be given",
        **SAMPLE,
    )
    new_tokens: int = setting(32, "tokens of each text after the prompt", at_least=2, **SAMPLE)
    rounds: int = setting(
        3, "measurements of each, one of ours after one of each other", at_least=1, **SAMPLE
    )
    page: str | None = setting(None, "an HTML file that explain.py made", **PAGE)
    section: str = setting("attention", "of the page, in view while keys are pressed", **PAGE)
    keystrokes: int = setting(50, "that are timed", at_least=1, **PAGE)

    def __post_init__(self):
        if self.what not in BENCHMARKS:
            raise ValueError(f"what={self.what} is not one of: {', '.join(BENCHMARKS)}")
        check(self)
        if self.what == "prepare" and self.input is None:
            raise ValueError("what=prepare needs --input=FILE.txt")
        if self.what == "loss" and self.nanogpt is None:
            raise ValueError("what=loss needs --nanogpt=FOLDER, a checkout of nanoGPT")
        if self.what == "page" and self.page is None:
            raise ValueError("what=page needs --page=PAGE.html, which explain.py makes of a run")
        for key, allowed in (("sizes", ("0.8M", *GPT2)), ("dtypes", tuple(BYTES))):
            for value in getattr(self, key):
                if value not in allowed:
                    raise ValueError(f"{key}={value} is not one of: {', '.join(allowed)}")
        for case in self.cases:
            if not re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}", case):
                raise ValueError(
                    f"cases={case} must be texts x tokens of the prompt, such as 16x512"
                )
        if self.nanogpt is not None and not (Path(self.nanogpt) / "model.py").exists():
            raise ValueError(
                f"nanogpt={self.nanogpt} has no model.py; give the folder of a checkout"
            )


def main(argv: list[str]) -> None:
    given = configurator.read(argv, BenchConfig)
    config = configurator.make(BenchConfig, given)
    for key, why in without_effect(vars(config), BenchConfig).items():
        if key in given:
            raise UserError(f"{key}={given[key]} has no effect {why}")
    print(json.dumps(BENCHMARKS[config.what](config)))


# --------------------------------------------------------------------------------------
# Training


class Contender:
    """A model in training, one step at a time, and how it is scored; ours or nanoGPT's."""

    config: TrainConfig
    model: nn.Module
    dataset: Dataset
    device: torch.device

    def step(self, it: int) -> None:
        """Step number it, the first being 0. It ends when its loss is known, so that a GPU has done its work."""
        raise NotImplementedError

    def take_steps(self, first: int, count: int) -> list[float]:
        """Steps number first and on. Returns the seconds of each."""
        return [timed(partial(self.step, it)) for it in range(first, first + count)]

    def val_loss(self) -> float:
        """Nats per token over the whole validation split, in blocks of block_size, in float32 or, on CUDA, TF32."""
        batch_size = self.config.batch_size
        return evaluate(
            self.model, self.dataset, batch_size, None, device=self.device, dtype=torch.float32
        )

    @torch.no_grad()
    def crops_loss(self) -> float:
        """As nanoGPT measures it: the mean over 200 batches of random crops of the validation split."""
        rng, losses = np.random.default_rng(1337), []
        self.model.eval()
        for _ in range(200):
            starts = rng.integers(
                len(self.dataset.val) - self.dataset.block_size, size=self.config.batch_size
            )
            losses.append(
                self.model(**to_device(self.dataset.blocks("val", starts), self.device))[1].item()
            )
        self.model.train()
        return statistics.mean(losses)


class Ours(Contender):
    """Steps as train.py takes them."""

    def __init__(self, config: TrainConfig, model_config: ModelConfig):
        self.run = train.setup(config, model_config)
        self.config, self.model, self.dataset = config, self.run.model, self.run.dataset
        self.device = self.run.device

    def step(self, it: int) -> None:
        self.run.optimizer.set_lr(self.config.lr(it) / self.config.learning_rate)
        loss, _, _ = train.train_step(self.run, it)
        loss.item()

    def flops_per_token(self) -> int:
        return flops_per_token(self.model)


class NanoGPT(Contender):
    """nanoGPT's model and optimizer, the body of its loop and its way of drawing batches."""

    def __init__(self, config: TrainConfig, model_config: ModelConfig, checkout: Path):
        self.config, self.device = config, pick_device(config.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, which nanoGPT asks for, too
        self.dataset = train.open_dataset(config, model_config)
        if (
            self.dataset.meta["dtype"] != "uint16"
            or not (self.dataset.folder / "train.bin").exists()
        ):
            raise UserError(
                f"{self.dataset.folder} is not one file of uint16 tokens, which is all that nanoGPT reads"
            )
        module = rivals.load_nanogpt(checkout)
        torch.manual_seed(config.seed)
        shape = {key: getattr(model_config, key) for key in rivals.NANOGPT_KEYS}
        vocab_size = model_config.vocab_size or self.dataset.tokenizer.vocab_size
        self.model = self.net = module.GPT(module.GPTConfig(**shape, vocab_size=vocab_size)).to(
            self.device
        )
        if self.device.type == "cuda":
            self.net = train.compile_model(
                self.model, self.dataset, config.batch_size, self.device, self.dtype
            )
        rates = config.weight_decay, config.learning_rate, (config.beta1, config.beta2)
        self.optimizer = self.model.configure_optimizers(*rates, device_type=self.device.type)
        self.next_batch = self.get_batch()

    def get_batch(self) -> tuple[Tensor, Tensor]:
        path, T = self.dataset.folder / "train.bin", self.dataset.block_size
        data = np.memmap(path, dtype=np.uint16, mode="r")  # opened again for each batch, as there
        starts = torch.randint(len(data) - T, (self.config.batch_size,))
        idx = torch.stack([torch.from_numpy(data[i : i + T].astype(np.int64)) for i in starts])
        targets = torch.stack(
            [torch.from_numpy(data[i + 1 : i + 1 + T].astype(np.int64)) for i in starts]
        )
        return tuple(to_device({"idx": idx, "targets": targets}, self.device).values())

    def step(self, it: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr(it)
        with autocast(self.device, self.dtype):
            _, loss = self.net(*self.next_batch)
        self.next_batch = self.get_batch()
        loss.backward()
        if self.config.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()


def read_config(config: BenchConfig, default: str | None = None) -> tuple[TrainConfig, ModelConfig]:
    """The settings of the config file, or of the default one, or else nanoGPT's CPU preset."""
    train_config, model_config = PRESET, SHAPE
    if path := config.config or default:
        given = configurator.read([path], ModelConfig, TrainConfig)
        train_config, model_config = (
            configurator.make(cls, given) for cls in (TrainConfig, ModelConfig)
        )
    dtype = config.dtype or ("float32" if config.what == "train" else "auto")
    name = config.dataset or train_config.dataset
    train_config = replace(
        train_config, dataset=name, device=config.device, dtype=dtype, compile=None
    )
    if train_config.ema_decay:
        raise UserError(
            f"ema_decay={train_config.ema_decay} is not timed here; take a config without it"
        )
    pick_dtype(dtype, pick_device(config.device))  # refused now, and not in another process
    if not (Path("data") / name).exists():
        raise UserError(f"no data/{name}; run: python prepare_data.py {name}")
    elif train.open_dataset(train_config, model_config).task != "language modelling":
        raise UserError(f"dataset={name} has sentence pairs, but what={config.what} is for text")
    return train_config, model_config


def bench_train(config: BenchConfig) -> dict:
    train_config, model_config = read_config(config)
    train_config = replace(train_config, gradient_accumulation_steps=1)
    others = replace(
        ModelConfig(),
        **{key: getattr(model_config, key) for key in (*rivals.NANOGPT_KEYS, "vocab_size")},
    )
    if config.nanogpt and (model_config != others or train_config.optimizer != "adamw"):
        raise UserError(
            f"config={config.config} is no GPT-2 trained by AdamW, which is all that nanoGPT can be"
        )
    runs = {"ours": Apart(Ours, train_config, model_config)}
    if config.nanogpt:
        runs["nanogpt"] = Apart(NanoGPT, train_config, model_config, Path(config.nanogpt))
    seconds, turn = {name: [] for name in runs}, 10  # steps of one, then of the other
    with tqdm(total=config.steps + WARMUP, unit="step", disable=None) as bar:
        for first in range(0, config.steps + WARMUP, turn):
            count = min(turn, config.steps + WARMUP - first)
            for name, run in runs.items():
                seconds[name] += run.ask("take_steps", first, count)
            bar.update(count)
    medians = {name: statistics.median(each[WARMUP:]) for name, each in seconds.items()}
    tokens, peak = (
        train_config.batch_size * model_config.block_size,
        peak_flops(pick_device(config.device)),
    )
    result = {}
    for name, median in medians.items():
        result |= {
            f"{name}_ms": round(1000 * median, 2),
            f"{name}_tokens_per_second": round(tokens / median),
        }
        if peak:
            result[f"{name}_mfu"] = round(
                tokens / median * runs["ours"].ask("flops_per_token") / peak, 4
            )
    if config.nanogpt:
        result["speedup"] = round(medians["nanogpt"] / medians["ours"], 3)
    return result


class Apart:
    """A contender in a process of its own, which waits while another works; its methods are called by ask()."""

    def __init__(self, cls: type, *arguments: object):
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.ask_for(start, cls, *arguments)

    def ask(self, method: str, *arguments: object) -> object:
        return self.ask_for(call, method, *arguments)

    def ask_for(self, function: Callable, *arguments: object) -> object:
        try:
            return self.pool.submit(function, *arguments).result()
        except UserError:
            raise
        except Exception as error:  # whatever the other's code may raise
            raise UserError(f"{arguments[0]} failed in a process of its own: {error}") from error


contender: Contender  # in such a process


def start(cls: type, *arguments: object) -> None:
    global contender
    contender = cls(*arguments)


def call(method: str, *arguments: object) -> object:
    return getattr(contender, method)(*arguments)


# --------------------------------------------------------------------------------------
# Time to a loss


def bench_loss(config: BenchConfig) -> dict:
    ours, shape = read_config(config, "config/shakespeare_char.py")
    theirs = replace(PRESET, dataset=ours.dataset, device=config.device)
    rows = []
    for seed in range(1, config.seeds + 1):
        nanogpt = Apart(NanoGPT, replace(theirs, seed=seed), SHAPE, Path(config.nanogpt))
        found = train_to(nanogpt.ask, theirs.max_iters, 100, config.target)
        row = {f"nanogpt_{key}": value for key, value in found.items()}
        # how many steps fit into the same time, with room for a machine that others slow down
        each = statistics.mean(
            Apart(Ours, replace(ours, seed=seed), shape).ask("take_steps", 0, 3 * WARMUP)[WARMUP:]
        )
        steps = max(1, int(0.8 * found["seconds"] / each))
        run = Apart(Ours, replace(ours, seed=seed, max_iters=steps, lr_decay_iters=None), shape)
        found = train_to(run.ask, steps, 5, config.target)
        row |= {f"ours_{key}": value for key, value in found.items()} | {"ours_steps": steps}
        if row["ours_seconds_to_target"]:
            # where nanoGPT has not reached it, its whole time counts
            to_target = row["nanogpt_seconds_to_target"] or row["nanogpt_seconds"]
            row["speedup"] = to_target / row["ours_seconds_to_target"]
        rows.append({key: round(value, 4) for key, value in row.items() if value is not None})
        print(f"seed {seed}: {json.dumps(rows[-1])}", flush=True)
    keys = [key for key in rows[0] if all(key in row for row in rows)]
    return {key: round(statistics.median(row[key] for row in rows), 4) for key in keys} | {
        "target": config.target
    }


def train_to(ask: Callable, steps: int, interval: int, target: float) -> dict:
    """Train for this many steps, evaluating after every interval of them until the target is reached.

    Returns the seconds of all steps, those to the target (None: not reached), and both losses at the end. The loss is
    interpolated linearly between evaluations.
    """
    seconds, reached, before = 0.0, None, None
    with tqdm(total=steps, unit="step", disable=None) as bar:
        for first in range(0, steps, interval):
            count = min(interval, steps - first)
            taken = sum(ask("take_steps", first, count))
            seconds += taken
            bar.update(count)
            if reached is None:
                loss = ask("val_loss")
                if loss <= target:
                    after = (
                        (target - loss) / (before - loss) if before else 0
                    )  # fraction of these steps
                    reached = seconds - taken * after
                before = loss
    losses = {
        "val_loss": loss if reached is None else ask("val_loss"),
        "crops_loss": ask("crops_loss"),
    }
    return {"seconds": seconds, "seconds_to_target": reached, **losses}


# --------------------------------------------------------------------------------------
# Where the time goes


def bench_profile(config: BenchConfig) -> dict:
    """Parts of a step, measured one by one, and the operators that take longest, by torch's profiler."""
    train_config, model_config = read_config(config, "config/shakespeare_char.py")
    ours = Ours(replace(train_config, compile=False), model_config)
    ours.take_steps(0, WARMUP)
    parts = {"read a batch": 0.0, "forward": 0.0, "backward": 0.0, "clip": 0.0, "optimizer": 0.0}
    for it in range(WARMUP, WARMUP + config.steps):
        time_parts(ours.run, it, parts)
    ms = {name: 1000 * seconds / config.steps for name, seconds in parts.items()}
    ms["whole step"] = 1000 * statistics.mean(ours.take_steps(WARMUP, config.steps))
    print(
        "\n".join(
            f"{name:<14}{each:9.2f} ms {each / ms['whole step']:6.1%}" for name, each in ms.items()
        )
    )
    steps = min(config.steps, 20)
    with torch.profiler.profile() as profile:
        ours.take_steps(WARMUP, steps)
    print(operator_table(profile, steps, on_gpu=ours.device.type == "cuda"))
    return {name.replace(" ", "_") + "_ms": round(each, 3) for name, each in ms.items()}


def time_parts(run: train.Run, it: int, parts: dict[str, float]) -> None:
    """A step of one micro-batch, as train.train_step takes it; the seconds of each part are added to parts."""
    began = time.perf_counter()

    def took(part: str) -> None:
        nonlocal began
        if run.device.type != "cpu":
            torch.accelerator.synchronize(run.device)
        now = time.perf_counter()
        parts[part] += now - began
        began = now

    batch = to_device(run.dataset.batch(it, run.config.batch_size), run.device)
    took("read a batch")
    with autocast(run.device, run.dtype):
        _, loss = run.model(**batch)
    took("forward")
    loss.backward()
    took("backward")
    nn.utils.clip_grad_norm_(
        [p for p in run.model.parameters() if not p.grad.is_sparse], run.config.grad_clip
    )
    took("clip")
    run.optimizer.step()
    took("optimizer")
    run.optimizer.zero_grad()


def operator_table(profile: torch.profiler.profile, steps: int, on_gpu: bool) -> str:
    operators = [
        e for e in profile.key_averages() if e.device_type == DeviceType.CPU
    ]  # the others are their kernels
    spent = {
        e.key: (e.self_device_time_total if on_gpu else e.self_cpu_time_total) for e in operators
    }
    calls = {e.key: e.count for e in operators}
    lines = [f"\n{'operator':<48}{'ms/step':>10}{'%':>8}{'calls':>8}"]
    for name, microseconds in sorted(spent.items(), key=lambda item: -item[1])[:15]:
        percent = 100 * microseconds / sum(spent.values())
        lines.append(
            f"{name[:47]:<48}{microseconds / 1000 / steps:10.2f}{percent:8.1f}{calls[name] / steps:8.0f}"
        )
    return "\n".join(lines)


# --------------------------------------------------------------------------------------
# Data


def bench_prepare(config: BenchConfig) -> dict:
    """prepare_data.py on the whole text; every 8 seconds it is paused while tiktoken encodes a part on one core."""
    shutil.rmtree("data/bench", ignore_errors=True)
    tokenizer = GPT2Tokenizer.train()
    with Path(config.input).open(encoding="utf-8") as file:
        texts = [file.read(1 << 18) for _ in range(80)]  # 20 MB
    size = sum(len(text.encode()) for text in texts)
    encode_alone = lambda: [tokenizer.engine.encode_ordinary(text) for text in texts]  # noqa: E731
    began, peak, alone = time.perf_counter(), 0, []
    command = [sys.executable, str(PREPARE), "bench", f"--input={config.input}", "--tokenizer=gpt2"]
    with psutil.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            with suppress(psutil.Error):  # one has ended meanwhile
                family = [process, *process.children(recursive=True)]
                peak = max(peak, sum(each.memory_info().rss for each in family))
                if time.perf_counter() - began > 8 * (len(alone) + 1) + sum(alone):
                    for each in family:
                        each.suspend()
                    alone.append(timed(encode_alone))
                    for each in family:
                        each.resume()
            time.sleep(0.05)
    if process.returncode:
        raise UserError(f"prepare_data.py ended with exit code {process.returncode}")
    speed = Path(config.input).stat().st_size / (time.perf_counter() - began - sum(alone)) / 1e6
    core = size / statistics.mean(alone or [timed(encode_alone)]) / 1e6
    return {
        "mb_per_second": round(speed, 2),
        "tiktoken_alone_mb_per_second": round(core, 2),
        "cores": os.cpu_count(),
        "efficiency": round(speed / core / os.cpu_count(), 3),
        "peak_memory_mb": round(peak / 1e6),
    }


def timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def bench_read(config: BenchConfig) -> dict:
    """Batches in the order of training. The memory that counts is the process's own, without mapped pages of files."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    dataset = TokenDataset(
        Path("data") / (config.dataset or "shakespeare_char"), config.block_size, seed=1337
    )
    dataset.batch(0, config.batch_size)
    first = time.perf_counter() - began
    for index in range(100):
        dataset.batch(index, config.batch_size)
    before, began = own_memory(), time.perf_counter()
    for index in trange(config.batches, disable=not sys.stderr.isatty()):
        dataset.batch(index, config.batch_size)
    seconds = time.perf_counter() - began
    return {
        "tokens_per_second": round(
            config.batches * config.batch_size * config.block_size / seconds
        ),
        "first_batch_seconds": round(first, 3),
        "growth_mb": round((own_memory() - before) / 1e6, 1),
    }


def own_memory() -> int:
    """Resident bytes that are not pages of files; Linux alone counts those."""
    memory = psutil.Process().memory_info()
    return memory.rss - getattr(memory, "shared", 0)


# --------------------------------------------------------------------------------------
# Generation


def bench_sample(config: BenchConfig) -> dict:
    fitting = {size: fitting_cases(config, size) for size in dict.fromkeys(config.sizes)}
    contenders, missing = rivals.find_contenders(config.nanogpt)
    if missing:
        print(
            "not timed: " + ", ".join(f"{name} ({how})" for name, how in missing.items()),
            file=sys.stderr,
        )
    machine, helper, rows = measure_machine(), Apart(rivals.Process), []
    nothing = helper.ask("peak_memory")
    gigabytes = (
        f"{machine['bytes_per_second'] / 1e9:.1f} GB/s over {machine['bytes_read'] / 1e9:.1f} GB"
    )
    print(
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, reads {gigabytes}"
    )
    print(
        f"{'':<41}first token  tokens/s    memory  ratios of the three; ours: of the limit",
        flush=True,
    )
    for size, (ours, gpt2, cases) in fitting.items():
        for dtype in dict.fromkeys(config.dtypes):
            with TemporaryDirectory() as folder:
                able = {name: cls for name, cls in contenders.items() if dtype in cls.dtypes}
                for cls in able.values():
                    helper.ask("write", cls, gpt2, dtype, Path(folder))
                for batch, prompt in cases:
                    case = rivals.Case(
                        ours,
                        gpt2,
                        dtype,
                        batch,
                        prompt,
                        config.new_tokens,
                        config.nanogpt,
                        Path(folder),
                    )
                    past_context = prompt + config.new_tokens > min(
                        ours.block_size, gpt2.block_size
                    )
                    runs = {
                        name: cls
                        for name, cls in able.items()
                        if batch <= cls.max_batch and (cls.past_context or not past_context)
                    }
                    found = time_case(case, runs, config.rounds)
                    limit = (
                        batch
                        * machine["bytes_per_second"]
                        / BYTES[dtype]
                        / count_matrix_weights(ours)
                    )
                    row = {"size": size, "dtype": dtype, "batch": batch, "prompt": prompt}
                    rows.append(
                        row
                        | {"limit_tokens_per_second": round(limit, 2)}
                        | compare(found, nothing, limit)
                    )
                    print_row(rows[-1])
    return {
        "machine": machine,
        "new_tokens": config.new_tokens,
        "rounds": config.rounds,
        "cases": rows,
    }


def fitting_cases(
    config: BenchConfig, size: str
) -> tuple[ModelConfig, ModelConfig, list[tuple[int, int]]]:
    """Our shape of this size, the others', and the cases, (texts, tokens of the prompt), that fit both contexts."""
    if size == "0.8M":
        demo = configurator.read([str(DEMO)], ModelConfig, TrainConfig)
        ours, gpt2 = (
            configurator.make(ModelConfig, demo | {"vocab_size": 65}),
            replace(SHAPE, vocab_size=65),
        )
    else:
        ours = gpt2 = GPT2[size]
    context = min(ours.block_size, gpt2.block_size)
    cases = {case: tuple(map(int, case.split("x"))) for case in config.cases}
    too_long = [case for case, (_, prompt) in cases.items() if prompt > context]
    why = f"cases={', '.join(too_long)}: the prompt is longer than the {context:,} tokens of {size}"
    if len(too_long) == len(cases):
        raise UserError(f"{why}; take a shorter prompt")
    if too_long:
        print(f"note: left out {why}", file=sys.stderr)
    return ours, gpt2, [numbers for case, numbers in cases.items() if case not in too_long]


def time_case(
    case: rivals.Case, contenders: dict[str, type[rivals.Contender]], rounds: int
) -> dict[str, dict]:
    """{contender: its figures}; memory is the peak in MB."""
    runs, seconds = (
        {name: Apart(cls, case) for name, cls in contenders.items()},
        {name: [] for name in contenders},
    )
    for _ in trange(rounds, unit="round", leave=False, disable=None):
        for name, run in runs.items():
            seconds[name].append(run.ask("measure", case.new_tokens))
    return {
        name: {
            "first_token_ms": round(1000 * statistics.median(steps[0] for steps in each), 3),
            "tokens_per_second": round(
                case.batch / statistics.median(s for steps in each for s in steps[1:]), 2
            ),
            "memory_mb": runs[name].ask("peak_memory") / 1e6,
            "version": runs[name].ask("version"),
        }
        for name, each in seconds.items()
    }


def compare(found: dict[str, dict], nothing: int, limit: float) -> dict[str, dict]:
    """The figures with their ratios; nothing: peak bytes of a process without a model; limit: tokens per second."""
    for figures in found.values():
        figures["memory_mb"] = round(figures["memory_mb"] - nothing / 1e6, 2)
    ours = found["ours"]
    for name, figures in found.items():
        if name == "ours":
            figures["of_limit"] = round(ours["tokens_per_second"] / limit, 4)
        else:  # None where there is nothing to divide by, as the memory of a very small model
            keys = ("first_token_ms", "tokens_per_second", "memory_mb")
            figures["ratio"] = {
                key: round(ours[key] / figures[key], 3) if figures[key] > 0 else None
                for key in keys
            }
    return found


def print_row(row: dict) -> None:
    case = f"{row['batch']}x{row['prompt']}"
    for name, figures in row.items():
        if isinstance(figures, dict):
            ms, speed, memory = (
                figures["first_token_ms"],
                figures["tokens_per_second"],
                figures["memory_mb"],
            )
            ratios = figures.get("ratio", {"": figures.get("of_limit")}).values()
            head = f"{row['size']:<12}{row['dtype']:<9}{case:<7}{name:<12}"
            print(f"{head}{ms:>11.1f} ms{speed:>10.1f}{memory:>7.0f} MB ", *ratios, flush=True)


def measure_machine() -> dict:
    """The processor, and the bandwidth of its memory: the fastest of several sums over a tensor of READ_BYTES.

    The tensor is smaller where less than twice as much memory is free.
    """
    cpuinfo = Path("/proc/cpuinfo")
    found = cpuinfo.exists() and re.search(r"model name\s*: (.+)", cpuinfo.read_text())
    tensor = torch.ones(min(READ_BYTES, psutil.virtual_memory().available // 2) // 4)
    return {
        "processor": found[1] if found else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bytes_read": 4 * tensor.numel(),
        "bytes_per_second": round(4 * tensor.numel() / min(timed(tensor.sum) for _ in range(5))),
    }


def count_matrix_weights(config: ModelConfig) -> int:
    """Weights that are read for each token; of an embedding it is one row."""
    with torch.device("meta"):
        return sum(m.weight.numel() for m in build(config).modules() if isinstance(m, nn.Linear))


# --------------------------------------------------------------------------------------
# The page

# A message that is posted before a frame is painted arrives after it.
PAINTED = """() => {
  window.painted = [];
  const later = new MessageChannel();
  addEventListener("keydown", ({ timeStamp }) => {
    later.port1.onmessage = () => painted.push(performance.now() - timeStamp);
    requestAnimationFrame(() => later.port2.postMessage(null));
  }, true);
  const data = JSON.parse(document.getElementById("data").textContent);
  return [data.tokenizer.alphabet ?? "", data.model.block_size];
}"""
TIME_OF_NEXT = (
    "n => new Promise((done) => {"
    " const ask = () => n < painted.length ? done(painted[n]) : setTimeout(ask); ask(); })"
)


def bench_page(config: BenchConfig) -> dict:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise UserError(
            "what=page needs playwright, which drives a browser: pip install playwright"
        ) from None
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise UserError(
            "what=page needs an installed Chromium; on Debian: apt-get install chromium"
        )
    path = Path(config.page).resolve()
    if not path.is_file():
        raise UserError(f"no {config.page}; make it with explain.py")
    with sync_playwright() as started:
        return time_page(
            started.chromium.launch(executable_path=chromium, args=["--no-sandbox"]), path, config
        )


def time_page(browser, path: Path, config: BenchConfig) -> dict:
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.goto(f"{path.as_uri()}#section={config.section}")
    page.wait_for_selector("#bars")
    alphabet, block_size = page.evaluate(PAINTED)
    letters = [letter for letter in alphabet if "a" <= letter <= "z"]
    if not letters:
        raise UserError(f"{config.page}: its tokens are not characters, which this benchmark types")
    sizes = {
        "64": 64,
        "full": block_size + 1,
    }  # where it is full, the first token leaves and all others move
    cases = {
        f"{where}_{name}": (T, where)
        for name, T in sizes.items()
        for where in ("appended", "anywhere")
    }
    return {
        name: time_keystrokes(page, letters, *case, config.keystrokes)
        for name, case in cases.items()
    }


def time_keystrokes(page, letters: list[str], T: int, where: str, count: int) -> dict:
    """T: tokens of the text after each keystroke; where: appended or anywhere. Returns milliseconds."""
    draw, times = random.Random(1), []
    for _ in range(FIRST_KEYS + count):
        page.fill("#text", "".join(draw.choices(letters, k=T - 1)))
        position = T - 1 if where == "appended" else draw.randrange(T - 1)
        page.eval_on_selector(
            "#text", "(text, at) => { text.focus(); text.setSelectionRange(at, at); }", position
        )
        seen = page.evaluate("painted.length")
        page.keyboard.press(draw.choice(letters))
        times.append(page.evaluate(TIME_OF_NEXT, seen))
    times = sorted(times[FIRST_KEYS:])
    return {
        "median_ms": round(statistics.median(times), 1),
        "p95_ms": round(times[math.ceil(0.95 * count) - 1], 1),
    }


BENCHMARKS = {"train": bench_train, "loss": bench_loss, "profile": bench_profile}
BENCHMARKS |= {
    "prepare": bench_prepare,
    "read": bench_read,
    "sample": bench_sample,
    "page": bench_page,
}


if __name__ == "__main__":
    configurator.run(main)
