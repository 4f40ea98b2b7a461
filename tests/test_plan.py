"""--minutes: the choice of a model and the clock that ends its training. Time is simulated."""

import itertools
import math
import re
import shutil
import signal
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_RUN, read_rows
from humptygpt.model import ModelConfig, Stack, count_parameters, flops_per_token
from test_chat import chat, write_chats
from texts import make_text

import prepare_data
import train
from humptygpt import cli
from humptygpt import machine as cores
from humptygpt.cli import UserError
from humptygpt.data.chat_dataset import ChatDataset
from humptygpt.formats import checkpoint
from humptygpt.models.build import MODELS, build_on_meta, make_model_config
from humptygpt.training import evaluation, memory
from humptygpt.training import minutes as plan
from humptygpt.training import run as runs
from humptygpt.training.optimizers import trained_parameters
from humptygpt.training.settings import RECIPE, TrainConfig
from humptygpt.training.start import read_settings

CPU = torch.device("cpu")
OUT = Path("out/run")
LANGUAGE_MODELS = [name for name, (_, learns) in MODELS.items() if "language modelling" in learns]
LENGTH = ("--max_iters", "--eval_interval", "--eval_iters", "--warmup_iters")
DEMO = str(cli.CONFIGS / "shakespeare_char.py")
TIMED = [argument for argument in TINY_RUN if argument.partition("=")[0] not in LENGTH]
TIMED += ["--schedule=linear", "--min_lr=0.0"]
SHOWN = ["--dataset=tiny", "--out_dir=out/run", "--device=cpu", "--dtype=float32"]
RESUME = ["--init_from=resume", "--out_dir=out/run"]


class Machine:
    """A machine with simulated time: only starts, steps and evaluations take time.

    Only the first step of a command trains, because the clock does not care what the others compute.
    """

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.start = 2.0  # seconds before a command first looks at the clock
        self.step = lambda: 0.1
        self.evaluation = 0.0
        self.patch = monkeypatch
        self.steps = 0
        self.stop_at = math.inf
        clock = SimpleNamespace(monotonic=lambda: self.now, perf_counter=lambda: self.now, time=lambda: self.now)
        monkeypatch.setattr(plan, "time", clock)
        monkeypatch.setattr(runs, "time", clock)
        monkeypatch.setattr(plan, "seconds_per_step", lambda *args: self.step())
        monkeypatch.setattr(train, "train_step", partial(self.train_step, train.train_step))
        monkeypatch.setattr(
            evaluation,
            "validation_loss",
            partial(self.evaluate, evaluation.validation_loss),
        )
        monkeypatch.setattr(train, "catch_signals", self.catch_signals)

    def run(self, *argv: str, code: int = 0) -> list[dict]:
        """Train and return the rows of metrics."""
        self.patch.setattr(cores, "STARTED", self.now)
        self.now += self.start
        self.first_step = None
        assert train.main([*argv]) == code
        out_dirs = [key for key in argv if key.startswith("--out_dir=")]
        return read_rows(Path(out_dirs[-1].removeprefix("--out_dir=")) if out_dirs else OUT)

    def train_step(self, train_step, run):
        self.now += self.step()
        self.steps += 1
        if self.steps == self.stop_at:
            self.signals.append(signal.SIGTERM)
        self.first_step = self.first_step or train_step(run)
        return self.first_step

    def evaluate(self, evaluate, run, net, eval_iters):
        whole = eval_iters is None
        self.now += self.evaluation * (evaluation.cost_of_whole_split(run) if whole else 1)
        return evaluate(run, net, eval_iters)

    @contextmanager
    def catch_signals(self):
        self.signals = []
        yield self.signals


@pytest.fixture
def machine(monkeypatch) -> Machine:
    return Machine(monkeypatch)


def progress() -> dict:
    return checkpoint.read(OUT / "ckpt.pt")["progress"]


def last_lr(rows: list[dict]) -> float:
    return [row["lr"] for row in rows if "lr" in row][-1]


# --------------------------------------------------------------------------------------
# The clock


SPEEDS = {
    "constant": lambda machine: 0.1,
    "half as fast halfway": lambda machine: 0.1 if machine.now < 6 else 0.2,
    "twice as fast halfway": lambda machine: 0.1 if machine.now < 6 else 0.05,
    "one long pause": lambda machine: 2.5 if machine.steps == 30 else 0.1,
}


