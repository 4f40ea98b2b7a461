import dataclasses
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import bench
import compare
import explain
import export
import model
import prepare_data
import sample
import train
from humptygpt import config as configurator
from humptygpt import settings
from humptygpt import tokenizers as tokenizer
from humptygpt.config import UserError, check_choices, check_fraction, check_least
from humptygpt.loading import find_source
from model import ModelConfig
from prepare_data import PrepareConfig
from sample import SampleConfig
from train import TrainConfig

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Example:
    # example
    width: int = 4  # how wide
    rate: float = 0.5  # how fast
    # how
    fast: bool = False  # or slow
    name: str = "x"  # what it is called
    limit: int | None = None  # None: no limit
    switch: bool | None = None  # None: found by itself

    @classmethod
    def choices(cls):
        return {"name": ("x", "y", "r4")}

    def validate(self):
        check_choices(self)
        check_least(self, 1, "width", "limit")
        check_fraction(self, "rate")


def read(*argv: str) -> dict:
    return configurator.read(list(argv), Example)


def test_sources_apply_from_left_to_right(folder):
    Path("a.py").write_text("width = 1\nrate = 0.1\nfast = True")
    Path("b.py").write_text("rate = 0.2")
    assert read("--width=9", "a.py", "b.py", "--fast=False") == {
        "width": 1,
        "rate": 0.2,
        "fast": False,
    }


def test_config_files_may_compute_and_import(folder):
    Path("a.py").write_text(
        "import time\nfrom math import sqrt\n_half = 2\nwidth = 2 * _half\nname = 'r' + str(int(sqrt(16)))"
    )
    assert read("a.py") == {"width": 4, "name": "r4"}


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("--width=12", 12),
        ("--width=1_000", 1000),
        ("--rate=1", 1.0),
        ("--rate=1e-3", 1e-3),
        ("--fast=True", True),
        ("--name=a=b", "a=b"),
        ("--name=5", "5"),
        ("--limit=None", None),
        ("--limit=3", 3),
        ("--switch=None", None),
        ("--switch=False", False),
    ],
)
def test_command_line_values_take_the_type_of_their_key(argument, value):
    (found,) = read(argument).values()
    assert found == value and type(found) is type(value)


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
        (
            "--config=config/mine.py",
            "unknown key config; a config file is named without a key: config/mine.py",
        ),
        ("--zzz=3", "unknown key zzz; --help lists all keys"),
        ("--prompt=x", "unknown key prompt; --help lists all keys"),
        ("a.py", "a.py: unknown key learning_rte; did you mean learning_rate?"),
        ("--dtype", "--dtype has no value; write --dtype=VALUE"),
        ("--compile", "--compile has no value; write --compile=True"),
        ("-dtype=3", "-dtype=3 is not a config file; for a key write --dtype=3"),
        ("dtype=3", "dtype=3 is not a config file; for a key write --dtype=3"),
    ],
)
def test_a_key_that_is_unknown_or_not_written_as_one_is_answered_with_the_right_one(
    folder, argument, answer
):
    Path("a.py").write_text("learning_rte = 3")
    with pytest.raises(UserError) as error:
        configurator.read([argument], TrainConfig)
    assert str(error.value) == answer


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "a.py is not a config file"),
        ("width = (", "a.py:1: "),
        ("\nwidth = nothing", "a.py:2: NameError: name 'nothing' is not defined"),
        ("width = '4'", "width='4' must be int"),
        ("width = True", "width=True must be int"),
        ("name = print", "name=<built-in function print> must be str"),
    ],
)
def test_missing_and_broken_config_files_are_named(folder, content, complaint):
    if content is not None:
        Path("a.py").write_text(content)
    with pytest.raises(UserError) as error:
        read("a.py")
    assert complaint in str(error.value)


def test_a_mistyped_config_file_is_answered_with_the_nearest(folder, monkeypatch):
    Path("mine.py").write_text("width = 3")
    Path("own data").mkdir()
    Path("own data/mine.py").write_text("width = 3")
    for argument, near in (
        ("mien.py", "mine.py"),
        ("mine", "mine.py"),
        ("own data/mien.py", "'own data/mine.py'"),
    ):
        with pytest.raises(
            UserError, match=rf" is not a config file; did you mean {near}\?$"
        ):
            read(argument)
    ours = os.path.relpath(ROOT / "config" / "shakespeare_char.py")
    for argument in ("config/shakespear_char.py", "shakespeare_char", "shakespere_char.py"):
        with pytest.raises(UserError) as error:
            read(argument)
        assert str(error.value).endswith(f"; did you mean {ours}?")
    monkeypatch.chdir(ROOT)
    with pytest.raises(
        UserError, match=r"; did you mean config/article/04_residual/2-with.py\?$"
    ):
        read("config/article/04_residual/2-wiht.py")


