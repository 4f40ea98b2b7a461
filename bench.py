"""How fast, side by side with others on this machine. The last line is one JSON object.

    python bench.py --what=train --nanogpt=../nanoGPT     ten steps of ours, ten of nanoGPT's, in turn
    python bench.py --what=loss --nanogpt=../nanoGPT      how long to a loss, and which loss in equal time
    python bench.py --what=profile                        where a step's time goes
    python bench.py --what=prepare --input=FILE.txt       prepare_data.py with GPT-2's tokens, and tiktoken alone
    python bench.py --what=read --dataset=NAME            batches out of token files, on one core

train: same shapes, same math (nanoGPT's CPU preset and AdamW, or a --config), same text; medians in milliseconds, and
`speedup`, nanoGPT's median over ours. Each runs in a process of its own, as its users have it; nanoGPT computes in
float32 on a CPU and in bfloat16 on a GPU, ours as --dtype says.
loss: nanoGPT's CPU preset as it is, then --config with as many steps as should take 0.8 of its seconds, for each seed.
Both are scored by the same function on the whole validation split, in blocks of their own block_size, and as nanoGPT
does it, on 200 batches of random crops. Seconds are those of training alone; those to --target are read off a straight
line between the evaluations around it, and `speedup` is their ratio.
profile: read, forward, backward and so on, measured one by one, without compiling.
prepare: MB/s of both, the most memory that all processes together held, and `share`, our speed over that of tiktoken on
one core times the number of cores. read: tokens per second, and what memory grew by.
Of a --config, what it says of device, dtype, compiling and evaluation does not count here.
"""

import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from tqdm import tqdm, trange

from humptygpt import configurator
from humptygpt.batches import ReadAhead, TokenDataset
from humptygpt.configurator import UserError, check, setting, without_effect
from humptygpt.device import DTYPES, autocast, keep_freed_memory, peak_flops, pick_device, pick_dtype
from humptygpt.tokenizer import BytePairTokenizer
from model import ModelConfig, flops_per_token
from train import TrainConfig, build_model, build_optimizer, compiled, evaluate, open_dataset, to_device, train_step

# nanoGPT's preset for a laptop's CPU, as the command in its README sets it
SHAPE = ModelConfig(block_size=64, n_layer=4, n_head=4, n_embd=128, dropout=0.0, bias=False)
PRESET = TrainConfig(batch_size=12, max_iters=2000, learning_rate=1e-3, min_lr=1e-4, warmup_iters=100, beta2=0.99)
PREPARE = Path(__file__).with_name("prepare_data.py")
SIZES = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")  # what nanoGPT's model can be told
WARMUP = 20  # steps that are not counted


TRAINS = {"only_with": {"what": ("train", "loss", "profile")}}
LOSS = {"only_with": {"what": "loss"}}
READ = {"only_with": {"what": "read"}}


@dataclass(frozen=True)
class BenchConfig:
    what: str = setting("train", "train, loss, profile, prepare or read: see above", group="benchmark")
    nanogpt: str | None = setting(None, "a nanoGPT checkout to compare with", only_with={"what": ("train", "loss")})
    config: str | None = setting(None, "config file; None: nanoGPT's CPU preset in train, else the demo", **TRAINS)
    steps: int = setting(
        300, f"timed steps, after {WARMUP} untimed ones", at_least=1, only_with={"what": ("train", "profile")}
    )
    target: float = setting(1.88, "the validation loss to be reached", above=0, **LOSS)
    seeds: int = setting(3, "runs of each, one of ours after one of nanoGPT's", at_least=1, **LOSS)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1 or mps", **TRAINS)
    dtype: str | None = setting(None, "of ours; None: float32 in train, else auto", choices=("auto", *DTYPES), **TRAINS)
    input: str | None = setting(None, "a text file, the larger the better", only_with={"what": "prepare"})
    dataset: str | None = setting(
        None,
        "a folder in data/; random: random tokens; None: that of the config or the demo",
        only_with={"what": (*TRAINS["only_with"]["what"], "read")},
    )
    block_size: int = setting(1024, "length of a sequence", at_least=1, **READ)
    batch_size: int = setting(12, "sequences in a batch", at_least=1, **READ)
    batches: int = setting(100_000, "batches to read", at_least=1, **READ)

    def __post_init__(self):
        if self.what not in BENCHMARKS:
            raise ValueError(f"what={self.what} is not one of: {', '.join(BENCHMARKS)}")
        check(self)
        if self.what == "prepare" and self.input is None:
            raise ValueError("what=prepare needs --input=FILE.txt")
        if self.what == "loss" and self.nanogpt is None:
            raise ValueError("what=loss needs --nanogpt=FOLDER, a checkout of nanoGPT")
        if self.nanogpt is not None and not (Path(self.nanogpt) / "model.py").exists():
            raise ValueError(f"nanogpt={self.nanogpt} has no model.py; give the folder of a checkout")