@pytest.mark.parametrize("evaluation, evaluated", [(0.0, 20), (0.35, 20), (0.1, 1)])
@pytest.mark.parametrize("speed", SPEEDS)
def test_training_ends_within_a_step_of_its_minutes_with_the_last_learning_rate(
    tiny, machine, monkeypatch, capsys, speed, evaluation, evaluated
):
    monkeypatch.setattr(TrainConfig, "evaluated_batches", lambda self: evaluated)
    machine.step = lambda: SPEEDS[speed](machine)
    machine.evaluation = evaluation
    Path("config.py").write_text("max_iters = 5\nlr_decay_iters = 600000\nmin_lr = 0.0\n")
    rows = machine.run("config.py", *TIMED, "--minutes=0.2")
    step = machine.step()
    assert machine.now == pytest.approx(12 - runs.ENDING - evaluation, abs=step)
    whole = "the whole validation split: " in capsys.readouterr().out
    assert whole == (evaluated == 1)
    assert last_lr(rows) < 0.1 * read_config()["learning_rate"]
    assert sum("val_loss" in row for row in rows) in (3, 4, 5)
    assert progress()["position"] == read_config()["max_iters"]


def read_config() -> dict:
    """Return the settings as they were planned."""
    saved = checkpoint.read(OUT / "ckpt.pt")
    return saved["train_config"] | saved["model_config"]


@pytest.mark.parametrize("step", [0.05, 0.2])
def test_each_row_says_how_far_the_run_is_and_the_last_that_it_is_done_whatever_was_planned(tiny, machine, step):
    machine.step = lambda: step if machine.steps else 0.1
    rows = machine.run(*TIMED, "--minutes=0.1")
    positions = [row["position"] for row in rows]
    planned = read_config()["max_iters"]
    assert positions == sorted(positions) and positions[-1] == planned
    assert (rows[-1]["iter"] > planned) == (step < 0.1)


@pytest.mark.parametrize("keys", [[], ["--n_members=2"]])
def test_a_stopped_run_resumes_with_the_minutes_that_are_left(tiny, machine, keys):
    machine.evaluation = 0.2
    machine.stop_at = 40
    machine.run(*TIMED, *keys, "--minutes=0.2", code=143)
    stopped, at = progress(), machine.now
    assert stopped["iter"] == 40 and stopped["run_seconds"] == at
    lr = last_lr(read_rows(OUT))
    machine.now += 1000  # the run is resumed later
    rows = machine.run(*RESUME)
    assert machine.now - 1000 == pytest.approx(12 - runs.ENDING - 0.2, abs=0.1)
    resumed = [row["lr"] for row in rows if "lr" in row and row["iter"] > 40]
    assert lr > resumed[0] > 0.9 * lr and last_lr(rows) < 0.1 * read_config()["learning_rate"]
    assert progress()["run_seconds"] == pytest.approx(machine.now - 1000)
    assert progress()["position"] == read_config()["max_iters"] > stopped["position"]


def test_a_finished_run_goes_on_by_more_minutes_or_by_its_steps(tiny, machine, fails, capsys):
    losses = itertools.count(3.0, -0.01)
    machine.patch.setattr(evaluation, "validation_loss", lambda *args: (next(losses), 0.0))
    machine.run(*TIMED, "--minutes=0.1")
    steps = progress()["iter"]
    for less in ([], ["--minutes=0.02"]):
        machine.run(*RESUME, *less)
        assert progress()["iter"] == steps
        out, errors = capsys.readouterr()
        assert f"all {steps} steps are done; for more, use --minutes=N above 0.1\n" in errors
        assert "--out_dir=out/run --minutes=0.2\n" in out
    machine.now = 1000.0
    machine.run(*RESUME, "--minutes=0.2")
    assert progress()["run_seconds"] == pytest.approx(12 - runs.ENDING, abs=0.1)
    line = rf"steps: about {2 * steps} of .*; {steps} are done\n"
    assert re.search(line, capsys.readouterr().out)
    steps = progress()["iter"]
    machine.run(*RESUME, f"--max_iters={steps + 5}")
    assert progress()["iter"] == progress()["position"] == steps + 5
    assert read_config()["minutes"] is None
    complaint = f"all {steps + 5} steps are done; for more, use --max_iters=N: minutes were"
    assert fails(train.main, *RESUME, "--minutes=9").startswith(complaint)