def test_a_run_in_place_of_a_config_file_is_answered_with_its_key_and_never_executed(
    folder,
):
    Path("out/my run").mkdir(parents=True)
    Path("out/my run/config.json").write_text('{"eval_only": false, "_parameters": 3}')
    with zipfile.ZipFile("out/my run/best.pt", "w") as file:
        file.writestr("__main__.py", "raise SystemExit('code of a checkpoint')")
    run = "'--out_dir=out/my run'"
    for argument in ("out/my run", "out/my run/best.pt", "out/my run/config.json"):
        for config, option in (
            (SampleConfig, run),
            (TrainConfig, f"--init_from=resume {run}"),
        ):
            if config is TrainConfig and argument.endswith(".json"):
                assert configurator.read([argument], config) == {"eval_only": False}
                continue
            line = f"{argument} is not a config file; for the run in it write {option}"
            with pytest.raises(UserError, match=f"^{line}$"):
                configurator.read([argument], config)
    with pytest.raises(UserError, match=r"; for a prompt write '--start=The cat'$"):
        configurator.read(["The cat"], SampleConfig)


def test_a_second_input_is_answered_with_how_to_give_several_files(folder, fails):
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("text")
    complaint = fails(train.main, "--input=a.txt", "b.txt")
    assert complaint.startswith("b.txt is not a config file; for several files of text ")
    assert "a pattern in quotes: --input='texts/*.txt'" in complaint


def test_the_name_of_a_config_in_place_of_a_model_is_answered_with_the_command_that_trains_it(
    folder, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    monkeypatch.setattr(configurator, "CONFIGS", folder / "config")
    Path("config").mkdir()
    Path("config/mine.py").write_text("width = 3")
    command = "python train.py config/mine.py --out_dir=out/mine"
    with pytest.raises(UserError, match=f"; train it first: {command}$"):
        find_source("mine")
    Path("out/mine").mkdir(parents=True)
    with pytest.raises(UserError, match=r"; did you mean out/mine\?$"):
        find_source("mine")


@pytest.mark.parametrize(
    "cls", [TrainConfig, SampleConfig, PrepareConfig, compare.CompareConfig]
)
def test_every_text_may_begin_with_the_home_folder_and_is_not_empty(
    folder, cls, monkeypatch
):
    monkeypatch.setenv("HOME", "/home/me")
    for field in dataclasses.fields(cls):
        if str in configurator.kinds_of(field.type):
            (value,) = configurator.read([f"--{field.name}=~/a/"], cls).values()
            assert value in ("/home/me/a/", ("/home/me/a/",))
            with pytest.raises(UserError, match=f"^{field.name}= must not be empty"):
                configurator.read([f"--{field.name}="], cls)
    Path("a.py").write_text("name = '~/b'")
    assert read("a.py") == {"name": "/home/me/b"}


def test_help_lists_the_choices_that_the_dictionary_has(monkeypatch, capsys):
    monkeypatch.setitem(model.NORMS, "mynorm", model.NORMS["rmsnorm"])
    for main, choice in (
        (train.main, "mynorm"),
        (prepare_data.main, ", ".join(tokenizer.TOKENIZERS)),
    ):
        with pytest.raises(SystemExit):
            main(["--help"])
        text = capsys.readouterr().out
        assert choice in text
    for cls in CONFIGS:
        text = configurator.help_text(cls)
        for name, choices in cls.choices().items():
            if name != "model":  # which is ModelConfig's
                assert f"one of: {', '.join(choices)}\n" in text + "\n", name


def test_commands_in_messages_name_the_script_as_the_user_has_written_it(
    folder, monkeypatch
):
    command = "python train.py --out_dir='a b'"
    for script in ("train.py", "nowhere/sample.py", "/usr/bin/pytest"):
        monkeypatch.setattr(sys, "argv", [script])
        assert configurator.as_written_here(command) == command
    (folder / "my code").mkdir()
    (folder / "my code/train.py").touch()
    monkeypatch.setattr(sys, "argv", ["my code/sample.py"])
    assert (
        configurator.as_written_here(command) == "python 'my code/train.py' --out_dir='a b'"
    )


def test_started_from_another_folder_a_script_says_where_its_files_are(folder):
    start = lambda cwd: subprocess.run(  # noqa: E731
        [sys.executable, ROOT / "compare.py", "nothing"],
        cwd=cwd,
        capture_output=True,
        text=True,
    ).stderr.splitlines()
    assert start(folder)[0] == f"note: data/, out/ and other relative paths are in {folder}"
    assert len(start(folder)) == len(start(ROOT)) + 1


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"width": 0}, "width=0 must be at least 1"),
        ({"rate": 1.0}, "rate=1.0 must be at least 0 and below 1"),
        ({"rate": float("nan")}, "rate=nan must be at least 0 and below 1"),
        ({"name": "z"}, "name=z is not one of: x, y, r4"),
    ],
)
def test_a_value_that_breaks_the_rule_of_its_key_is_a_user_error(values, complaint):
    with pytest.raises(UserError) as error:
        configurator.make(Example, values)
    assert str(error.value) == complaint