def main(argv: list[str]) -> None:
    given = configurator.read(argv, BenchConfig)
    config = configurator.make(BenchConfig, given)
    for name, why in without_effect(vars(config), BenchConfig).items():
        if name in given:
            raise UserError(f"{name}={given[name]} has no effect {why}")
    print(json.dumps(BENCHMARKS[config.what](config)))


# --------------------------------------------------------------------------------------
# Training


class Run:
    """A model in training, a step at a time, and what it is scored by; of this program or of nanoGPT."""

    def __init__(self, config: TrainConfig, model_config: ModelConfig, device: str, dtype: str):
        self.config, self.block_size = config, model_config.block_size
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.device)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, as nanoGPT asks for it, too
        random = config.dataset == "random"
        self.dataset = RandomTokens(self.block_size) if random else open_dataset(config, model_config)

    def step(self, it: int) -> None:
        """Step number it, the first being 0. It ends when its loss is known, so that a GPU has done its work."""
        raise NotImplementedError

    def take_steps(self, first: int, count: int) -> list[float]:
        """Steps number first and on. Returns the seconds of each."""
        return [timed(lambda it=it: self.step(it)) for it in range(first, first + count)]

    def val_loss(self) -> float:
        """Nats a token over the whole validation split, in blocks of block_size, in float32 or, on CUDA, TF32."""
        return evaluate(self.model, self.dataset, replace(self.config, eval_iters=None), self.device, torch.float32)

    @torch.no_grad()
    def crops_loss(self) -> float:
        """As nanoGPT counts it: the mean over 200 batches of random crops of the validation split."""
        draw, losses = np.random.default_rng(1337), []
        self.model.eval()
        for _ in range(200):
            starts = draw.integers(len(self.dataset.val) - self.block_size, size=self.config.batch_size)
            losses.append(self.model(**to_device(self.dataset.blocks("val", starts), self.device))[1].item())
        self.model.train()
        return statistics.mean(losses)

    def faster_model(self) -> nn.Module:
        """The model, on a GPU compiled before any step is timed."""
        if self.device.type != "cuda":
            return self.model
        return compiled(self.model, self.dataset, self.config, self.device, self.dtype)


