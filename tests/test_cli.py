"""Command lines and config files: values, mistakes and their answers, and the help."""

import dataclasses
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT
from humptygpt.model import ModelConfig

import compare
import explain
import export
import prepare_data
import sample
import score
import train
from benchmarks import __main__ as bench
from humptygpt import cli, help, model
from humptygpt.cli import UserError, check_choices, check_least
from humptygpt.data.dataset import TASKS
from humptygpt.data.prepare import PrepareConfig
from humptygpt.training import settings
from humptygpt.training.settings import TrainConfig
from sample import SampleConfig

CONFIGS = [
    ModelConfig,
    TrainConfig,
    SampleConfig,
    PrepareConfig,
    bench.BenchConfig,
    compare.CompareConfig,
    explain.ExplainConfig,
    export.ExportConfig,
]


@dataclass(frozen=True)
class Example:
    # example
    width: int = 4  # how wide
    rate: float = 0.5  # how fast
    # details
    fast: bool = False  # or slow
    name: str = "x"  # its name
    limit: int | None = None  # None: no limit
    names: tuple[str, ...] = ()  # any number of names

    @classmethod
    def choices(cls):
        return {"name": ("x", "y", "r4")}

    def validate(self):
        check_choices(self)
        check_least(self, 1, "width", "limit")
        check_least(self, 0, "rate", below=1)


def read(*argv: str, **keys) -> dict:
    return cli.read(list(argv), Example, **keys)


def complaint(*argv: str, cls: type = Example) -> str:
    with pytest.raises(UserError) as error:
        cli.read(list(argv), cls)
    return str(error.value)


# --------------------------------------------------------------------------------------
# Values


def test_sources_apply_from_left_to_right(folder):
    Path("a.py").write_text("width = 1\nrate = 0.1\nfast = True")
    Path("b.py").write_text("rate = 0.2")
    given = {"width": 1, "rate": 0.2, "fast": False}
    assert read("--width=9", "a.py", "b.py", "--fast=False") == given


def test_config_files_may_compute_and_import(folder):
    lines = "import time", "from math import sqrt", "_half = 2", "width = 2 * _half"
    Path("a.py").write_text("\n".join([*lines, "name = 'r' + str(int(sqrt(16)))"]))
    assert read("a.py") == {"width": 4, "name": "r4"}


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("--width=12", 12),
        ("--width=1_000", 1000),
        ("--rate=1", 1.0),
        ("--rate=1e-3", 1e-3),
        ("--fast=True", True),
        ("--fast=false", False),
        ("--name=a=b", "a=b"),
        ("--name=5", "5"),
        ("--limit=None", None),
        ("--limit=3", 3),
    ],
)
def test_command_line_values_take_the_type_of_their_key(argument, value):
    (found,) = read(argument).values()
    assert found == value and type(found) is type(value)


def test_bare_arguments_gather_in_a_key_that_takes_several_texts():
    given = {"names": ("a", "b=c"), "width": 1}
    assert read("a", "--width=1", "b=c", positional="names") == given
    assert read("--names=a", "b", positional="names") == {"names": ("a", "b")}
    assert read("--width=1", positional="names") == {"width": 1}


def test_a_config_file_gives_one_text_or_several_to_a_key_that_takes_several(folder):
    for text, names in (("'uk'", ("uk",)), ("('a', 'b')", ("a", "b")), ("['a']", ("a",))):
        Path("a.py").write_text(f"names = {text}")
        assert read("a.py", "--names=c") == {"names": (*names, "c")}
    Path("a.py").write_text("names = ('a', 3)")
    assert complaint("a.py") == "a.py: names=3 must be str"


def test_a_bare_argument_sets_a_key_that_takes_one_text():
    assert read("a", positional="name") == {"name": "a"}
    line = "^name is given twice, as a and b; give only one$"
    for argv in (("a", "b"), ("--name=a", "b")):
        with pytest.raises(UserError, match=line):
            read(*argv, positional="name")


def test_a_text_may_begin_with_the_home_folder_and_is_not_empty(folder, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    Path("a.py").write_text("name = '~/b'")
    assert read("a.py") == {"name": "/home/me/b"}
    given = {"name": "/home/me/a/", "names": ("/home/me/c",)}
    assert read("--name=~/a/", "--names=~/c") == given
    for key in ("name", "names"):
        empty = f"{key}= must not be empty; write --{key}=VALUE, or leave it out"
        assert complaint(f"--{key}=") == empty


# --------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    "argument",
    [
        *("--width=1.5", "--width=True", "--width=x", "--width=None", "--width=1,000"),
        *("--rate=fast", "--fast=1"),
    ],
)
def test_wrong_types_are_refused_with_the_right_one(argument):
    key = argument[2:].partition("=")[0]
    with pytest.raises(UserError, match=f"{key}=.* must be (int|float|bool)$"):
        read(argument)


@pytest.mark.parametrize(
    ("argument", "answer"),
    [
        ("--learning_rte=3", "unknown key learning_rte; did you mean learning_rate?"),
        ("--zzz=3", "unknown key zzz; --help lists all keys"),
        (
            "a.py",
            "a.py: unknown key learning_rte; did you mean learning_rate? (a variable of your own begins with _)",
        ),
        ("--dtype", "--dtype has no value; write --dtype=VALUE"),
        ("--compile", "--compile has no value; write --compile=True"),
        (
            "-dtype=3",
            "-dtype=3 is not a config file; a key is set with --key=value",
        ),
    ],
)
def test_a_key_that_is_unknown_or_not_written_as_one_is_answered_with_the_right_one(folder, argument, answer):
    Path("a.py").write_text("learning_rte = 3")
    assert complaint(argument, cls=TrainConfig) == answer


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("\nwidth = (", "a.py:2: SyntaxError: '(' was never closed"),
        ("\nwidth = nothing", "a.py:2: NameError: name 'nothing' is not defined"),
        ("width = '4'", "a.py: width='4' must be int"),
        ("name = print", "a.py: name=<built-in function print> must be str"),
    ],
)
def test_broken_config_files_are_named(folder, content, answer):
    Path("a.py").write_text(content)
    assert complaint("a.py").startswith(answer)


