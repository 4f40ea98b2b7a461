"""The encoder-decoder: compared with torch's, and in every variant."""

import warnings

import pytest
import test_model
import torch
from conftest import TINY_RUN, overfit
from torch import Tensor, nn

import train
from humptygpt import model as models
from humptygpt.generation.translation import select
from humptygpt.models.transformer import Transformer

VARIANTS = [
    *(keys for keys in test_model.COMMON_VARIANTS if keys != {"block": "plain"}),
    {"n_kv_head": 1, "n_head": 4},
    {"window": 3},
    {"window": 3, "position": "alibi"},
]
every_variant = test_model.each(VARIANTS)
EOT = 0


@pytest.mark.usefixtures("pairs")
def test_a_block_that_has_no_cross_attention_is_refused_in_one_line(fails):
    argv = [*TINY_RUN, "--dataset=pairs", "--model=transformer", "--block=plain"]
    argv += ["--block_size=64"]
    line = fails(train.main, *argv)
    assert line == "model=transformer needs block=pre_norm or post_norm, not plain\n"


def tiny(**keys) -> Transformer:
    return test_model.tiny(model="transformer", **{"block_size": 12} | keys)


def random_model(**keys) -> Transformer:
    return test_model.random_model(model="transformer", block_size=12, **keys).eval()


def tokens(B: int, T: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 11, (B, T), generator=torch.Generator().manual_seed(seed))


def with_padding(source: Tensor, lengths: list[int]) -> Tensor:
    return source.masked_fill(torch.arange(source.shape[1]) >= torch.tensor(lengths)[:, None], -1)


# --------------------------------------------------------------------------------------
# Compared with torch's


def torch_transformer(norm_first: bool) -> nn.Transformer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about an optimization that it cannot use
        theirs = nn.Transformer(
            d_model=48, nhead=4, num_encoder_layers=3, num_decoder_layers=3, dim_feedforward=96, dropout=0.0,
            batch_first=True, norm_first=norm_first,
        )  # fmt: skip
    # torch adds a last norm after blocks that end with one; the paper does not
    if not norm_first:
        theirs.encoder.norm = theirs.decoder.norm = None
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    return theirs.eval()


def to_our_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """torch's weights under our names: it has queries, keys and values in one matrix."""
    names = {
        ".layers.": ".blocks.",
        "self_attn": "attn",
        "multihead_attn": "cross_attn",
        "out_proj": "o_proj",
        "linear1": "mlp.up_proj",
        "linear2": "mlp.down_proj",
        "norm1": "attn_norm",
    }
    norms = {
        "encoder": {"norm2": "mlp_norm"},
        "decoder": {"norm2": "cross_norm", "norm3": "mlp_norm"},
    }
    ours = {}
    for name, tensor in theirs.items():
        for old, new in (names | norms[name.partition(".")[0]]).items():
            name = name.replace(old, new)
        if "in_proj_" in name:
            parts = zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True)
            ours |= {name.replace("in_proj_", f"{part}."): rows for part, rows in parts}
        else:
            ours[name] = tensor
    return ours


@pytest.mark.parametrize("block", ["post_norm", "pre_norm"])
@pytest.mark.parametrize("lengths", [[9, 9, 9], [4, 9, 1]], ids=["whole", "padded"])
def test_with_equal_weights_the_outputs_are_those_of_torchs_transformer(block, lengths):
    torch.manual_seed(0)
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 48, "n_hidden": 96}
    kind = {"bias": True, "activation": "relu", "position": "none", "block": block}
    ours = tiny(**sizes, **kind).eval()
    theirs = torch_transformer(norm_first=block == "pre_norm")
    missing, unexpected = ours.load_state_dict(to_our_names(theirs.state_dict()), strict=False)
    assert not unexpected and set(missing) == {"wte.weight", "lm_head.weight"}
    source, idx = with_padding(tokens(3, 9), lengths), tokens(3, 7, seed=1)
    causal = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.bool)
    expected = theirs(
        ours.wte(source.clamp(min=0)),
        ours.wte(idx),
        tgt_mask=causal,
        src_key_padding_mask=source < 0,
        memory_key_padding_mask=source < 0,
    )
    found, _ = ours.decoder(ours.wte(idx), idx, **ours.encode(source))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------
# Every variant


@every_variant
def test_padding_of_the_source_does_not_change_the_logits(variant):
    model = random_model(**variant)
    source, idx = tokens(3, 10), tokens(3, 8, seed=1)
    lengths = [4, 10, 1]
    together, _ = model(idx, source=with_padding(source, lengths))
    for row, length in enumerate(lengths):
        alone, _ = model(idx[row : row + 1], source=source[row : row + 1, :length])
        torch.testing.assert_close(together[row], alone[0])


@every_variant
def test_every_token_of_the_source_changes_the_logits_of_every_target_token(variant):
    model = random_model(**variant)
    source, idx = tokens(1, 6), tokens(1, 5, seed=1)
    before, _ = model(idx, source=source)
    for s in range(6):
        changed = source.clone()
        changed[0, s] = changed[0, s] % 10 + 1
        assert (model(idx, source=changed)[0] != before).any(dim=-1).all()