def test_a_run_whose_only_evaluation_is_its_last_ends_on_time_also_resumed(tiny, machine):
    # all 25 blocks of the validation split
    once = ["--batch_size=1", "--eval_iters=1000", "--eval_interval=100000"]
    machine.evaluation = 25 / 3 * 0.1
    ended = pytest.approx(12 - runs.ENDING - machine.evaluation, abs=0.1)
    machine.run(*TIMED, *once, "--minutes=0.2")
    assert machine.now == ended
    machine.now = 0.0
    machine.stop_at = machine.steps + 20
    shutil.rmtree("out")
    machine.run(*TIMED, *once, "--minutes=0.2", code=143)
    machine.run(*RESUME)
    assert machine.now == ended


def test_a_run_reserves_the_time_that_its_model_takes_for_the_text_at_the_end(tiny, machine):
    def write(seconds: float, model, dataset, count: int = 3) -> str:
        machine.now += seconds
        return ""

    task = replace(
        evaluation.TEXT,
        evaluation_examples=partial(write, 0.2),
        final_examples=partial(write, 1.0),
    )
    machine.patch.setattr(evaluation, "TEXT", task)
    machine.run(*TIMED, "--minutes=0.2")
    assert machine.now == pytest.approx(12 - runs.ENDING, abs=0.11)


def test_more_evaluations_than_fit_neither_end_a_run_early_nor_late(tiny, machine):
    machine.evaluation = 1.0
    rows = machine.run(*TIMED, "--minutes=0.2", "--eval_interval=1")
    assert machine.now == pytest.approx(12 - runs.ENDING - 1, abs=1.1)
    assert sum("val_loss" in row for row in rows) > 3


# --------------------------------------------------------------------------------------
# The choice


built = cache(build_on_meta)


def seconds_per_step(config: TrainConfig, size: ModelConfig, *args) -> float:
    """Time of a step on a machine with 100 billion operations per second. Dropout takes half as long again."""
    one = built(replace(size, dropout=0.0, n_members=1))
    operations = size.n_members * flops_per_token(one)
    seconds = 0.003 + operations * config.batch_size * size.block_size / 1e11
    return 1.5 * seconds if size.dropout else seconds


@pytest.fixture
def choose(monkeypatch):
    """Choose a plan for a text of this many bytes, with the recipe and these keys."""
    monkeypatch.setattr("humptygpt.training.memory.build_on_meta", lambda config, training: built(config))
    monkeypatch.setattr(plan, "seconds_per_step", seconds_per_step)
    monkeypatch.setattr(plan, "time", SimpleNamespace(perf_counter=lambda: 2.0))
    monkeypatch.setattr(cores, "STARTED", 0.0)

    def chosen(text: int, minutes: float, **given) -> tuple[TrainConfig, ModelConfig]:
        settings = cli.read([DEMO], ModelConfig, TrainConfig)
        settings |= {"vocab_size": 65, "minutes": minutes, "dtype": "float32"}
        settings |= given
        dataset = SimpleNamespace(
            task="language modelling",
            train=SimpleNamespace(targets=text),
            splits=("train", "val"),
            val_bytes_per_token=lambda: 1.0,
            target_fraction=1.0,
            contexts=lambda sizes: [size for size in sizes if size < text],
            resize=lambda size: None,
            val_starts=lambda size, batches: range(size),
        )
        config = cli.make(TrainConfig, settings)
        model_config = make_model_config(settings)
        clock = runs.Clock(runs.Progress(), minutes)
        return plan.begin(config, model_config, given, dataset, clock, CPU)

    return chosen


TEXTS = (300, 10_000, 1_000_000, 100_000_000)
MINUTES = (0.1, 1, 3, 10, 30, 300, 10_000)


def size(model_config: ModelConfig) -> int:
    return plan.SIZES.index((model_config.n_layer, model_config.n_embd))


@pytest.mark.parametrize("text", [size for size in TEXTS if size > 10**4])
def test_more_time_never_means_a_smaller_model(choose, text):
    sizes = [size(choose(text, minutes)[1]) for minutes in MINUTES]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


@pytest.mark.parametrize("minutes", MINUTES)
def test_no_model_is_so_large_that_it_learns_the_text_by_heart(choose, minutes):
    for text, most in ((100_000, 800_000), (1_000_000, 3_000_000)):
        assert plan.count_inner(built(choose(text, minutes)[1])) <= most


