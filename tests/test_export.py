"""Exported models, asked through the programs that they are for: transformers and llama.cpp (xllamacpp) themselves."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, make_text
from gguf import GGUFReader, GGUFWriter
from humptygpt.model import ModelConfig
from properties import given, settings
from test_model import random_model
from test_tokenizer import EVERY, GPT2, SEPARATED, TEXT, anything
from torch import nn
from uncached import generate

import export
import prepare_data
import sample
import train
from humptygpt import cli
from humptygpt import model as models
from humptygpt.cli import UserError
from humptygpt.formats import checkpoint
from humptygpt.formats.families import FAMILIES, find_family
from humptygpt.formats.gguf import ACTIVATIONS
from humptygpt.formats.huggingface import to_pretrained, write_files
from humptygpt.formats.load import Loaded, load
from humptygpt.formats.tokenizer_json import (
    build_tokenizer,
    tokenizer_files,
    tokenizer_json,
)
from humptygpt.models.build import build_on_meta, restore_model
from humptygpt.tokenizers.basic import END_OF_TEXT, CharTokenizer, Tokenizer
from humptygpt.tokenizers.huggingface import read_tokenizer
from humptygpt.tokenizers.pretrained import PretrainedTokenizer
from humptygpt.training.settings import TrainConfig

ROOT = Path(__file__).parent.parent
ROTARY = {
    "position": "rotary",
    "norm": "rmsnorm",
    "mlp": "gated",
    "activation": "silu",
    "tie_weights": False,
}
LLAMA = " ".join(f"--{key}={x}" for key, x in ROTARY.items()) + " --n_kv_head=1"
RUNG = str(ROOT / "config/article/11_llama/2-llama.py")
NEW_TOKENS = 100


def transformers():
    found = pytest.importorskip("transformers", reason="needs transformers: pip install -r requirements-dev.txt")
    found.logging.disable_progress_bar()
    return found


# --------------------------------------------------------------------------------------
# Runs

CASES = {  # options of prepare_data.py and train.py
    "gpt2, char": ("--input=ascii.txt --tokenizer=char", ""),
    "gpt2, documents of char": ("--input=texts --tokenizer=char", ""),
    "gpt2, byte": ("--tokenizer=byte", ""),
    "gpt2, bpe": ("--tokenizer=bpe --vocab_size=320", "--bias=True"),
    "gpt2, gpt2's tokens": ("--tokenizer=gpt2", "--vocab_size=320"),
    "gpt2, sentencepiece": (
        "--tokenizer=sentencepiece --vocab_size=320",
        "--tie_weights=False",
    ),
    "llama, documents of bpe": ("--input=texts --tokenizer=bpe --vocab_size=320", LLAMA),
    "the rung 11_llama, char": (
        "--input=ascii.txt --tokenizer=char",
        f"{RUNG} --n_layer=2 --n_embd=32",
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Callable[[str], Path]:
    """The folder in which the run of a case is, in out/run; trained when it is first asked for."""
    done = {}

    def run(case: str) -> Path:
        if case not in done:
            done[case] = tmp_path_factory.mktemp("run")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(done[case])
                patch.setattr("humptygpt.data.vocabulary.gpt2_pieces", lambda: GPT2)
                patch.setattr("humptygpt.training.run.draw_losses", lambda *args: None)
                make_run(*CASES[case])
        return done[case]

    return run


def make_run(prepared: str, trained: str) -> None:
    Path("text.txt").write_text(TEXT)
    Path("ascii.txt").write_text(make_text(3000))
    Path("texts").mkdir()
    for number in range(12):
        text = make_text(150) + "é東\n" + make_text(500, seed=number)
        Path("texts", f"{number}.txt").write_text(text)
    prepare_data.main(["--input=text.txt", "--name=mine", *prepared.split()])
    shape = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--activation=gelu_tanh"]
    given = trained.split() if RUNG in trained else [*shape, *trained.split()]
    train_briefly(*given, "--max_iters=20", "--block_size=160", "--out_dir=out/run")


def train_briefly(*given: str) -> None:
    keys = ["--eval_interval=1000", "--eval_iters=1", "--batch_size=4", "--warmup_iters=2"]
    keys += ["--dataset=mine", "--device=cpu", "--dtype=float32", "--learning_rate=1e-2"]
    assert train.main([*given[:1], *keys, *given[1:]]) == 0


def continued(out_dir: Path, prompt: str) -> str:
    """sample.py's greedy text, its prompt included."""
    found = sample.load(str(out_dir))
    return found.complete(prompt, max_new_tokens=NEW_TOKENS, temperature=0)