@every_variant
def test_decoding_in_pieces_and_selecting_rows_in_between_gives_the_same_logits(variant):
    model = random_model(**variant)
    source, idx = tokens(3, 10), tokens(3, 12, seed=1)
    rows = torch.tensor([2, 0, 0, 1])
    expected, _ = model(idx, source=source)
    cache = model.make_cache(source)
    pieces = idx[:, :8].split([1, 5, 1, 1], dim=1)
    found = torch.cat([model(piece, cache=cache)[0] for piece in pieces], dim=1)
    torch.testing.assert_close(found, expected[:, :8], atol=1e-5, rtol=1e-5)
    select(cache, rows)
    found, _ = model(idx[rows, 8:], cache=cache)
    torch.testing.assert_close(found, expected[rows, 8:], atol=1e-5, rtol=1e-5)


@every_variant
def test_one_batch_of_pairs_overfits(variant):
    model = tiny(**variant)
    source, target = tokens(4, 6), tokens(4, 5, seed=1)
    if "window" in variant or variant.get("position") == "none":
        # without order or a view of the whole source it learns no more than one word
        target = source[:, :1] * torch.ones(1, 5, dtype=torch.int64)
    batch = {
        "source": source,
        "idx": nn.functional.pad(target[:, :-1], (1, 0)),
        "targets": target,
    }
    assert overfit(model, batch, steps=200, lr=5e-3, until=0.3) < 0.3


def test_in_the_encoder_a_window_reaches_equally_far_to_both_sides():
    model = random_model(n_layer=1, window=3)
    source = tokens(1, 9)
    before = model.encode(source)["source"]
    changed = source.clone()
    changed[0, 4] = changed[0, 4] % 10 + 1
    after = model.encode(changed)["source"]
    assert (after != before).any(dim=-1)[0].nonzero().flatten().tolist() == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("position", ["rotary", "alibi"])
@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("T", [1, 3])
def test_cross_attention_has_neither_rotation_nor_bias_nor_window(position, window, T):
    """Its result is a sum over the source, whose order makes no difference to it."""
    decoder = random_model(n_layer=1, position=position, window=window, mlp="none").decoder
    cross, contexts = decoder.blocks[0].cross_attn, []
    cross.register_forward_pre_hook(lambda module, args: contexts.append(args))
    x, context = torch.randn(2, T, 32), torch.randn(2, 7, 32)
    decoder(x, tokens(2, T), source=context, source_mask=torch.zeros(1, 1, 1, 7))
    ((q, shared, _),) = contexts
    flipped = shared._replace(kept=shared.kept | {"source": context.flip(1)})
    torch.testing.assert_close(cross(q, shared), cross(q, flipped))


def test_qk_norm_makes_cross_attention_independent_of_the_scale_of_queries_and_keys():
    model = random_model(n_layer=1, qk_norm=True)
    source, idx = tokens(2, 6), tokens(2, 5, seed=1)
    before, _ = model(idx, source=source)
    for linear in ("k_proj", "q_proj"):
        getattr(model.decoder.blocks[0].cross_attn, linear).weight.data.mul_(10)
        torch.testing.assert_close(model(idx, source=source)[0], before)


def test_initialization_counts_the_residual_branches_of_each_stack_separately():
    model = tiny(n_layer=3, n_embd=96)
    for stack, branches in ((model.encoder, 6), (model.decoder, 9)):
        last = [parameter for name, parameter in stack.named_parameters() if "o_proj" in name or "down_proj" in name]
        stds = [parameter.std().item() for parameter in last]
        assert stds == pytest.approx([0.02 / branches**0.5] * branches, rel=0.05)


# --------------------------------------------------------------------------------------
# The loss


def test_label_smoothing_mixes_in_the_mean_over_the_vocabulary_in_training_only():
    model = tiny(label_smoothing=0.2)
    source, idx, targets = tokens(2, 6), tokens(2, 5, seed=1), tokens(2, 5, seed=2)
    targets[0, 3:] = -1
    logits, smoothed = model(idx, targets, source=source)
    logp = logits.log_softmax(dim=-1)[targets >= 0]
    plain = -logp.gather(1, targets[targets >= 0][:, None]).mean()
    torch.testing.assert_close(smoothed, 0.8 * plain + 0.2 * -logp.mean())
    torch.testing.assert_close(model.eval()(idx, targets, source=source)[1], plain)


def test_parameters_are_as_many_as_those_of_the_papers_base_model():
    sizes = {"n_layer": 6, "n_head": 8, "n_embd": 512, "vocab_size": 37000}
    kind = {"bias": True, "position": "sinusoidal", "block": "post_norm"}
    with torch.device("meta"):
        base = tiny(**sizes, **kind)
    # a layer of the decoder has one attention and one norm more than one of the encoder; all share one embedding
    attention, feed_forward, norm = 4 * (512**2 + 512), 2 * 512 * 2048 + 2048 + 512, 2 * 512
    layers = 6 * (3 * attention + 2 * feed_forward + 5 * norm)
    assert models.count_parameters(base) == layers + 37000 * 512


def test_terms_of_the_layers_of_both_stacks_are_summed(monkeypatch):
    class WithTerm(models.MLP):
        def forward(self, x, shared):
            models.add_loss(shared, "own", torch.tensor(1.0))
            return super().forward(x)

    monkeypatch.setitem(models.MLPS, "plain", WithTerm)
    model, idx = random_model(n_layer=3), tokens(2, 5)
    *_, terms = model(idx, idx, source=tokens(2, 4))
    assert terms == {"own": 6.0}
    assert len(model(idx, source=tokens(2, 4))) == 2