def test_a_small_text_gets_dropout_and_more_weight_decay_unless_a_model_is_fine_tuned(
    choose,
):
    found = [choose(text, 3) for text in TEXTS]
    dropouts = [model_config.dropout for _, model_config in found]
    decays = [config.weight_decay for config, _ in found]
    for rates in (dropouts, decays):
        assert rates == sorted(rates, reverse=True)
    assert dropouts[0] > 0.1 and dropouts[-1] == 0.0
    assert decays[0] == 1.0 and decays[-1] < 0.01  # the default is 0.1
    assert choose(300, 3, init_from="out/other")[0].weight_decay == 0.1


def test_more_time_than_one_model_needs_for_a_text_goes_to_more_members(choose):
    found = [choose(100_000, minutes)[1].n_members for minutes in MINUTES]
    assert found == sorted(found) and found[:2] == [1, 1] and found[4] > found[3] > 1
    assert {choose(10**8, minutes)[1].n_members for minutes in MINUTES[:-1]} == {1}
    assert choose(100_000, 30, init_from="out/other")[1].n_members == 1
    assert choose(100_000, 30, model="window_mlp", window=8)[1].n_members == 1
    one, several = (choose(100_000, 30, **keys)[1] for keys in ({"n_members": 1}, {}))
    assert one.n_members == 1 and one.dropout > several.dropout


def test_six_members_read_a_text_ten_times_each_and_more_of_them_twenty_times():
    found = [plan.count_members(epochs) for epochs in (4, 16, 60, 120, 200)]
    assert found == [1, 2, 6, 6, 10]


def test_no_more_members_are_chosen_than_fit_into_memory(choose, monkeypatch):
    wanted = choose(10_000, 30)[1].n_members

    def limited(config: TrainConfig, size: ModelConfig, *args) -> float:
        if size.n_members > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return seconds_per_step(config, size)

    monkeypatch.setattr(plan, "seconds_per_step", limited)
    assert wanted > 3 >= choose(10_000, 30)[1].n_members > 1


GIVEN = {
    "n_members": 3,
    "n_layer": 3,
    "n_embd": 200,
    "n_head": 8,
    "n_kv_head": 2,
    "head_size": 32,
    "dropout": 0.05,
    "weight_decay": 0.2,
    "eval_interval": 7,
    "warmup_iters": 3,
    "lr_decay_iters": 5,
    "batch_size": 2,
    "block_size": 32,
    "learning_rate": 1e-4,
}


@pytest.mark.parametrize("key", GIVEN)
def test_a_given_key_is_obeyed_and_the_rest_is_chosen(choose, key):
    config, model_config = choose(10_000, 3, **{key: GIVEN[key]})
    settings = vars(config) | vars(model_config)
    assert settings[key] == GIVEN[key]
    chosen = {"max_iters": 2400, "eval_interval": 600, "dropout": 0.0, "weight_decay": 0.1}
    for other in chosen.keys() - {key}:
        assert settings[other] != chosen[other], other
    _, larger = choose(10**8, 10_000, **{key: GIVEN[key]})
    for other in {"n_layer", "n_embd"} - {key}:
        assert settings[other] < getattr(larger, other), other


@pytest.fixture
def timed(choose, monkeypatch) -> list[tuple[int, int]]:
    """(n_layer, n_embd) of each trial."""
    trials = []

    def time_step(config: TrainConfig, size: ModelConfig, *args) -> float:
        trials.append((size.n_layer, size.n_embd))
        return seconds_per_step(config, size)

    monkeypatch.setattr(plan, "seconds_per_step", time_step)
    return trials


def test_sizes_are_timed_in_ascending_order_until_one_promises_more_loss(choose, timed):
    found = []
    for minutes in MINUTES[:-1]:
        timed.clear()
        chosen = size(choose(100_000_000, minutes)[1])
        assert timed[: chosen + 2] == [*plan.SIZES[: chosen + 2]]
        assert {*timed[chosen + 2 :]} <= {plan.SIZES[chosen]}  # with dropout
        found.append(chosen)
    assert found[0] == 0 and 2 < found[-1] < len(plan.SIZES) - 1