def test_a_run_in_place_of_a_config_file_is_refused_and_never_executed(
    folder,
):
    run = Path("out/my run")
    run.mkdir(parents=True)
    (run / "config.json").write_text('{"eval_only": false, "_parameters": 3}')
    with zipfile.ZipFile(run / "best.pt", "w") as file:
        file.writestr("__main__.py", "raise SystemExit('code of a checkpoint')")
    for path in (str(run), str(run / "best.pt")):
        assert complaint(path).startswith(f"{path} is not a config file; ")
    config = str(run / "config.json")
    assert cli.read([config], TrainConfig) == {"eval_only": False}


@pytest.mark.parametrize(
    ("values", "answer"),
    [
        ({"width": 0}, "width=0 must be at least 1"),
        ({"rate": 1.0}, "rate=1.0 must be at least 0 and below 1"),
        ({"rate": float("nan")}, "rate=nan must be at least 0 and below 1"),
        ({"name": "z"}, "name=z is not one of: x, y, r4"),
    ],
)
def test_a_value_that_breaks_the_rule_of_its_key_is_a_user_error(values, answer):
    with pytest.raises(UserError) as error:
        cli.make(Example, values)
    assert str(error.value) == answer


def test_the_tables_of_keys_set_in_vain_name_keys_that_exist():
    for table, known in (
        (settings.IN_VAIN, {"processes", *cli.fields_of(ModelConfig, TrainConfig)}),
        (sample.IN_VAIN, {"task", *cli.fields_of(SampleConfig)}),
        (score.IN_VAIN, cli.fields_of(score.ScoreConfig).keys()),
        (explain.IN_VAIN, cli.fields_of(explain.ExplainConfig).keys()),
    ):
        for keys, other, values in table:
            # no data is generated until somebody adds some
            assert {*keys.split(), other} <= known and (values or other == "dataset")
    tasks = {values for _, other, values in sample.IN_VAIN if other == "task"}
    assert tasks == {(task,) for task in TASKS}


def test_a_users_mistake_ends_in_one_line_and_exit_code_2_whatever_was_typed(fails):
    answer = "norm=a b c is not one of: layernorm, rmsnorm, none (NORMS in model.py)\n"
    assert fails(train.main, "--norm=a\tb\nc") == answer


# --------------------------------------------------------------------------------------
# The help, and what messages say of commands and folders


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_key_has_a_comment_below_the_title_of_its_group_and_its_choices(cls):
    comments = help.comments_of(cls)
    assert list(comments) == [field.name for field in dataclasses.fields(cls)]
    for title, text in comments.values():
        assert title != cls.__name__ and len(text) > 5
    help_text = help.help_text(cls)
    for name, choices in cls.choices().items():
        # the choices of model are not its own class's; a key with a single choice is not shown
        if name in comments and [*choices] != [cls.__dataclass_fields__[name].default]:
            assert f"one of: {', '.join(choices)}\n" in help_text + "\n", name


def test_the_help_lists_keys_with_types_and_defaults_by_group():
    text = help.help_text(Example, bare="[NAMES ...]")
    assert "[NAMES ...] [--key=value ...]" in text
    lines = text[text.index("example:") :].splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "example:",
        "--width=4 int how wide",
        "--rate=0.5 float how fast",
        "",
        "details:",
        "--fast=False bool or slow",
        "--name=x str its name; one of: x, y, r4",
        "--limit=None int | None None: no limit",
        "--names=() tuple[str, ...] any number of names",
    ]


def test_a_script_shows_its_help_with_the_variants_that_a_dictionary_has(monkeypatch, capsys):
    monkeypatch.setitem(model.NORMS, "mynorm", model.NORMS["rmsnorm"])
    for script in (train, sample, prepare_data, bench, compare, explain, export):
        with pytest.raises(SystemExit) as stop:
            script.main(["--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0 and text.startswith("usage: python ")
        assert ("mynorm" in text) == (script is train)
    command = [sys.executable, ROOT / "train.py", "--help"]
    text = subprocess.run(command, capture_output=True, text=True).stdout
    usage = "usage: python train.py [CONFIG_FILE ...] [--key=value ...]"
    assert text.startswith(f"{usage}\n\nTrain a")


NANOGPT_KEYS = """out_dir eval_interval eval_iters log_interval always_save_checkpoint wandb_log wandb_project
wandb_run_name dataset gradient_accumulation_steps batch_size block_size n_layer n_head n_embd dropout bias
learning_rate max_iters lr_decay_iters min_lr beta1 beta2 warmup_iters weight_decay grad_clip decay_lr
backend device dtype compile init_from eval_only"""
SAMPLING_KEYS = "init_from out_dir start num_samples max_new_tokens temperature top_k seed device dtype"


def test_every_key_of_nanogpt_is_known():
    known = cli.fields_of(ModelConfig, TrainConfig).keys()
    assert set(NANOGPT_KEYS.split()) <= known
    assert set(SAMPLING_KEYS.split()) <= cli.fields_of(SampleConfig).keys()