class Ours(Run):
    """Steps as train.py takes them."""

    def __init__(self, config: TrainConfig, model_config: ModelConfig, device: str, dtype: str, compile: bool = True):
        keep_freed_memory()
        super().__init__(config, model_config, device, dtype)
        self.batches = ReadAhead(self.dataset) if self.device.type == "cuda" else self.dataset
        self.model = build_model(config, model_config, self.dataset).to(self.device)
        self.net = self.faster_model() if compile else self.model
        self.optimizer = build_optimizer(config, self.model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def step(self, it: int) -> None:
        self.optimizer.set_rates(self.config.rate(it) / self.config.learning_rate)
        loss, _, _ = train_step(
            it, self.net, self.batches, self.optimizer, self.scaler, self.config, self.device, self.dtype
        )
        loss.item()

    def flops_per_token(self) -> int:
        return flops_per_token(self.model)


class NanoGPT(Run):
    """nanoGPT's model and optimizer, the body of its loop and its way of drawing batches."""

    def __init__(self, config: TrainConfig, model_config: ModelConfig, device: str, checkout: Path):
        super().__init__(config, model_config, device, "bfloat16" if pick_device(device).type == "cuda" else "float32")
        if config.dataset != "random" and not self.reads(self.dataset.folder):
            raise UserError(f"{self.dataset.folder} is not one file of uint16 tokens, which is all that nanoGPT reads")
        spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its dataclass looks itself up there
        spec.loader.exec_module(module)
        torch.manual_seed(config.seed)
        shape = {key: getattr(model_config, key) for key in SIZES}
        vocab_size = model_config.vocab_size or self.dataset.tokenizer.vocab_size
        self.model = module.GPT(module.GPTConfig(**shape, vocab_size=vocab_size)).to(self.device)
        self.net = self.faster_model()
        rates = config.weight_decay, config.learning_rate, (config.beta1, config.beta2)
        self.optimizer = self.model.configure_optimizers(*rates, device_type=self.device.type)
        self.next_batch = self.get_batch()

    def reads(self, folder: Path) -> bool:
        return self.dataset.meta["dtype"] == "uint16" and (folder / "train.bin").exists()

    def get_batch(self) -> tuple[Tensor, Tensor]:
        if self.config.dataset == "random":
            return tuple(to_device(self.dataset.batch(0, self.config.batch_size), self.device).values())
        path, T = self.dataset.folder / "train.bin", self.block_size
        data = np.memmap(path, dtype=np.uint16, mode="r")  # opened anew for each batch, as there
        starts = torch.randint(len(data) - T, (self.config.batch_size,))
        idx = torch.stack([torch.from_numpy(data[i : i + T].astype(np.int64)) for i in starts])
        targets = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + T].astype(np.int64)) for i in starts])
        return tuple(to_device({"idx": idx, "targets": targets}, self.device).values())

    def step(self, it: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(it)
        with autocast(self.device, self.dtype):
            _, loss = self.net(*self.next_batch)
        self.next_batch = self.get_batch()
        loss.backward()
        if self.config.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()


class RandomTokens:
    """Batches of tokens that mean nothing, where only the time counts: as large as GPT-2's vocabulary."""

    task = TokenDataset.task
    tokenizer = types.SimpleNamespace(vocab_size=50257)

    def __init__(self, block_size: int):
        self.block_size = block_size

    def batch(self, index: int, batch_size: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(self.tokenizer.vocab_size, (batch_size, self.block_size + 1), generator=generator)
        return {"idx": ids[:, :-1], "targets": ids[:, 1:].contiguous()}


def read_config(config: BenchConfig, default: str | None = None) -> tuple[TrainConfig, ModelConfig]:
    """The settings of the config file, or of the default one, or else nanoGPT's CPU preset."""
    if path := config.config or default:
        given = configurator.read([path], ModelConfig, TrainConfig)
        train_config, model_config = (configurator.make(cls, given) for cls in (TrainConfig, ModelConfig))
    else:
        train_config, model_config = PRESET, SHAPE
    if config.dataset is not None:
        train_config = replace(train_config, dataset=config.dataset)
    if train_config.ema_decay:
        raise UserError(f"ema_decay={train_config.ema_decay} is not timed here; take a config without it")
    pick_dtype(config.dtype or "auto", pick_device(config.device))  # said now, and not by another process
    name = train_config.dataset
    if name == "random":
        if config.what == "loss" or model_config.ngrams:
            raise UserError("dataset=random has nothing to learn and no frequent runs: not for what=loss, nor ngrams")
    elif not (Path("data") / name).exists():
        raise UserError(f"no data/{name}; run: python prepare_data.py {name}")
    elif open_dataset(train_config, model_config).task != "language modelling":
        raise UserError(f"dataset={name} has pairs, and what={config.what} is for text in one stream")
    return train_config, model_config


def bench_train(config: BenchConfig) -> dict:
    train_config, model_config = read_config(config)
    train_config = replace(train_config, gradient_accumulation_steps=1)
    arguments = (train_config, model_config, config.device, config.dtype or "float32")
    runs = {"ours": (Ours, *arguments)}
    if config.nanogpt:
        others = replace(ModelConfig(), **{key: getattr(model_config, key) for key in (*SIZES, "vocab_size")})
        if model_config != others or train_config.optimizer != "adamw":
            raise UserError(f"config={config.config} is no GPT-2 trained by AdamW, which is all that nanoGPT can be")
        runs["nanogpt"] = (NanoGPT, train_config, model_config, config.device, Path(config.nanogpt))
    seconds, turn = {name: [] for name in runs}, 10  # steps of the one, then of the other
    with in_processes(runs) as ask, tqdm(total=config.steps + WARMUP, unit="step", disable=None) as bar:
        for first in range(0, config.steps + WARMUP, turn):
            count = min(turn, config.steps + WARMUP - first)
            for name in runs:
                seconds[name] += ask[name]("take_steps", first, count)
            bar.update(count)
        flops = ask["ours"]("flops_per_token")
    medians = {name: statistics.median(each[WARMUP:]) for name, each in seconds.items()}
    tokens, peak = train_config.batch_size * model_config.block_size, peak_flops(pick_device(config.device))
    result = {}
    for name, median in medians.items():
        result |= {f"{name}_ms": round(1000 * median, 2), f"{name}_tokens_per_second": round(tokens / median)}
        if peak:
            result[f"{name}_mfu"] = round(tokens / median * flops / peak, 4)
    if config.nanogpt:
        result["speedup"] = round(medians["nanogpt"] / medians["ours"], 3)
    return result


@contextmanager
def in_processes(runs: dict[str, tuple]) -> Iterator[dict[str, Callable]]:
    """Each run in a process of its own. Gives {name: ask}: ask("method", *arguments) is what that method returns.

    runs: {name: (class, *arguments)}. While one works, the others wait for a message.
    """
    context, ask, processes = multiprocessing.get_context("spawn"), {}, []
    try:
        for name, run in runs.items():
            here, there = context.Pipe()
            processes.append(context.Process(target=answer, args=(there, *run), daemon=True))
            processes[-1].start()
            there.close()
            ask[name] = partial(ask_for, here)
        yield ask
    finally:
        for process in processes:
            process.terminate()
            process.join()


def ask_for(connection: Connection, *question: object) -> object:
    try:
        connection.send(question)
        found = connection.recv()
    except (EOFError, ConnectionError) as error:
        raise UserError("a run ended before its time; what it said stands above") from error
    if isinstance(found, UserError):
        raise found
    return found


def answer(connection: Connection, cls: type, *arguments: object) -> None:
    with suppress(EOFError):
        try:
            run = cls(*arguments)
        except UserError as error:
            connection.recv()
            connection.send(error)
        while True:
            method, *given = connection.recv()
            connection.send(getattr(run, method)(*given))


# --------------------------------------------------------------------------------------
# Time to a loss


def bench_loss(config: BenchConfig) -> dict:
    ours, our_shape = read_config(config, "config/shakespeare_char.py")
    theirs = replace(PRESET, dataset=ours.dataset)
    rows = []
    for seed in range(1, config.seeds + 1):
        run = (NanoGPT, replace(theirs, seed=seed), SHAPE, config.device, Path(config.nanogpt))
        with in_processes({"nanogpt": run}) as ask:
            row = train_to(ask["nanogpt"], theirs.max_iters, 100, config.target)
        told = {f"nanogpt_{key}": value for key, value in row.items()}
        run = (replace(ours, seed=seed), our_shape, config.device, config.dtype or "auto")
        with in_processes({"ours": (Ours, *run)}) as ask:  # to see how many steps fit into the same time
            each = statistics.mean(ask["ours"]("take_steps", 0, 3 * WARMUP)[WARMUP:])
        steps = max(1, int(0.8 * row["seconds"] / each))  # with room for a machine that others slow down
        run = (replace(run[0], max_iters=steps, lr_decay_iters=None), *run[1:])
        with in_processes({"ours": (Ours, *run)}) as ask:
            row = train_to(ask["ours"], steps, 5, config.target)
        told |= {f"ours_{key}": value for key, value in row.items()} | {"ours_steps": steps}
        if told["ours_seconds_to_target"]:
            # where nanoGPT has not come there, its whole time counts
            to_target = told["nanogpt_seconds_to_target"] or told["nanogpt_seconds"]
            told["speedup"] = to_target / told["ours_seconds_to_target"]
        rows.append({key: round(value, 4) for key, value in told.items() if value is not None})
        print(f"seed {seed}: {json.dumps(rows[-1])}", flush=True)
    keys = [key for key in rows[0] if all(key in row for row in rows)]
    return {key: round(statistics.median(row[key] for row in rows), 4) for key in keys} | {"target": config.target}


def train_to(ask: Callable, steps: int, interval: int, target: float) -> dict:
    """Train for so many steps; until the target is reached, the validation loss is read after every interval of them.

    Returns the seconds of all steps, those to the target (None: not reached), and both losses at the end. The loss is
    taken to fall in a straight line from one evaluation to the next.
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
                    missed = (target - loss) / (before - loss) if before else 0  # share of these steps after the target
                    reached = seconds - taken * missed
                before = loss
    losses = {"val_loss": loss if reached is None else ask("val_loss"), "crops_loss": ask("crops_loss")}
    return {"seconds": seconds, "seconds_to_target": reached, **losses}


# --------------------------------------------------------------------------------------
# Where the time goes


def bench_profile(config: BenchConfig) -> dict:
    """Parts of a step, measured one by one, and the operators that take longest, as torch's profiler tells them."""
    settings = read_config(config, "config/shakespeare_char.py")
    run = Ours(*settings, config.device, config.dtype or "auto", compile=False)
    run.batches = run.dataset  # not ahead of the step, on another thread
    run.take_steps(0, WARMUP)
    seconds: dict[str, float] = {}
    parts = [
        ("read a batch", run.dataset, "batch"),
        ("forward", run.model, "forward"),
        ("backward", Tensor, "backward"),
        ("clip", nn.utils, "clip_grad_norm_"),
        ("optimizer", run.optimizer, "step"),
    ]
    with ExitStack() as watched:
        for name, owner, method in parts:
            watched.enter_context(stopwatch(name, owner, method, seconds, run.device))
        seconds["whole step"] = sum(run.take_steps(WARMUP, config.steps))
    ms = {name: 1000 * value / config.steps for name, value in seconds.items()}
    print("\n".join(f"{name:<14}{each:9.2f} ms {each / ms['whole step']:6.1%}" for name, each in ms.items()))
    steps = min(config.steps, 20)
    with torch.profiler.profile() as profile:
        run.take_steps(WARMUP + config.steps, steps)
    on_gpu = run.device.type == "cuda"
    operators = [e for e in profile.key_averages() if e.device_type == DeviceType.CPU]  # the others are their kernels
    spent = {e.key: (e.self_device_time_total if on_gpu else e.self_cpu_time_total) for e in operators}
    calls = {e.key: e.count for e in operators}
    whole = sum(spent.values())
    print(f"\n{'operator':<48}{'ms a step':>10}{'share':>8}{'calls':>8}")
    for name, microseconds in sorted(spent.items(), key=lambda item: -item[1])[:15]:
        share = microseconds / whole
        print(f"{name[:47]:<48}{microseconds / 1000 / steps:10.2f}{share:8.1%}{calls[name] / steps:8.0f}")
    return {name.replace(" ", "_") + "_ms": round(each, 3) for name, each in ms.items()}


@contextmanager
def stopwatch(name: str, owner: object, method: str, seconds: dict, device: torch.device) -> Iterator[None]:
    """Within this, calls of the method add their time to seconds[name]; a GPU's work is waited for."""
    original = getattr(owner, method)

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    def watched(*arguments, **keys):
        wait()
        began = time.perf_counter()
        result = original(*arguments, **keys)
        wait()
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
        return result

    own = method in vars(owner)
    setattr(owner, method, watched)
    try:
        yield
    finally:
        setattr(owner, method, original) if own else delattr(owner, method)


# --------------------------------------------------------------------------------------
# Data


def bench_prepare(config: BenchConfig) -> dict:
    """prepare_data.py on the whole text; every 8 seconds it stands still while tiktoken encodes a part on one core."""
    shutil.rmtree("data/bench", ignore_errors=True)
    tokenizer = BytePairTokenizer.gpt2()
    with Path(config.input).open(encoding="utf-8") as file:
        texts = [file.read(1 << 18) for _ in range(80)]  # 20 MB
    size = sum(len(text.encode()) for text in texts)
    encode_alone = lambda: [tokenizer.engine.encode_ordinary(text) for text in texts]  # noqa: E731
    began, most, alone = time.perf_counter(), 0, []
    command = [sys.executable, str(PREPARE), "bench", f"--input={config.input}", "--tokenizer=gpt2"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            most = max(most, sum(map(resident_bytes, family(process.pid))))
            if time.perf_counter() - began > 8 * (len(alone) + 1) + sum(alone):
                paused = family(process.pid)
                for pid in paused:
                    os.kill(pid, signal.SIGSTOP)
                alone.append(timed(encode_alone))
                for pid in reversed(paused):
                    os.kill(pid, signal.SIGCONT)
            time.sleep(0.05)
    if process.returncode:
        raise UserError(f"prepare_data.py ended with {process.returncode}")
    speed = Path(config.input).stat().st_size / (time.perf_counter() - began - sum(alone)) / 1e6
    alone = alone or [timed(encode_alone)]
    core = size / statistics.mean(alone) / 1e6
    return {
        "mb_per_second": round(speed, 2),
        "tiktoken_alone_mb_per_second": round(core, 2),
        "cores": os.cpu_count(),
        "share": round(speed / core / os.cpu_count(), 3),
        "most_memory_mb": round(most / 1e6),
    }


def timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def family(pid: int) -> list[int]:
    """A process and all that it started, as Linux lists them."""
    found = [pid]
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [each for child in path.read_text().split() for each in family(int(child))]
    return found


def resident_bytes(pid: int) -> int:
    with suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def bench_read(config: BenchConfig) -> dict:
    """Batches in the order of training. Memory that the process owns is told from mapped pages of the files."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    dataset = TokenDataset(Path("data") / (config.dataset or "shakespeare_char"), config.block_size, seed=1337)
    dataset.batch(0, config.batch_size)
    first = time.perf_counter() - began
    for index in range(100):
        dataset.batch(index, config.batch_size)
    before, began = own_memory(), time.perf_counter()
    for index in trange(config.batches, disable=not sys.stderr.isatty()):
        dataset.batch(index, config.batch_size)
    seconds = time.perf_counter() - began
    return {
        "tokens_per_second": round(config.batches * config.batch_size * config.block_size / seconds),
        "first_batch_seconds": round(first, 3),
        "growth_mb": round((own_memory() - before) / 1e6, 1),
    }


def own_memory() -> int:
    """Resident bytes that are not pages of files, as Linux counts them."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


BENCHMARKS = {"train": bench_train, "loss": bench_loss, "profile": bench_profile}
BENCHMARKS |= {"prepare": bench_prepare, "read": bench_read}


if __name__ == "__main__":
    configurator.run(main)
