"""A student edits model.py: what does not hold any more is said in a line, before the first step."""

import json
import re
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN
from humptygpt.model import BLOCKS, POSITIONS, SelfAttention, rotate
from test_model import random_model

import sample
import train
from humptygpt import model as models
from humptygpt.formats import load as loading
from humptygpt.generation.generator import agrees
from humptygpt.models import checks
from humptygpt.models.build import MODELS
from humptygpt.models.checks import check_model

pytestmark = pytest.mark.usefixtures("model_is_edited")
ORIGINAL = {
    "attend": models.attend,
    "forward": SelfAttention.forward,
    "qkv": SelfAttention.qkv,
    "next_logits": models.GPT.next_logits,
    "append": models.LayerCache.append,
}


def see_everything(q, k, v, mask):
    return ORIGINAL["attend"](q, k, v, torch.zeros(1))


def without_softmax(q, k, v, mask):
    scores = q @ k.mT
    return (scores + scores.new_full(scores.shape[-2:], -torch.inf).triu(1)) @ v


def sigmoid(q, k, v, mask):
    scores = q @ k.mT
    return (scores + scores.new_full(scores.shape[-2:], -torch.inf).triu(1)).sigmoid() @ v


def ignore_cache(self, x, shared, cache=None):
    return ORIGINAL["forward"](self, x, shared._replace(masks={0: None}))


def broken_cache(self, x, shared, cache=None):
    if cache:
        raise NotImplementedError("no cache yet")
    return ORIGINAL["forward"](self, x, shared)


def without_residual(self, x, shared, cache=None):
    x = self.attn(self.attn_norm(x), shared, cache)
    return self.feed_forward(self.mlp_norm(x), shared, cache)


def more_in_training(self, x, shared, cache=None):
    return ORIGINAL["forward"](self, x, shared, cache) * (1 + self.training)


def cut_gradient(self, x, shared, cache=None):
    return ORIGINAL["forward"](self, x.detach(), shared, cache).detach()


def random_weights(q, k, v, mask):
    return torch.nn.functional.dropout(ORIGINAL["attend"](q, k, v, mask), 0.2)


def doubled(self, idx, cache=None):
    return 2 * ORIGINAL["next_logits"](self, idx, cache)


def forget_all_but_20(self, end, **new):
    found = ORIGINAL["append"](self, end, **new)
    return [x.narrow(-2, max(0, end - 20), min(20, end)) for x in found]


def by_column(self, x, at):
    """A position that counts the padding before a shorter prompt."""
    columns = at if isinstance(at, slice) else slice(0, at.shape[1])
    return x * (1 + 0.1 * torch.arange(columns.start, columns.stop)[:, None])


LEAK = "a token sees later tokens, so the model can copy what it should predict"
UNLIKE = "training and evaluation compute different logits, even without dropout"
CACHE = "with a cache, next_logits() computes other logits than forward()"
# {what is replaced by what: what train.py says}
EDITS = {
    ("attend", see_everything): LEAK,
    (
        "attend",
        without_softmax,
    ): "a small model like this one fails, so these are not checked: training unlike "
    "evaluation, future tokens, cache (ArithmeticError: model.py computes nan or infinity",
    (
        "attend",
        sigmoid,
    ): "attend() in model.py has been edited, so PyTorch's fused kernel is not used",
    (
        "forward",
        broken_cache,
    ): "a small model like this one fails, so these are not checked: cache (NotImpl",
    (
        "block",
        without_residual,
    ): "no weight of a new model gets a gradient, so it cannot learn; is a residual",
    ("forward", more_in_training): UNLIKE,
    (
        "forward",
        cut_gradient,
    ): "10 weights get no gradient, so they cannot learn, such as stack.blocks.0.attn",
    ("attend", random_weights): UNLIKE,
    ("next_logits", doubled): CACHE,
    ("append", forget_all_but_20): CACHE,
    (
        "embed",
        by_column,
    ): "with a cache, next_logits() computes other logits beside a longer text",
}


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit[1].__name__)
def test_train_py_says_in_a_line_what_an_edit_breaks(edit, tiny, monkeypatch, capsys):
    name, edited = edit
    where = {"attend": models, "forward": SelfAttention, "block": BLOCKS["pre_norm"]}
    where |= {"next_logits": models.GPT}
    where |= {"append": models.LayerCache, "embed": POSITIONS["rotary"]}
    monkeypatch.setattr(where[name], "forward" if name == "block" else name, edited)
    keys = ["--position=rotary", "--init=zero", "--block_size=32", "--max_iters=1"]
    train.main([*TINY_RUN, *keys])
    notes = re.findall("^note: (.*)$", capsys.readouterr().err, re.MULTILINE)
    assert sum(note.startswith(EDITS[edit]) for note in notes) == 1, notes


