"""The repository as a whole: shipped configs, imports, links in the documentation."""

import json
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from humptygpt.model import ModelConfig

import sample
import train
from humptygpt import cli
from humptygpt.training.settings import GENTLE, TRAINING_ONLY, TrainConfig

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "config").rglob("*.py"))
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "data/README.md"]
SHORT = "--max_iters=2 --eval_iters=1 --batch_size=2 --gradient_accumulation_steps=1"
SHORT += " --out_dir=out/run --device=cpu --compile=False"
SMALLER = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64, "n_hidden": 96}
SMALLER |= {"block_size": 64}


def in_config(path: Path) -> str:
    return str(path.relative_to(ROOT / "config"))


@pytest.mark.parametrize("config", CONFIGS, ids=in_config)
def test_every_shipped_config_loads_and_takes_two_steps(tiny, pairs, config):
    keys = runpy.run_path(str(config))
    dataset = "pairs" if "_de_en" in keys.get("dataset", "") else "tiny"
    short = [*SHORT.split(), f"--dataset={dataset}", "--init_from=scratch"]
    if keys.get("n_embd", 0) >= 768:  # made for a GPU
        short += [f"--{key}={value}" for key, value in SMALLER.items() if key in keys]
    assert train.main([str(config), *short]) == 0
    assert Path("out/run/best.pt").exists()


def without_effect(settings: dict) -> set[str]:
    """The keys that a run with these settings does not use."""
    if settings["init_from"] != "scratch":  # the model's own settings hold
        return vars(ModelConfig()).keys() - TRAINING_ONLY - {"block_size"}
    if settings["model"].endswith("_mlp"):
        return {"position", "mlp_conv", "qk_norm", "init", "tie_weights"}
    return {"mlp_conv", "activation"} if settings["mlp"] == "none" else set()


@pytest.mark.parametrize("config", CONFIGS, ids=in_config)
def test_a_shipped_config_has_the_settings_that_its_figures_were_measured_with(config):
    """shipped_configs.json has all of them: a base, which is nobody's defaults, and what each config has instead.

    A changed config needs new figures.
    """
    recorded = json.loads((ROOT / "tests/shipped_configs.json").read_text())
    keys = cli.read([str(config)], ModelConfig, TrainConfig)
    defaults = vars(ModelConfig()) | vars(TrainConfig())
    settings = defaults | (GENTLE if "init_from" in keys else {}) | keys
    used = settings.keys() - without_effect(settings)
    expected = recorded["base"] | recorded[in_config(config)]
    assert expected.keys() == settings.keys()
    assert {key: settings[key] for key in used} == {key: expected[key] for key in used}


LADDER = sorted((ROOT / "config/article").glob("*"))


@pytest.mark.parametrize("folder", LADDER, ids=lambda folder: folder.name)
def test_the_runs_of_an_experiment_compute_in_the_same_dtypes(folder):
    """dtype=auto is not the same on each machine."""
    for config in folder.glob("*.py"):
        keys = cli.read([str(config)], ModelConfig, TrainConfig)
        settings = vars(TrainConfig()) | keys
        assert settings["dtype"] == "float32"


def requirements(path: str) -> list[str]:
    lines = (ROOT / path).read_text().splitlines()
    return [x for line in lines if (x := re.sub(r"(^| +)#.*|^-r .*", "", line))]


def test_pyproject_has_the_packages_of_the_requirements_files():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]
    assert requirements("requirements.txt") == project["dependencies"] + extra["all"]
    assert ["humptygpt[all]", *requirements("requirements-dev.txt")] == extra["dev"]


@pytest.mark.long
def test_the_nursery_rhyme_is_memorised(capsys):
    config = str(ROOT / "config/humpty_dumpty.py")
    assert train.main([config, "--device=cpu", "--eval_interval=120"]) == 0
    text = Path("data/downloads/humpty_dumpty.txt").read_text()
    rhyme = text[: len(text) // 10]
    capsys.readouterr()
    argv = "--out_dir=out/humpty_dumpty --device=cpu --temperature=0 --max_new_tokens=129"
    sample.main([*argv.split(), "--start=Humpty Dumpt", "--num_samples=1"])
    assert capsys.readouterr().out == rhyme.removeprefix("\n")


def test_importing_any_module_does_nothing(folder):
    paths = [*ROOT.glob("*.py"), *ROOT.glob("humptygpt/**/*.py")]
    paths += ROOT.glob("benchmarks/*.py")
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in paths]
    names = sorted(name.removesuffix(".__init__") for name in names)
    assert {"train", "humptygpt.tokenizers.basic"} <= set(names)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['x', '--no-key=1']\n"
    code += f"import {', '.join(names)}"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(folder.iterdir()) == []


def test_nanogpts_command_for_a_laptop_runs_unchanged(tiny):
    Path("config").mkdir()
    Path("config/theirs.py").write_text(
        "import time\nout_dir = 'out-theirs'\neval_interval = 250\nlog_interval = 10\nalways_save_checkpoint = False\n"
        "wandb_log = False\nwandb_project = 'theirs'\nwandb_run_name = 'run' + str(time.time())\ndataset = 'tiny'\n"
        "gradient_accumulation_steps = 1\nlearning_rate = 1e-3\nmin_lr = 1e-4\nbeta2 = 0.99\nwarmup_iters = 100\n"
    )
    argv = "config/theirs.py --device=cpu --compile=False --eval_iters=20 --log_interval=1"
    argv += " --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128"
    argv += " --max_iters=3 --lr_decay_iters=2000 --dropout=0.0"
    assert train.main(argv.split()) == 0
    assert Path("out-theirs/best.pt").exists()


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", x.lower()).replace(" ", "-") for x in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings_that_exist(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#\n]*)#?([^)\n]*)\)", text)
    for path, anchor in links:
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), anchor


# Losses of 15 of 20 steps with the demo's settings on the generated text, in float32. Other processors, numbers of
# threads, and Muon in bfloat16 or not, change the fourth digit at first and the third in the last five steps, which are
# not taken here; a change that alters learning changes the third from the start.
LOSSES = (
    *(3.0445, 3.0202, 2.9684, 2.8818, 2.7441, 2.5669, 2.3432, 2.1278, 1.9559, 1.8565),
    *(1.8074, 1.7849, 1.7192, 1.6917, 1.6616),
)


def test_steps_of_the_demo_have_the_same_losses_as_before(tiny):
    # without dropout, because versions of torch draw their random numbers differently
    argv = "--dataset=tiny --out_dir=out/run --max_iters=15 --lr_decay_iters=20 --dropout=0"
    argv += " --log_interval=1 --eval_iters=1 --device=cpu --dtype=float32"
    assert train.main([str(ROOT / "config/shakespeare_char.py"), *argv.split()]) == 0
    rows = map(json.loads, Path("out/run/metrics.jsonl").read_text().splitlines())
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    assert losses == pytest.approx(LOSSES, abs=0.003)
