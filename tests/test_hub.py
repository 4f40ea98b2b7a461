"""init_from=gpt2 against a server on this machine that plays the hub of Hugging Face."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_text
from huggingface_hub import constants, save_torch_state_dict
from humptygpt.model import GPT, ModelConfig
from safetensors.torch import load as load_bytes
from servers import serving
from test_tokenizer_files import gpt2_folder

import export
import prepare_data
import sample
from humptygpt.cli import UserError
from humptygpt.data.dataset import read_meta
from humptygpt.formats.huggingface import write_pretrained
from humptygpt.formats.load import load
from humptygpt.tokenizers.huggingface import read_tokenizer

SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 400}
SMALL |= {"bias": True, "activation": "gelu_tanh"}
REPO = "openai-community/gpt2"
COMMIT = "a" * 40


@pytest.fixture
def files(folder) -> dict[str, bytes]:
    """A random GPT-2 as the hub has it, with files that are not needed."""
    made = gpt2_folder(Path("made"))
    torch.manual_seed(0)
    (made / "config.json").unlink()
    write_pretrained(GPT(ModelConfig(**SMALL)), made)
    content = {path.name: path.read_bytes() for path in made.iterdir()}
    others = ("README.md", "onnx/model.onnx", "pytorch_model.bin", "modeling_gpt2.py")
    return content | dict.fromkeys(others, b"not needed")


@pytest.fixture
def server(files, monkeypatch):
    """files: of its one model; code: of its answer to every question, instead of the right one."""

    def answer(path: str) -> bytes | int:
        path = path.partition("?")[0]
        if here.code or REPO not in path:
            code = here.code or 404
            codes = {404: "RepoNotFound", 403: "GatedRepo"}
            here.headers["X-Error-Code"] = codes.get(code, "")
            return code
        if path == f"/api/models/{REPO}/revision/main":
            names = [{"rfilename": name} for name in here.files]
            return json.dumps({"id": REPO, "sha": COMMIT, "siblings": names}).encode()
        if path == f"/api/models/{REPO}/tree/{COMMIT}":
            entries = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(x),
                    "oid": name.replace("/", "-"),
                }
                for name, x in here.files.items()
            ]
            return json.dumps(entries).encode()
        name = path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")
        here.headers["ETag"] = f'"{name}"'
        return here.files.get(name, 404)

    with serving(answer) as here:
        here.files, here.code = dict(files), None
        here.headers = {"X-Repo-Commit": COMMIT}
        address = f"http://127.0.0.1:{here.server_port}"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
        # the package read these from the environment when it was imported
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", "cache")
        yield here


def fetched(server) -> set[str]:
    """The files of the model that were asked for."""
    paths = (path.partition("?")[0] for path in server.asked)
    return {path.partition(f"{COMMIT}/")[2] for path in paths if "/resolve/" in path}


def run_script(*argv: str) -> str:
    """Run a script as a user does, in a process that has not loaded any of the package. Return its stdout."""
    script, *keys = argv
    command = [sys.executable, ROOT / script, *keys]
    env = os.environ | {"HF_ENDPOINT": constants.ENDPOINT, "HF_HUB_CACHE": "cache"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_model_comes_by_its_name_and_is_kept_for_when_there_is_no_network(server):
    argv = ["--init_from=gpt2", "--start=Hello", "--max_new_tokens=3", "--num_samples=1"]
    assert run_script("sample.py", *argv).startswith("Hello")
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    assert fetched(server) == {"config.json", "model.safetensors", *tokenizer}
    server.asked.clear()
    load("gpt2")
    assert fetched(server) == set()
    server.code = 500
    sample.main(argv)
    export.main(["--init_from=gpt2", "--to=exported"])
    assert Path("exported/model.safetensors").exists()


def test_a_tokenizer_comes_by_the_models_name_without_its_weights(server):
    Path("text.txt").write_text(make_text(3000))
    prepare_data.main(["--input=text.txt", "--name=mine", f"--tokenizer={REPO}"])
    tokens = read_meta(Path("data/mine"))["tokenizer"]
    assert tokens == read_tokenizer(Path("made")).state()
    assert fetched(server) == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert tokens == load("gpt2").tokenizer.state()


@pytest.mark.parametrize("code", [403, 404, 500])
def test_what_the_hub_refuses_is_one_line_with_the_fixes(code, server, fails):
    server.code = code
    line = fails(sample.main, "--init_from=gpt2")
    assert f"gpt2 cannot be fetched from {constants.ENDPOINT}: " in line
    assert f" error '{code} " in line and "; check the name, set HF_TOKEN if" in line


def test_without_a_network_the_fixes_are_named_in_one_line(server, monkeypatch, fails):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    line = fails(sample.main, "--init_from=someone/model")
    assert "cannot be fetched from http://127.0.0.1:9: [Errno" in line
    assert "set HF_ENDPOINT to a mirror, or give a folder that contains the model" in line


def test_weights_in_shards_come_with_their_index(server, folder):
    weights = load_bytes(server.files.pop("model.safetensors"))
    Path("shards").mkdir()
    save_torch_state_dict(weights, "shards", max_shard_size="5KB")
    shards = {path.name: path.read_bytes() for path in Path("shards").iterdir()}
    assert len(shards) > 2
    server.files |= shards
    assert load("gpt2").model.config.n_layer == 1
    assert shards.keys() < fetched(server)


def test_pickles_do_not_come(server, folder):
    del server.files["model.safetensors"]
    with pytest.raises(UserError, match=r"there is no model.safetensors in .*python -c"):
        load("gpt2")
    assert not {"pytorch_model.bin", "modeling_gpt2.py"} & fetched(server)


def test_what_is_not_supported_is_refused_before_its_weights_come(server):
    config = json.loads(server.files["config.json"])
    server.files["config.json"] = json.dumps(config | {"model_type": "bert"}).encode()
    with pytest.raises(UserError, match="model_type=bert is not one of: gpt2, llama"):
        load("gpt2")
    assert "model.safetensors" not in fetched(server)


def test_a_path_that_begins_in_a_folder_here_is_no_model_of_the_hub(folder, fails):
    Path("out").mkdir()
    line = fails(sample.main, "--init_from=out/x")
    assert line == "init_from=out/x: there is no such file or folder\n"