class Own(SelfAttention):
    """An attention that reads rotary positions without asking whether there are any."""

    def forward(self, x, shared, cache=None):
        q, k, v = (self.heads(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, shared.rotation), rotate(k, shared.rotation)
        if cache:
            k, v = cache.append(shared.end, k=k, v=v)
        return self.output(models.attend(q, k, v, self.mask(shared)), x)

    def mask(self, shared):
        return shared.masks[self.window]


class Leaking(Own):
    def mask(self, shared):
        return torch.zeros(1)


class Forgetful(Own):
    def forward(self, x, shared, cache=None):
        return super().forward(x, shared)


class Narrow(Own):
    def output(self, y, x):
        return super().output(y, x)[..., 1:]


class Unused(Own):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.spare = torch.nn.Parameter(torch.ones(3))


MISTAKES = {
    Own: None,
    Leaking: LEAK,
    Forgetful: CACHE,
    Narrow: "a small model like this one fails, so these are not checked: gradients, training unlike evaluation, future"
    " tokens, cache (RuntimeError: ",
    Unused: "2 weights get no gradient, so they cannot learn, such as stack.blocks.0.attn.spare",
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("attention", MISTAKES)
def test_an_attention_that_takes_rotary_positions_for_granted_is_told_its_mistake(
    attention, tiny, monkeypatch, capsys, fails
):
    argv = [*TINY_RUN, "--attention=own", "--position=rotary", "--max_iters=1"]
    assert fails(train.main, *argv).startswith("attention=own is not one of: softmax")
    monkeypatch.setitem(models.ATTENTIONS, "own", attention)
    with suppress(RuntimeError):  # of the shapes
        train.main(argv)
    notes = re.findall("^note: (.*)$", capsys.readouterr().err, re.MULTILINE)
    assert notes[0].startswith(MISTAKES[attention]) if MISTAKES[attention] else not notes


def test_what_cannot_be_tried_is_named_and_does_not_keep_the_rest_from_being_tried(capsys, monkeypatch):
    class Unready(Leaking):
        def forward(self, x, shared, cache=None):
            assert not self.training, "no training yet"
            return super().forward(x, shared, cache)

    monkeypatch.setitem(models.ATTENTIONS, "own", Unready)
    check_model(random_model(position="rotary", attention="own"))
    told = capsys.readouterr().err
    assert f"note: {LEAK}" in told
    failed = "gradients, training unlike evaluation (AssertionError: no training yet)"
    assert f"so these are not checked: {failed}" in told


def test_what_the_edit_does_not_break_is_not_mentioned(capsys):
    for keys in (
        *({"model": name, "window": 4} for name in MODELS),
        *({"position": name} for name in POSITIONS),
        *({"block": name} for name in BLOCKS),
        {"init": "zero", "tie_weights": False},
        {"mlp_conv": 2, "n_kv_head": 1, "window": 3, "dropout": 0.5, "attn_bias": True},
        {"n_members": 3, "block_size": 2},
        {"norm": "none", "n_layer": 12},
    ):
        keys = keys | ({"n_embd": 1} if keys.get("model") == "number_mlp" else {})
        model = random_model(**keys)
        state = torch.random.get_rng_state()
        check_model(model)
        assert torch.equal(state, torch.random.get_rng_state())
        assert capsys.readouterr().err == "", keys


@pytest.mark.whole_ending
def test_samples_printed_in_training_are_those_of_a_model_without_a_cache_if_its_edit_needs_that(
    tiny, monkeypatch, capsys
):
    monkeypatch.setattr(SelfAttention, "forward", ignore_cache)
    monkeypatch.setattr(models.GPT, "make_cache", None)  # so that no cache can be used
    train.main([*TINY_RUN, "--max_iters=1"])
    assert capsys.readouterr().err.count("generating without a cache") == 1


def test_an_edit_that_fails_in_a_tiny_model_is_sampled_from_without_faster_layers(run_train, monkeypatch, capsys):
    def only_16_features(self, x, shared, cache=None):
        return ORIGINAL["forward"](self, x, shared, cache) * torch.ones(16)

    run_train("--n_embd=16", "--n_head=2")
    monkeypatch.setattr(checks, "TRIED_IN_FULL", 0)
    monkeypatch.setattr(SelfAttention, "forward", only_16_features)
    sample.main(["--out_dir=out/run", "--max_new_tokens=3", "--device=cpu"])
    notes = capsys.readouterr().err
    assert "so these are not checked: gradients, training unlike evaluation," in notes
    assert "not using faster layers" in notes


def test_an_edit_that_only_a_model_of_its_own_size_shows_is_found(run_train, monkeypatch):
    def first_8_features(self, x, shared):
        cos, sin = shared.rotation
        rotation = torch.cat([cos[..., :8], torch.ones_like(cos)[..., 8:]], -1), sin
        return ORIGINAL["qkv"](self, x, shared._replace(rotation=rotation))

    run_train("--n_embd=32", "--n_head=2", "--position=rotary")
    monkeypatch.setattr(SelfAttention, "qkv", first_8_features)
    model = loading.load("out/run").model
    assert agrees(model) and not agrees(model, joins=True)


class Gain(torch.nn.Module):
    """A norm with constants that are in no checkpoint."""

    def __init__(self, config):
        super().__init__()
        self.register_buffer("gain", torch.linspace(0.5, 1, 16), persistent=False)
        self.others = [torch.zeros(16), torch.ones(16), torch.full((16,), 2.0)]

    def forward(self, x):
        return x * self.gain + sum(self.others)


def test_a_model_with_constants_of_its_own_is_sampled_from_and_resumed(run_train, monkeypatch, capsys):
    monkeypatch.setitem(models.NORMS, "gain", Gain)
    run_train("--n_embd=16", "--n_head=2", "--norm=gain")
    expected = loading.load("out/run").model.stack.norm(torch.ones(16))
    assert torch.equal(expected, Gain(None)(torch.ones(16)))
    sample.main(["--out_dir=out/run", "--max_new_tokens=3", "--device=cpu"])
    train.main(["--init_from=resume", "--out_dir=out/run", "--max_iters=7"])
    assert "iter 7" in capsys.readouterr().out


def test_sampling_and_resuming_say_that_model_py_has_changed_since(run_train, monkeypatch, capsys):
    run_train()
    sample.load("out/run", device="cpu")
    assert "has changed" not in capsys.readouterr().err
    monkeypatch.setattr("humptygpt.formats.checkpoint.code_checksum", lambda: "another")
    changed = "note: model.py has changed since the run in out/run, whose losses may not hold"
    sample.load("out/run", device="cpu")
    assert capsys.readouterr().err.count(changed) == 1
    train.main(["--init_from=resume", "--out_dir=out/run", "--max_iters=7"])
    assert capsys.readouterr().err.count(changed) == 1
    Path("out/run/config.json").write_text(json.dumps({"_model.py": 3}))  # damaged: no word
    sample.load("out/run", device="cpu")
    assert "has changed" not in capsys.readouterr().err
