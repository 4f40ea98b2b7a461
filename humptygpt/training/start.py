"""What a command asks for: the settings of a run, and the checkpoint or model that it starts from."""

import importlib
import re
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from humptygpt import cli
from humptygpt.cli import UserError, check_effects, fields_of, note
from humptygpt.formats.load import Loaded, load
from humptygpt.machine import launched
from humptygpt.model import ModelConfig
from humptygpt.models.build import make_model_config
from humptygpt.training.resume import read_run, resumed_settings
from humptygpt.training.run import lock_out_dir, refuse_earlier_run
from humptygpt.training.settings import IN_VAIN, RECIPE, TrainConfig

# keys that set the length of a run, or ask for none
LENGTHS = {"minutes", "max_iters", "dry_run", "eval_only"}


class Start(NamedTuple):
    """The settings of a run, and the checkpoint or model that it starts from."""

    config: TrainConfig
    model_config: ModelConfig
    saved: dict | None = None  # the checkpoint to resume
    base: Loaded | None = None  # the model that the run starts from
    given: Collection[str] = ()  # keys that the command line and its config files set
    overwrite: bool = False


def read_settings(argv: list[str], locks: ExitStack | None = None) -> Start:
    """Read a command line, and the checkpoint that it resumes or the model that it starts from.

    locks: receives the lock on out_dir, taken before the checkpoint is read. A run that writes nothing takes no lock.
    """
    given, typed = read_command(argv)
    overwrite = given.pop("overwrite", False)  # belongs to this command, not to the run
    out_dir, first = Path(given["out_dir"]), launched()[0] == 0
    path = out_dir / "ckpt.pt"
    writes = not given.get("eval_only") and not given.get("dry_run")
    if locks and writes and first:
        locks.enter_context(lock_out_dir(out_dir))
    replaces = overwrite or given.get("init_from") == "auto"
    saved, base = read_start(given, path)
    if saved:
        settings = resumed_settings(saved, given, path)
    else:
        settings = new_settings(given, base)
        # a run that was killed before its first ckpt.pt may have left a best.pt
        if writes and first and not replaces:
            refuse_earlier_run(out_dir)
    config = cli.make(TrainConfig, settings)
    model_config = make_model_config(settings)
    check_command(config, model_config, given, typed)
    if overwrite and (saved or not writes):
        note("overwrite=True has no effect: no new run is written")
    if not saved and "warmup_iters" not in given:
        config = fit_warmup(config)
    return Start(config, model_config, saved, base, given, overwrite)


def read_start(given: dict, path: Path) -> tuple[dict | None, Loaded | None]:
    """Read the checkpoint to resume, at path, or the model to start from.

    init_from=auto in `given` is replaced by what it stands for.
    """
    init_from = given.get("init_from", "scratch")
    backend = given.get("backend", TrainConfig.backend)
    if init_from in ("auto", "resume"):
        needed = init_from == "resume"
        saved = read_once(lambda: read_run(path) if needed or path.exists() else None, backend)
        given["init_from"] = "resume" if saved else "scratch"
        return saved, None
    if init_from == "scratch":
        return None, None
    return None, read_each(lambda: load(init_from), backend)


def new_settings(given: dict, base: Loaded | None) -> dict[str, object]:
    """Return the settings of a new run: those given, and defaults that suit the model it starts from, or minutes."""
    if base:
        from humptygpt.training.finetune import base_defaults, base_settings

        return base_defaults(base, given) | given | base_settings(base, given)
    if not given.get("minutes") or given.get("model", ModelConfig.model) != "gpt":
        return given
    print(f"minutes: settings that are not given are those of {RECIPE}", flush=True)
    recipe = cli.read_config(str(cli.CONFIGS.parent / RECIPE), fields_of(TrainConfig, ModelConfig))
    # the recipe's width would have to be a multiple of n_head: keep the size of its heads instead
    heads = given.get("n_head", recipe["n_head"])
    recipe["n_embd"] = recipe["n_embd"] // recipe["n_head"] * heads
    return recipe | given


def check_command(config: TrainConfig, model_config: ModelConfig, given: dict, typed: set[str]) -> None:
    """Raise UserError for what would have no effect or fail later. typed: keys that were typed in the command."""
    _, processes = launched()
    if given.get("minutes") and (config.dry_run or config.eval_only):
        raise UserError("minutes has no effect with dry_run or eval_only; leave it out")
    if config.minutes and processes > 1:
        raise UserError("minutes works with one process only; with several, use max_iters")
    if config.wandb_log:  # fail now if it is not installed
        importlib.import_module("wandb")
    values = asdict(config) | asdict(model_config) | {"processes": processes}
    values["input"] = given.get("input")  # a resumed run forgets it
    fields = fields_of(TrainConfig, ModelConfig)
    # a config.json sets every key, most of them to the default
    chosen = {key: value for key, value in given.items() if key in typed or value != fields[key].default}
    check_effects(chosen, typed, values, IN_VAIN)


def read_command(argv: list[str]) -> tuple[dict[str, object], set[str]]:
    """Return the settings in a command and its config files, with out_dir set, and the keys typed in the command."""
    given = cli.read(argv, ModelConfig, TrainConfig)
    typed = cli.typed_keys(argv)
    if given.get("minutes"):
        if "max_iters" in typed:
            raise UserError("minutes and max_iters both set the length of the run; give only one")
        for key in {"max_iters", "lr_decay_iters"} - typed:  # set by a config file
            given.pop(key, None)
    if given.get("input"):
        if given.get("init_from") == "resume":
            raise UserError(
                f"input={given['input']} is only for a new run; leave it out: a resumed run already has its data"
            )
        if not given.keys() & LENGTHS:
            raise UserError("say how long to train on input: --minutes=3 or --max_iters=N")
        # a dataset name from a config file does not apply to an input that was typed in the command
        if "dataset" not in (typed if "input" in typed else given):
            given["dataset"] = data_name(given["input"])
    if given.get("out_dir") is None:
        given["out_dir"] = f"out/{given.get('dataset', TrainConfig.dataset)}"
    return given, typed


def data_name(where: str) -> str:
    """Name a dataset after its input: a folder, a file without its extensions, or the folder of a glob pattern."""
    parts = reversed(Path(where).resolve().parts)
    stems = (re.sub(r"[^\w-]+", "_", part.partition(".")[0]).strip("_") for part in parts)
    return next(filter(None, stems), "text")


def fit_warmup(config: TrainConfig) -> TrainConfig:
    """Shorten the warmup of a short run, so that most steps are left for the decay."""
    steps = config.lr_decay_iters or config.max_iters
    warmup = config.warmup_iters
    if not config.decay_lr or warmup < steps:
        return config
    shorter = steps // 10
    note(f"warmup_iters={warmup} would last all {steps:,} steps; using warmup_iters={shorter}")
    return replace(config, warmup_iters=shorter)


def read_once(read: Callable[[], dict | None], backend: str) -> dict | None:
    """Read a checkpoint in the first rank only. The others get it with tensors that have no values."""
    if launched()[1] == 1:
        return read()
    from humptygpt.training.torchrun import read_and_describe

    return read_and_describe(read, backend)


def read_each(read: Callable[[], object], backend: str) -> object:
    """Read a model in each process. If one of them cannot, all raise its UserError."""
    if launched()[1] == 1:
        return read()
    from humptygpt.training.torchrun import connect, together

    with together("the other processes, which read the model", connect(backend)):
        return read()