def test_a_size_that_is_given_or_loaded_is_the_only_one_timed(choose, timed):
    keys = {"init_from": "out/other"}, {"n_layer": 4, "n_embd": 128}
    for given in keys:
        timed.clear()
        _, model_config = choose(100_000_000, 300, **given)
        assert {*timed} == {(4, 128)} == {(model_config.n_layer, model_config.n_embd)}
    assert choose(100_000_000, 300, **keys[0])[1].block_size == 256  # as loaded


def test_the_context_is_the_longest_that_the_text_allows(choose):
    contexts = [choose(text, 3)[1].block_size for text in (100, 200, 300, 1000, 10**8)]
    assert contexts == [256, 128, 256, 512, 512]  # the first text is shorter than any


def test_a_step_has_more_tokens_if_the_text_has_more_bytes_for_each_parameter(choose):
    steps = [plan.tokens_per_step(1000, text) for text in (10, 999, 1000, 2000, 10**9)]
    assert steps == [1024, 1024, 2048, 4096, 4096]
    for text, accumulated in ((10_000, 1), (100_000_000, 1), (100_000_000, 4)):
        config, chosen = choose(text, 3, gradient_accumulation_steps=accumulated)
        tokens = config.batch_size * accumulated * chosen.block_size
        assert tokens == plan.tokens_per_step(plan.count_inner(built(chosen)), text)
    assert choose(100_000_000, 3, gradient_accumulation_steps=100)[0].batch_size == 1


def test_a_plan_takes_the_time_that_is_left_also_with_dropout(choose):
    for text, dropped, slower in ((100_000_000, False, 1), (10_000, True, 1.5)):
        config, model_config = choose(text, 3)
        assert bool(model_config.dropout) == dropped
        step = plan.seconds_per_step(config, replace(model_config, dropout=0.0))
        seconds = plan.TIME_TO_TRAIN * (178 - runs.ENDING)
        assert config.max_iters == int(seconds / (slower * step))
        assert config.eval_interval == math.ceil(config.max_iters / plan.EVALUATIONS)


def test_every_size_keeps_the_architecture_and_can_be_built():
    config = ModelConfig(vocab_size=65, n_layer=4, n_head=2, n_kv_head=2, n_embd=128)
    shapes = plan.sizes(config, {"n_kv_head"})
    assert [(shape.n_layer, shape.n_embd) for shape in shapes] == [*plan.SIZES]
    for shape in shapes:
        assert shape.n_kv_head == 2 and shape.block_size == config.block_size
        assert flops_per_token(built(shape)) > 2 * plan.count_inner(built(shape)) > 0


def test_a_number_of_heads_that_fits_no_size_leaves_the_model_as_configured():
    config = ModelConfig(n_head=11, n_embd=704)
    assert plan.sizes(config, {"n_head"}) == [config]


@pytest.mark.parametrize(
    "keys",
    [
        ["--n_members=1", "--position=learned", "--freeze=wpe"],
        ["--init_from=out/base", "--lora_rank=2"],
    ],
)
def test_a_trial_trains_as_the_run_will(tiny, small_sizes, monkeypatch, keys):
    assert train.main([*TINY_RUN, "--out_dir=out/base"]) == 0
    models = []
    assemble = plan.assemble
    monkeypatch.setattr(plan, "assemble", lambda *args: models.append(args[2]) or assemble(*args))
    argv = [*keys, "--minutes=100000", "--checkpoint_activations=True"]
    run = train.setup(read_settings([*TIMED, *argv]))
    trained = set()
    for model in (models[0], run.model):
        stacks = [module for module in model.modules() if isinstance(module, Stack)]
        assert stacks and all(stack.checkpoint_activations for stack in stacks)
        names = trained_parameters(model)
        trained.add(frozenset(name.split(".")[-2] for name in names))
    (kinds,) = trained
    assert "wpe" not in kinds and ("lora_A" in kinds) == ("--lora_rank=2" in keys)


def test_the_search_ends_at_a_trial_that_runs_out_of_memory(tiny, machine, fails):
    tried = []

    def seconds_per_step(config, size, *args) -> float:
        tried.append(count_parameters(built(size)))
        if len(tried) == 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return 0.01

    machine.patch.setattr(plan, "seconds_per_step", seconds_per_step)
    # only memory ends the search
    machine.patch.setattr(plan, "most_parameters", lambda text: math.inf)
    machine.patch.setattr(plan, "loss", lambda parameters, *args: -parameters)
    argv = [*SHOWN, "--optimizer=adamw", "--overwrite=True", "--minutes=0.06"]
    machine.run(*argv)
    assert tried[2] > tried[1] and len(tried) < 5  # the third is not taken
    machine.patch.setattr(memory, "free_memory", lambda device: 0)
    line = fails(train.main, *argv)
    assert re.fullmatch("training .* takes at least .*, but only 0.0 MB is free; .*\n", line)