def open_folder(folder: Path) -> tuple[nn.Module, object]:
    hf = transformers()
    model, report = hf.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model, hf.AutoTokenizer.from_pretrained(folder)


def llama_cpp_server(path: Path):
    """A server of llama.cpp for one model, with keys and values in float32."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="needs xllamacpp: pip install -r requirements-dev.txt")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx = str(path), 160
    params.n_parallel, params.n_gpu_layers = 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.verbosity, params.cache_ram_mib, params.warmup = -1, 0, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(params)


def llama_cpp(path: Path):
    """A function (prompt, tokens) -> greedy tokens that continue it."""
    server = llama_cpp_server(path)

    def complete(prompt: str | list[int], n: int = NEW_TOKENS, **options) -> dict:
        request = {"prompt": prompt, "max_tokens": n, "temperature": 0.0}
        request |= {"cache_prompt": False, "return_tokens": True}
        return server.handle_completions(request | options)

    return complete


@pytest.mark.parametrize("case", CASES)
def test_transformers_has_the_logits_the_tokens_and_the_greedy_text_of_sample_py(case, runs, monkeypatch):
    monkeypatch.chdir(runs(case))
    export.main(["--out_dir=out/run", "--to=exported"])
    theirs, tokenizer = open_folder(Path("exported"))
    ours = load(Path("out/run/best.pt"))
    text = make_text(150)
    ids = ours.tokenizer.encode(text)
    assert tokenizer(text)["input_ids"] == ids.tolist() and tokenizer.decode(ids) == text
    idx = torch.from_numpy(ids)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, ours.model(idx)[0], atol=1e-4, rtol=1e-4)
    prompt = tokenizer(text[:20], return_tensors="pt")
    assert prompt.input_ids.shape[1] + NEW_TOKENS <= 160
    output = theirs.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)[0]
    if output[-1] == ours.tokenizer.eot:
        output = output[:-1]
    assert tokenizer.decode(output) == continued(Path("out/run"), text[:20])


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_has_the_greedy_text_of_sample_py(case, runs, monkeypatch):
    monkeypatch.chdir(runs(case))
    export.main(["--out_dir=out/run", "--to=model.gguf"])
    text = make_text(20)
    answer = llama_cpp(Path("model.gguf"))(text)
    assert text + answer["choices"][0]["text"] == continued(Path("out/run"), text)


# --------------------------------------------------------------------------------------
# Models that started elsewhere


def test_a_run_with_lora_is_exported_merged(runs, monkeypatch, tmp_path):
    folder = runs("llama, documents of bpe")
    monkeypatch.chdir(folder)
    lora = ["--lora_rank=4", "--lora_targets=q_proj,v_proj,o_proj,up_proj", "--max_iters=8"]
    train_briefly("--init_from=out/run", *lora, "--learning_rate=3e-2", "--out_dir=lora")
    saved = checkpoint.read(Path("lora/ckpt.pt"))
    idx = torch.arange(40)[None]
    with torch.no_grad():
        config = ModelConfig(**saved["model_config"])
        model = build_on_meta(config, saved["train_config"])
        restore_model(model, saved["model"])
        unmerged = model.eval()(idx)[0]
        before = load("out/run").model(idx)[0]
    assert (unmerged - before).abs().max() > 0.1
    for number, source in enumerate(["--out_dir=lora", "--init_from=lora/ckpt.pt"]):
        export.main([source, f"--to={tmp_path}/{number}"])
        theirs, _ = open_folder(tmp_path / str(number))
        with torch.no_grad():
            torch.testing.assert_close(theirs(idx).logits, unmerged, atol=1e-5, rtol=1e-5)


def test_a_model_that_was_not_trained_here_is_exported(capsys):
    """A folder of transformers, with its logits; and the exported folder again."""
    pytest.importorskip("transformers")
    from test_pretrained import gpt2

    original = gpt2()
    original.save_pretrained("theirs")
    write_files(Path("theirs"), tokenizer_files(CharTokenizer("\nabcdefgh"), 24))
    export.main(["--init_from=theirs", "--to=first"])
    theirs, tokenizer = open_folder(Path("first"))
    idx = tokenizer("abc\nhgf", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = original(idx).logits
        torch.testing.assert_close(theirs(idx).logits, expected, atol=1e-4, rtol=1e-4)
    capsys.readouterr()
    export.main(["--init_from=first", "--out_dir=x", "--to=again"])
    assert "note: out_dir=x has no effect with init_from=first" in capsys.readouterr().err
    first, again = (Path(to, "model.safetensors").read_bytes() for to in ("first", "again"))
    assert first == again


# --------------------------------------------------------------------------------------
# Tokenizers


BUILT = {name: build_tokenizer(tokenizer) for name, tokenizer in EVERY.items()}


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(text=anything)
def test_any_text_has_the_same_tokens_in_transformers_and_comes_back(name, text):
    tokenizer = EVERY[name]
    if END_OF_TEXT.encode() in tokenizer.pieces:  # there it becomes the token
        text = "".join(text.split(END_OF_TEXT)).replace("endoftext", "")
    if isinstance(tokenizer, CharTokenizer):
        text = "".join(char for char in text if char in tokenizer.alphabet)
    ids = tokenizer.encode(text).tolist()
    assert BUILT[name].encode(text).ids == ids
    assert BUILT[name].decode(ids) == text


def test_the_end_of_text_token_is_theirs_too():
    for name, tokenizer in SEPARATED.items():
        theirs = build_tokenizer(tokenizer)
        assert theirs.encode(f"or{END_OF_TEXT}").ids[-1] == tokenizer.eot, name
        ids = [*tokenizer.encode("or"), tokenizer.eot]
        assert theirs.decode(ids, skip_special_tokens=True) == "or"
        assert theirs.decode(ids, skip_special_tokens=False) == f"or{END_OF_TEXT}"


def test_an_exported_alphabet_without_an_a_is_read_back(folder):
    write_files(folder, tokenizer_files(CharTokenizer("bc"), 64))
    assert read_tokenizer(folder).encode("cb").tolist() == [1, 0]


def test_a_character_that_the_alphabet_lacks_is_an_error_there_as_here():
    with pytest.raises(Exception, match=r"unknown|UNK"):
        build_tokenizer(CharTokenizer("ab")).encode("abc")


# --------------------------------------------------------------------------------------
# Models without a run


def loaded(vocab_size: int | None = None, tokenizer: Tokenizer | None = None, **keys) -> Loaded:
    """A random model, as from a checkpoint; vocab_size: rows of the embedding."""
    tokenizer = tokenizer or CharTokenizer("\n abcdefghi")
    rows = vocab_size or tokenizer.vocab_size
    shape = {"block_size": 64, "vocab_size": rows, "activation": "gelu_tanh"}
    model = random_model(**shape | keys).eval()
    for name, parameter in model.named_parameters():
        # strong enough for positions to matter
        mean = float("norm" in name and name.endswith("weight"))
        nn.init.normal_(parameter, mean=mean, std=0.3)
    saved = {
        "progress": {"iter": 3, "best_iter": 3, "best_val_loss": 1.5, "tokens": 48},
        "data": {"source": "a text"},
        "task": "language modelling",
        "model_config": vars(model.config),
        "train_config": {"dataset": "mine", "max_iters": 3, "seed": 1337},
    }
    return Loaded(model, tokenizer, BEST, "", saved=saved)


BEST = Path("out/run/best.pt")


def greedy(found: Loaded, prompt: list[int], n: int) -> list[int]:
    size = found.tokenizer.vocab_size
    return generate(found.model, [prompt], n, size, temperature=0.0)[0]


SHAPES = [
    {"bias": True, "n_hidden": 40},
    {"tie_weights": False, "n_head": 4, "norm_eps": 0.1},
    ROTARY | {"n_head": 4, "n_kv_head": 2, "norm_eps": 0.1},
    ROTARY | {"tie_weights": True, "head_size": 6, "rope_base": 50.0, "bias": True},
    ROTARY
    | {
        "rope_factor": 4.0,
        "rope_original_context": 16,
        "rope_high_freq_factor": 2.0,
        "rope_low_freq_factor": 0.5,
    },
    {"vocab_size": 24},  # 13 rows belong to no token
]


@pytest.mark.parametrize("keys", SHAPES, ids=lambda keys: " ".join(sorted(keys.keys() - ROTARY.keys())))
def test_llama_cpp_computes_every_shape_that_can_be_exported_to_within_its_rounding(keys):
    found = loaded(**keys)
    export.write_gguf_file(found, Path("model.gguf"), "float32")
    prompt = torch.randint(11, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    answer = llama_cpp(Path("model.gguf"))(prompt, 5, logprobs=11)["choices"][0]
    text = found.tokenizer.encode(answer["text"]).tolist()
    assert text == greedy(found, prompt, 5)
    with torch.no_grad():
        logits = found.model(torch.tensor([prompt + text]))[0][0, 39:44]
    expected = logits[:, : found.tokenizer.vocab_size].log_softmax(dim=-1)
    for step, likeliest in enumerate(answer["logprobs"]["content"]):
        assert len(likeliest["top_logprobs"]) == 11
        for entry in likeliest["top_logprobs"]:
            own = expected[step, entry["id"]].item()
            assert entry["logprob"] == pytest.approx(own, abs=0.03), (step, entry)


@pytest.mark.parametrize("dtype", ["bfloat16", "q8_0"])
def test_a_gguf_file_in_fewer_bits_is_smaller_and_still_read_by_llama_cpp(dtype):
    found = loaded(n_hidden=40, **ROTARY)
    export.write_gguf_file(found, Path("exact.gguf"), "float32")
    export.write_gguf_file(found, Path("model.gguf"), dtype)
    few = {"bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    for tensor in GGUFReader("model.gguf").tensors:
        row_of_40 = tensor.name.endswith("ffn_down.weight")
        exact = "norm" in tensor.name or (dtype == "q8_0" and row_of_40)
        assert tensor.tensor_type.name == ("F32" if exact else few), tensor.name
    assert Path("model.gguf").stat().st_size < Path("exact.gguf").stat().st_size
    assert llama_cpp(Path("model.gguf"))([1, 5, 2], 10)["usage"]["completion_tokens"] == 10


def test_a_folder_in_bfloat16_has_the_weights_rounded():
    found = loaded()
    export.write_folder(found, Path("exported"), "bfloat16")
    theirs, _ = open_folder(Path("exported"))
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.bfloat16}
    assert torch.equal(theirs.transformer.wte.weight, found.model.wte.weight.bfloat16())


def test_rows_that_stand_for_no_token_are_never_drawn():
    found = loaded(vocab_size=24)
    nn.init.zeros_(found.model.wte.weight[:11])
    export.write_folder(found, Path("exported"), "float32")
    theirs, tokenizer = open_folder(Path("exported"))
    assert theirs.config.vocab_size == 24
    output = theirs.generate(**tokenizer("abc", return_tensors="pt"), max_new_tokens=30)[0]
    assert output.max() < 11 and len(output) == 33


# --------------------------------------------------------------------------------------
# Refusals


def preset(path: str | Path) -> ModelConfig:
    """The model of a config file, which may be relative to this checkout."""
    given = cli.read([str(ROOT / path)], ModelConfig, TrainConfig)
    return cli.make(ModelConfig, given)


PRESETS = {FAMILIES["gpt2"].preset: "gpt2"}
PRESETS |= dict.fromkeys(map(str, ROOT.glob("config/*_llama.py")), "llama")


@pytest.mark.parametrize("path", PRESETS)
def test_the_presets_can_be_exported_in_both_formats(path):
    config = preset(path)
    assert find_family(config).name == PRESETS[path]
    keys = vars(config) | {"n_layer": 1, "vocab_size": 11}
    _, weights = to_pretrained(random_model(**keys))
    assert config.activation == ACTIVATIONS[PRESETS[path]]
    # q8_0 can pack all rows
    assert all(x.shape[-1] % 32 == 0 for x in weights.values() if x.dim() == 2)


# a tokenizer that comes back from an export is another project's
THEIRS = PretrainedTokenizer(tokenizer_json(SEPARATED["bpe"]), None, None)
CHAR = "tokenizer=char cannot be .*"
GGUF_REFUSES = [
    ({"activation": "gelu"}, "activation=gelu cannot be .* --activation=gelu_tanh"),
    (ROTARY | {"activation": "relu"}, "activation=relu cannot be .* --activation=silu"),
    ({"tokenizer": CharTokenizer("aé")}, f"{CHAR} non-ASCII characters"),
    ({"tokenizer": CharTokenizer("aé▁", True)}, f"{CHAR} and must not contain '▁'"),
    (
        {"tokenizer": THEIRS},
        r"made here can be .*; export a folder, as with --to=FOLDER, wh",
    ),
]


@pytest.mark.parametrize(("keys", "complaint"), GGUF_REFUSES, ids=range(len(GGUF_REFUSES)))
def test_what_gguf_cannot_hold_is_refused_by_name_with_the_way_out(keys, complaint, folder):
    with pytest.raises(UserError, match=complaint):
        export.write_gguf_file(loaded(**keys), Path("model.gguf"), "float32")
    assert not list(folder.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_from_which_transformers_computes_other_logits_is_not_left(dtype, folder, monkeypatch):
    transformers()
    heads = models.SelfAttention.heads
    monkeypatch.setattr(models.SelfAttention, "heads", lambda self, x: 1.2 * heads(self, x))
    with pytest.raises(UserError, match="transformers computes other logits"):
        export.write_folder(loaded(), Path("exported"), dtype)
    assert not list(folder.iterdir())


def test_an_edited_model_py_whose_logits_nothing_compares_is_refused(tiny, fails, monkeypatch, model_is_edited):
    train.main([*TINY_RUN, "--max_iters=1", "--activation=gelu_tanh"])
    if export.find_spec("transformers"):
        export.main(["--out_dir=out/run", "--to=compared"])
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    for to in ("exported", "model.gguf"):
        complaint = fails(export.main, "--out_dir=out/run", f"--to={to}")
        assert complaint.startswith("model.py has been edited, so other programs may")
        assert complaint.endswith("transformers is installed: pip install transformers\n")
        assert not Path(to).exists()


def test_the_code_that_was_shipped_is_this_model_py():
    """Whoever changes model.py for all writes its new checksum into checkpoint.py."""
    assert checkpoint.code_checksum() == checkpoint.SHIPPED_CODE


def test_mistakes_are_one_line(fails):
    Path("full").mkdir()
    Path("full/file").write_text("")
    for argv, complaint in {
        "--to=x --dtype=q8_0": "dtype=q8_0 needs a file that ends in .gguf; otherwise use float32",
        "--to=x.pt": "to=x.pt must be a folder or end in .gguf; a run's own best.pt can be",
        "--to=x.onnx": "to=x.onnx must be a folder or end in .gguf",
    }.items():
        assert complaint in fails(export.main, *argv.split())
    for path in ("full", "full/file", "/dev/null"):
        with pytest.raises(UserError, match=f"cannot write {path}: "):
            export.write_folder(loaded(), Path(path), "float32")
        assert Path(path).exists() and Path("full/file").is_file()


@pytest.mark.parametrize("write", [export.write_folder, export.write_gguf_file])
def test_a_full_disk_leaves_nothing_half_written(write, folder, monkeypatch):
    def fail(*args):
        raise OSError(errno.EFBIG, "File too large")

    # the folder and the head of the file are there by then
    monkeypatch.setattr("humptygpt.formats.huggingface.write_files", fail)
    monkeypatch.setattr(GGUFWriter, "write_tensors_to_file", fail)
    with pytest.raises(UserError, match=r"^cannot write new/exported: File"):
        write(loaded(), Path("new/exported"), "float32")
    assert not list((folder / "new").iterdir())