def test_a_given_key_that_does_nothing_says_why():
    table = {"rate": ("fast", (False,)), "limit": ("name", ("x", "y"))}
    values = vars(Example(rate=0.7, name="y"))
    assert configurator.in_vain({"rate", "width"}, values, table) == {
        "rate": "rate=0.7 has no effect with fast=False"
    }
    assert configurator.in_vain({"limit"}, values, table).keys() == {"limit"}
    assert not configurator.in_vain({"limit"}, values | {"name": "r4"}, table)


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


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_key_has_a_comment_which_is_its_help_below_the_title_of_its_group(cls):
    comments = configurator.comments_of(cls)
    assert list(comments) == [field.name for field in dataclasses.fields(cls)]
    for title, text in comments.values():
        assert title != cls.__name__ and len(text) > 5


def test_the_groups_of_keys_are_titles_in_the_help():
    text = configurator.help_text(Example)
    lines = text[text.index("\nexample:") :].splitlines()[1:]
    assert [line.split()[0] for line in lines if line] == [
        *("example:", "--width=4", "--rate=0.5", "how:", "--fast=False", "--name=x"),
        *("--limit=None", "--switch=None"),
    ]


def test_the_tables_of_keys_set_in_vain_name_keys_that_exist():
    train_keys = configurator.fields_of(ModelConfig, TrainConfig)
    for key, (other, values) in settings.IN_VAIN.items():
        assert {key, other} <= train_keys.keys() and values
    sample_keys = configurator.fields_of(SampleConfig).keys() | {"task"}
    for key, (other, values) in sample.IN_VAIN.items():
        assert {key, other} <= sample_keys and values


@pytest.mark.parametrize(
    "main", [train.main, sample.main, prepare_data.main, bench.main, compare.main]
)
def test_help_lists_every_key_with_its_default(main, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert text.startswith("usage: python ")
    assert ("[RUNS ...]" in text) == (main is compare.main)
    if main is train.main:
        for cls in (ModelConfig, TrainConfig):
            for field in dataclasses.fields(cls):
                assert f"--{field.name}={field.default}" in text


@dataclass(frozen=True)
class Several:
    names: tuple[str, ...] = ()  # as many as are given
    width: int = 4  # how wide


def test_bare_arguments_gather_in_a_key_that_takes_several_texts():
    read = lambda *argv: configurator.read(list(argv), Several, positional="names")  # noqa: E731
    assert read("a", "--width=1", "b=c") == {"names": ("a", "b=c"), "width": 1}
    assert read("--names=a", "b") == {"names": ("a", "b")}
    assert read("--width=1") == {"width": 1}


def test_a_bare_argument_sets_a_key_that_takes_one_text():
    read = lambda *argv: configurator.read(list(argv), Example, positional="name")  # noqa: E731
    assert read("a") == read("a", "a") == read("a", "--name=a") == {"name": "a"}
    for argv in (("a b", "c"), ("a b", "--name=c"), ("--name=a b", "c")):
        with pytest.raises(
            UserError, match=r"^name is given twice, as 'a b' and c; leave one out$"
        ):
            read(*argv)


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("--n_layr=3", "unknown key n_layr; did you mean n_layer?"),
        ("--norm=a\tb\nc", "norm=a b c is not one of: layernorm, rmsnorm, none"),
        ("a\nb", "a b is not a config file"),
    ],
)
def test_a_users_mistake_ends_in_one_line_and_exit_code_2(fails, option, complaint):
    assert fails(train.main, option) == f"{complaint}\n"


def test_help_is_that_of_the_script_which_was_started():
    command = [sys.executable, ROOT / "train.py", "--help"]
    text = subprocess.run(command, capture_output=True, text=True).stdout
    assert text.startswith(
        "usage: python train.py [CONFIG_FILE ...] [--key=value ...]\n\nTrain a"
    )


NANOGPT_KEYS = """out_dir eval_interval eval_iters log_interval always_save_checkpoint wandb_log wandb_project
wandb_run_name dataset gradient_accumulation_steps batch_size block_size n_layer n_head n_embd dropout bias
learning_rate max_iters lr_decay_iters min_lr beta1 beta2 warmup_iters weight_decay grad_clip decay_lr
backend device dtype compile init_from eval_only"""


def test_every_key_of_nanogpt_is_known():
    known = {
        field.name
        for cls in (ModelConfig, TrainConfig)
        for field in dataclasses.fields(cls)
    }
    assert set(NANOGPT_KEYS.split()) <= known
    sampling = "init_from out_dir start num_samples max_new_tokens temperature top_k seed device dtype compile"
    assert set(sampling.split()) <= {
        field.name for field in dataclasses.fields(SampleConfig)
    }