@pytest.mark.parametrize("text", TEXTS)
def test_the_law_promises_less_loss_by_more_of_anything(text):
    for parameters in (10**4, 10**6, 10**9):
        for read in (text / 2, text, 3 * text):
            now = plan.loss(parameters, read, text)
            assert plan.loss(2 * parameters, read, text) <= now
            assert plan.loss(parameters, 2 * read, text) <= now
            assert plan.loss(parameters, read, 2 * text) <= now


# --------------------------------------------------------------------------------------
# A run by the clock, from the command to its end


@pytest.fixture
def small_sizes(monkeypatch):
    monkeypatch.setattr(plan, "SIZES", ((1, 16), (1, 32), (3, 32)))
    monkeypatch.setattr(plan, "HEAD_SIZE", 16)


@pytest.mark.parametrize("model", LANGUAGE_MODELS)
def test_a_model_is_chosen_by_trials_of_its_steps(tiny, small_sizes, monkeypatch, capsys, model):
    looks = itertools.count()  # each look at the clock takes 10 ms
    monkeypatch.setattr(plan, "time", SimpleNamespace(perf_counter=lambda: next(looks) / 100))
    monkeypatch.setattr(cores, "STARTED", 0.0)
    # a window network of few neurons has a smaller head than its embedding
    keys = [f"--model={model}", "--window=1", "--n_hidden=8", "--batch_size=4"]
    keys.append("--block_size=16")
    if model == "number_mlp":
        keys.append("--n_embd=1")
    assert train.main([*SHOWN, *keys, "--minutes=0.04"]) == 0
    config = read_config()
    sizes = {*plan.SIZES, (ModelConfig.n_layer, ModelConfig.n_embd)}
    if model == "number_mlp":
        sizes = {(n_layer, 1) for n_layer, _ in sizes}
    assert (config["n_layer"], config["n_embd"]) in sizes
    assert config["compile"] is False
    assert f"minutes: 0.04; {config['n_layer']} layers" in capsys.readouterr().out


def test_a_run_whose_trials_took_all_of_its_time_takes_one_step(tiny, machine, small_sizes):
    def seconds_per_step(*args) -> float:
        machine.now += 5
        return 0.1

    machine.patch.setattr(plan, "seconds_per_step", seconds_per_step)
    machine.run(*SHOWN, "--minutes=0.2")
    assert machine.now > 12 and progress()["iter"] == 1


def test_the_config_json_of_a_run_with_minutes_repeats_the_steps_that_it_took(tiny, machine, capsys):
    Path("own.txt").write_text(make_text())
    argv = [argument for argument in TIMED if not argument.startswith("--dataset=")]
    argv += ["--n_members=2"]
    machine.step = lambda: 0.1 if machine.now < 6 else 0.2
    machine.run("--input=own.txt", "--dataset=named", *argv, "--minutes=0.2")
    steps = progress()["iter"]
    planned = read_config()
    assert steps < planned["max_iters"]
    again = "the same steps again: python train.py out/run/config.json --out_dir=out/again\n"
    assert again in capsys.readouterr().out
    settings = cli.read(["out/run/config.json"], ModelConfig, TrainConfig)
    assert settings["max_iters"] == steps and settings["dataset"] == "named"
    assert settings["eval_interval"] < planned["eval_interval"]
    assert settings["minutes"] is None and not settings.keys() & {"input", "threads"}
    assert settings["n_members"] == 2
    Path("own.txt").unlink()  # the prepared data is enough
    rows = machine.run("out/run/config.json", "--overwrite=True")
    assert "has no effect" not in capsys.readouterr().err
    assert progress()["iter"] == steps
    assert sum("val_loss" in row for row in rows) == plan.EVALUATIONS


