"""init_from=gpt2 against a server on this machine that plays the hub of Hugging Face."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from conftest import make_text
from safetensors.torch import save_file
from servers import serving
from test_tokenizer_files import merges_folder

import prepare_data
import sample
from humptygpt.core import download
from humptygpt.core.errors import UserError
from humptygpt.data.token_files import read_meta
from humptygpt.interchange import hub
from humptygpt.interchange.huggingface import write_pretrained
from humptygpt.interchange.load import load
from humptygpt.tokenizer.read_huggingface import read_tokenizer
from model import GPT, ModelConfig

SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 400, "bias": True}


@pytest.fixture
def files(folder) -> dict[str, bytes]:
    """A random GPT-2 as the hub has it, with files that are not needed."""
    made = merges_folder(Path("made"))
    torch.manual_seed(0)
    (made / "config.json").unlink()
    write_pretrained(GPT(ModelConfig(activation="gelu_tanh", **SMALL)), made)
    found = {path.name: path.read_bytes() for path in made.iterdir()}
    return found | {
        "README.md": b"about it",
        "onnx/model.onnx": b"x",
        "pytorch_model.bin": b"an older copy",
    }


@pytest.fixture
def server(files, monkeypatch):
    """codes, sizes: of a file, instead of the right; names: of the models that it has, all with the same files."""
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)

    def describe(name: str) -> dict:
        content = here.files[name]
        size = here.sizes.get(name, len(content))
        large = {"lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": size}}
        return {"size": size} | (
            large if name == "model.safetensors" and name not in here.sizes else {}
        )

    def answer(path: str) -> bytes | int | str:
        name = path.rpartition("/resolve/abc123/")[2]
        if code := here.codes.get(name if name in here.files else "listing"):
            return code
        if path in [f"/api/models/{name}?blobs=true" for name in here.names]:
            siblings = [{"rfilename": name, **describe(name)} for name in here.files]
            return json.dumps({"sha": "abc123", "siblings": siblings}).encode()
        if name == "model.safetensors" and not path.startswith("/cdn/"):
            return f"http://localhost:{here.server_port}/cdn/resolve/abc123/{name}"
        return here.files.get(name, 404)

    with serving(answer) as here:
        here.files, here.codes, here.sizes, here.names = (
            dict(files),
            {},
            {},
            ["openai-community/gpt2"],
        )
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{here.server_port}/")
        yield here


FOLDER = Path("data/downloads/openai-community--gpt2")


def test_a_model_comes_by_its_name_and_only_once(server, files, capsys):
    sample.main(["--init_from=gpt2", "--start=Hello", "--max_new_tokens=3", "--num_samples=1"])
    assert capsys.readouterr().out.startswith("Hello")
    kept = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.name != hub.COMPLETE}
    needed = ("config.json", "merges.txt", "model.safetensors", "vocab.json")
    assert kept == {name: files[name] for name in needed}
    asked = len(server.asked)
    base = load("gpt2")
    assert len(server.asked) == asked and base.path == FOLDER
    assert base.model.config.n_layer == 1


def test_a_tokenizer_comes_by_the_models_name_without_its_weights(server, files):
    Path("text.txt").write_text(make_text(3000))
    for repo in ("openai-community/gpt2", "gpt2-medium"):
        if repo == "gpt2-medium":
            server.names.append("openai-community/gpt2-medium")
        prepare_data.main(["--input=text.txt", f"--name={repo[-4:]}", f"--tokenizer={repo}"])
    assert not any("safetensors" in path for path, *_ in server.asked)
    tokens = read_meta(Path("data/gpt2"))["tokenizer"]
    assert (
        tokens == read_meta(Path("data/dium"))["tokenizer"] == read_tokenizer(Path("made")).state()
    )
    assert tokens == load("gpt2").tokenizer.state()
    with pytest.raises(UserError, match="there is no model no/model at"):
        prepare_data.main(["--input=text.txt", "--name=x", "--tokenizer=no/model"])


def test_an_interrupted_download_is_resumed(server, files):
    server.cuts["model.safetensors"] = [500, 3000]
    load("gpt2")
    ranges = [found for path, found, _ in server.asked if path.startswith("/cdn/")]
    assert ranges == [None, "bytes=500-", "bytes=3500-"]
    assert (FOLDER / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_a_later_command_proceeds_where_one_was_killed(server, files):
    FOLDER.mkdir(parents=True)
    (FOLDER / "model.safetensors.part").write_bytes(files["model.safetensors"][:700])
    (FOLDER / "config.json").write_bytes(files["config.json"])
    load("gpt2")
    assert [found for path, found, _ in server.asked if path.startswith("/cdn/")] == ["bytes=700-"]
    assert not any(path.endswith("config.json") for path, *_ in server.asked)


def test_a_truncated_or_altered_file_comes_once_more(server, files):
    load("gpt2")
    (FOLDER / "model.safetensors").write_bytes(files["model.safetensors"][:-8])
    load("gpt2")
    assert (FOLDER / "model.safetensors").read_bytes() == files["model.safetensors"]
    (FOLDER / "model.safetensors").unlink()
    (FOLDER / "model.safetensors.part").write_bytes(b"of another revision")
    with pytest.raises(UserError, match=r"with sha256 .*, but .* was expected"):
        load("gpt2")
    load("gpt2")


def test_a_wrong_size_is_refused_and_not_kept(server):
    server.sizes["vocab.json"] = 10
    with pytest.raises(
        UserError, match=r"vocab.json returned [\d,]+ bytes, but 10 were expected; try again"
    ):
        load("gpt2")
    assert not (FOLDER / "vocab.json").exists() and not (FOLDER / hub.COMPLETE).exists()


@pytest.mark.parametrize(
    "code, message",
    [
        (
            404,
            "there is no model openai-community/gpt2 at http://127.0.0.1:PORT; check the name, or set HF_TOKEN",
        ),
        (
            401,
            "http://127.0.0.1:PORT/openai-community/gpt2 asks for permission (HTTP 401); accept its terms there",
        ),
        (
            403,
            "http://127.0.0.1:PORT/openai-community/gpt2 asks for permission (HTTP 403); accept its terms there",
        ),
        (
            500,
            "cannot be reached: Internal Server Error; run it again to resume, or without a network get the folder",
        ),
    ],
)
def test_what_the_hub_refuses_is_one_line(code, message, server, fails):
    server.codes["listing"] = code
    line = fails(sample.main, "--init_from=gpt2")
    assert message.replace("PORT", str(server.server_port)) in line
    assert len(server.asked) == (3 if code == 500 else 1)


def test_without_a_network_the_ways_out_are_named(monkeypatch, fails):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    line = fails(sample.main, "--init_from=someone/model")
    assert (
        "cannot be reached: [Errno" in line
        and "write --init_from=FOLDER, or set HF_ENDPOINT to a mirror" in line
    )


def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    load("gpt2")
    assert {token for path, _, token in server.asked if path.startswith("/cdn/")} == {None}
    assert {token for path, _, token in server.asked if not path.startswith("/cdn/")} == {
        "Bearer secret"
    }


def test_hf_home_is_where_models_are_kept(server, monkeypatch, folder):
    monkeypatch.setenv("HF_HOME", "kept")
    assert load("gpt2").path == Path("kept/humptygpt/openai-community--gpt2")
    assert not Path("data").exists()


def test_weights_in_shards_come_with_their_index(server, files, folder):
    from safetensors.torch import load as load_bytes

    weights = load_bytes(server.files.pop("model.safetensors"))
    names = sorted(weights)
    shards = {
        "model-00001-of-00002.safetensors": names[:5],
        "model-00002-of-00002.safetensors": names[5:],
    }
    for shard, members in shards.items():
        save_file({name: weights[name] for name in members}, shard)
        server.files[shard] = Path(shard).read_bytes()
    index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
    server.files["model.safetensors.index.json"] = json.dumps(index).encode()
    assert load("gpt2").model.config.n_layer == 1
    assert shards.keys() < {path.name for path in FOLDER.iterdir()}


def test_what_is_not_supported_is_refused_before_its_weights_come(server, monkeypatch):
    config = json.loads(server.files["config.json"])
    server.files["config.json"] = json.dumps(config | {"model_type": "bert"}).encode()
    with pytest.raises(UserError, match="model_type=bert is not supported"):
        load("gpt2")
    assert not any("safetensors" in path for path, *_ in server.asked)
    server.files["config.json"] = json.dumps(config).encode()
    (FOLDER / "config.json").unlink()
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100}))
    with pytest.raises(
        UserError,
        match=r"no room in data/downloads/.*: 0.0 GB are needed, .*; set HF_HOME to a fold",
    ):
        load("gpt2")


@pytest.mark.parametrize(
    "answer", [b"<html>", b"[]", b'{"siblings": 3}', b'{"siblings": [{"rfilename": "../x"}]}']
)
def test_a_server_that_is_no_hub_is_refused(answer, server, monkeypatch):
    monkeypatch.setattr(
        hub, "download", lambda url, path, *args, **options: path.write_bytes(answer)
    )
    FOLDER.mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"does not answer as the hub of|has no config.json with model.safetensors"
    ):
        load("gpt2")


def test_a_path_that_begins_in_a_folder_here_is_no_model_of_the_hub(folder, fails):
    Path("out").mkdir()
    assert (
        fails(sample.main, "--init_from=out/x")
        == "init_from=out/x: there is no such file or folder\n"
    )
    assert hub.repository("out/x") is None and hub.repository("someone/x.1") == "someone/x.1"