@pytest.mark.parametrize("start", ["scratch", "out/base"])
def test_the_config_json_of_a_run_that_stopped_early_has_its_learning_rates(tiny, machine, capsys, start):
    machine.run(*TINY_RUN, "--out_dir=out/base")
    machine.patch.setattr(evaluation, "validation_loss", lambda *args: (3.0, 0.0))
    machine.now = 0.0
    machine.step = lambda: 0.2
    machine.patch.setattr(plan, "seconds_per_step", lambda *args: 0.1)
    # without this key, a run from a model has another learning rate
    rate = TrainConfig.learning_rate
    keys = ["--early_stopping=1", "--warmup_iters=16", "--lr_decay_iters=60"]
    keys += [f"--learning_rate={rate}", f"--init_from={start}", "--minutes=0.2"]
    ran = machine.run(*TIMED, *keys)
    taken = progress()
    recorded = read_config()
    assert taken["position"] < 0.7 * recorded["max_iters"]
    capsys.readouterr()
    again = machine.run("out/run/config.json", "--out_dir=out/again")
    assert not re.search("note: .* has no effect", capsys.readouterr().err)
    assert again[-1]["iter"] == pytest.approx(taken["iter"], abs=2)
    lrs = [[row["lr"] for row in rows if "lr" in row] for rows in (ran, again)]
    for lr, before in zip(*lrs, strict=False):
        assert lr == pytest.approx(before, abs=0.1 * rate)
    written = cli.read(["out/run/config.json"], TrainConfig, ModelConfig)
    taken = {"max_iters", "eval_interval", "warmup_iters", "lr_decay_iters", "minutes"}
    left_out = {"input", "overwrite", "threads"}
    for key in recorded.keys() - taken - left_out:
        assert written[key] == recorded[key]


def test_a_model_to_start_from_keeps_its_size(tiny, machine, small_sizes, capsys):
    machine.run(*TINY_RUN)
    OUT.rename("out/base")
    rows = machine.run(*SHOWN, "--init_from=out/base", "--minutes=0.1")
    assert rows[0]["iter"] == 0 and "val_loss" in rows[0]
    line = "minutes: 0.1; 2 layers of 32 features, a context of 16 tokens, dropout 0"
    assert line in capsys.readouterr().out
    saved = checkpoint.read(OUT / "best.pt")["model_config"]
    assert (saved["n_layer"], saved["n_embd"], saved["block_size"]) == (2, 32, 16)


REFUSED = {
    "--max_iters=5": "minutes and max_iters both set the length of the run; give only one\n",
    "--dry_run=True": "minutes has no effect with dry_run or eval_only; leave it out\n",
    "--eval_only=True": "minutes has no effect with dry_run or eval_only; leave it out\n",
    "--minutes=0": "minutes=0.0 must be above 0\n",
    "--minutes=0.001": r"minutes=0.001 is too short for a single step, which takes 0.1 s; .*\n",
}


@pytest.mark.parametrize("argument", REFUSED)
def test_minutes_that_cannot_be_are_refused_in_one_line(tiny, machine, fails, argument):
    machine.patch.setattr(cores, "STARTED", -2.0)
    line = fails(train.main, *TIMED, "--minutes=1", argument)
    assert re.fullmatch(REFUSED[argument], line)
    assert not list(OUT.glob("*.pt"))


def test_conversations_get_a_plan_that_counts_what_is_learned(folder, machine, small_sizes, monkeypatch, capsys):
    write_chats(*(chat(f"what is {i}?", f"it is {i}") for i in range(80)))
    prepare_data.main(["--input=chats.jsonl", "--name=chats"])
    machine.step = lambda: 0.02
    counted = []
    decay = plan.decay
    monkeypatch.setattr(plan, "decay", lambda *args: counted.append(args) or decay(*args))
    machine.run("--dataset=chats", *SHOWN[1:], "--minutes=0.2")
    config = read_config()
    assert config["block_size"] == 256
    assert config["n_members"] > 1  # the replies are read many times
    data = run_data(config)
    [(_, targets, text)] = counted
    assert text == data.meta["splits"]["train"]["target_tokens"]
    batch = data.batch(0, config["batch_size"])["targets"]
    assert targets == pytest.approx((batch >= 0).sum().item(), rel=0.3)
    assert re.search(r"answered word for word: \d of \d", capsys.readouterr().out)


def run_data(config: dict) -> ChatDataset:
    return ChatDataset(Path("data") / config["dataset"], config["block_size"], 0)


def test_minutes_are_for_text_and_one_process(tiny, pairs, fails, monkeypatch):
    line = fails(train.main, *TIMED, "--dataset=pairs", "--minutes=1", "--block_size=64")
    complaint = "minutes=1 works only for prepared text and conversations, not for pairs; use max_iters"
    assert line == f"{complaint} instead\n"
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = fails(train.main, *TIMED, "--minutes=1")
    assert line == "minutes works with one process only; with several, use max_iters\n"


@pytest.mark.whole_ending
def test_the_smallest_texts_train_or_are_refused_in_one_line(folder, machine, capsys):
    Path("own.txt").write_text(make_text(20))
    argv = ["--input=own.txt", *TIMED, "--minutes=0.1"]
    with pytest.raises(UserError, match=r"use more text or a smaller --block_size"):
        machine.run(*argv, "--block_size=256")
    argv.append("--block_size=8")
    rows = machine.run(*argv)
    lines = capsys.readouterr().out.splitlines()
    evaluated = [i for i, line in enumerate(lines) if re.match(r"iter \d+: val loss", line)]
    assert len(evaluated) == sum("val_loss" in row for row in rows) > 3
    assert all(lines[i + 1].startswith("  > ") for i in evaluated)


# --------------------------------------------------------------------------------------
# The defaults


SAYS_RECIPE = f"minutes: settings that are not given are those of {RECIPE}\n"


def test_a_new_gpt_has_the_defaults_and_with_minutes_the_recipe(folder, capsys):
    plain = TrainConfig(dataset="mine", out_dir="out/mine"), ModelConfig()
    assert read_settings(["--dataset=mine"])[:2] == plain
    assert capsys.readouterr().out == ""
    demo = read_settings([DEMO])
    Path("own.py").write_text("dataset = 'mine'\nmlp_conv = 1\n")
    own = read_settings(["own.py", "--minutes=5"])
    assert capsys.readouterr().out == SAYS_RECIPE
    assert own.model_config == replace(demo.model_config, mlp_conv=1)
    changed = {"dataset": "mine", "out_dir": "out/mine", "minutes": 5.0}
    assert own.config == replace(demo.config, **changed)
    assert own.given == changed | {"mlp_conv": 1}


def test_with_minutes_a_number_of_heads_that_does_not_divide_the_default_width_is_obeyed(tiny, machine):
    machine.run(*SHOWN, "--n_head=3", "--minutes=0.1")
    config = read_config()
    assert config["n_head"] == 3 and config["n_embd"] in (192, 576, 768)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "gpt"])
def test_the_recipe_is_for_gpts_only(folder, capsys, name):
    Path("small.py").write_text("n_embd = n_head = 1\nwindow = 8\n")
    found = read_settings(["small.py", f"--model={name}", "--minutes=5"])
    assert found.config == TrainConfig(out_dir="out/shakespeare_char", minutes=5.0)
    assert found.model_config.activation == "gelu" and capsys.readouterr().out == ""


def test_an_input_without_a_length_is_refused(folder, fails):
    Path("own.txt").write_text(make_text())
    asks = "say how long to train on input: --minutes=3 or --max_iters=N\n"
    assert fails(train.main, "--input=own.txt") == asks
    assert not Path("data").exists() and not Path("out").exists()
    for length in ("--minutes=1", "--max_iters=9", "--eval_only=True", "--dry_run=True"):
        read_settings(["--input=own.txt", length])


BACKENDS = [f"backend={name}" for name in TrainConfig.choices()["backend"]]  # of one process


@pytest.mark.parametrize(
    ("files", "answers"),
    [
        (
            ["--minutes=5"],
            ["block=plain", "model=number_mlp", "parallel=ddp", "parallel=fsdp", *BACKENDS],
        ),
        ([], ["model=number_mlp", "parallel=ddp", "parallel=fsdp", *BACKENDS]),
    ],
    ids=["recipe", "defaults"],
)
def test_every_choice_of_a_key_goes_with_the_others_or_says_what_does_not(folder, files, answers):
    refused = []
    for key, choices in (ModelConfig.choices() | TrainConfig.choices()).items():
        for choice in choices:
            try:
                read_settings([*files, f"--{key}={choice}", "--window=8"])
            except UserError as error:
                refused.append(f"{key}={choice}")
                assert f"{key}={choice}" in str(error)
    assert refused == answers
