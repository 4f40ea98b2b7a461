"""A GPU that is not there: tensors with shapes, dtypes and a device, but no numbers, on a backend of our own.

On it all of a training step, an evaluation, generation and beam search run, and it shows what no CPU does: two devices
that meet in one operation (an error), the moments at which the CPU waits for the device (counted), and the dtype of the
residual stream, here under an autocast with CUDA's rules for matrix products. It cannot show numbers, kernels, pinned
memory or speed. All that is private to torch stands in FakeGPU and its two modes; where torch no longer has it, these
tests are skipped with the reason.

It runs in a process of its own: a backend is registered for good, and its autograd threads outlive no fork.
"""

import itertools
import multiprocessing
import random
import re
import traceback
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import GPT2
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import set_checkpoint_early_stop

import model as models
import sample
import train
from humptygpt import decoding, evaluation
from humptygpt.finetune import lora
from humptygpt.loading import Loaded
from humptygpt.optimizers import OPTIMIZERS, make_optimizer
from humptygpt.process import Process
from humptygpt.sampling import Context, continue_texts
from humptygpt.tasks import MODELS, build, find_task, make_model_config
from humptygpt.tokenizers import ByteTokenizer
from humptygpt.translation.beams import beam_search
from model import ACTIVATIONS, BLOCKS, MLPS, NORMS, POSITIONS, Block
from train import TrainConfig

# --------------------------------------------------------------------------------------
# The device


class Waits(TorchFunctionMode):
    """Count what makes the CPU wait for the device, and answer it."""

    READS = ("item", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        x = args[0] if args and isinstance(args[0], Tensor) else None
        if x is not None and name in self.READS:
            self.count += x.device.type == "fgpu"
            return {"item": 1.0, "__float__": 1.0, "__bool__": True}.get(name, 1)
        if (
            func is torch.tensor
            and torch.device(kwargs.get("device") or "cpu").type == "fgpu"
        ):
            return torch.tensor(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        return func(*args, **kwargs)


def numbers(shape: torch.Size) -> list | int:
    return [numbers(shape[1:]) for _ in range(shape[0])] if shape else 1


class Reads(TorchDispatchMode):
    """Count what waits within torch: copies to the CPU, and what depends on the numbers."""

    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default:
            self.waits.count += args[0].device.type == "fgpu"
            return 1
        if func._schema.name in ("aten::_to_copy", "aten::to"):
            x = args[0]
            given = [*args[1:], *kwargs.values()]
            device = next((y for y in given if isinstance(y, torch.device)), x.device)
            dtype = next((y for y in given if isinstance(y, torch.dtype)), x.dtype)
            if (x.device.type, device.type) == ("fgpu", "cpu"):
                self.waits.count += 1
            if (x.device.type, device.type) == ("cpu", "fgpu"):
                return torch.empty(x.shape, dtype=dtype, device=device)
        return func(*args, **kwargs)


PRODUCTS = [
    "linear",
    "matmul",
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "scaled_dot_product_attention",
]


def autocast_as_cuda() -> list[torch.library.Library]:
    """Let autocast convert the arguments of matrix products, and of nothing else; keep what it returns."""
    key = "AutocastPrivateUse1"
    products = torch.library.Library("aten", "IMPL")
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, key)
    below = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def low(x):
        if isinstance(x, Tensor) and x.is_floating_point():
            return x.to(torch.get_autocast_dtype("fgpu"))
        return x

    def product(function, *args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(below):
            kwargs = {name: low(x) for name, x in kwargs.items()}
            return function(*map(low, args), **kwargs)

    for name in PRODUCTS:
        function = getattr(torch.ops.aten, name).default
        products.impl(f"aten::{name}", partial(product, function), key)
    return [products, others]


class FakeGPU:
    """The device and what it has counted."""

    def __init__(self):
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.utils.backend_registration import (
            _setup_privateuseone_for_python_backend,
        )

        if not hasattr(torch, "fgpu"):
            _setup_privateuseone_for_python_backend("fgpu")
            torch.fgpu.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
            torch.fgpu.manual_seed_all = lambda seed: None
            torch.fgpu._is_in_bad_fork = lambda: False
            FakeGPU.libraries = autocast_as_cuda()
        self.device = torch.device("fgpu:0")
        self.waits = Waits()
        self.modes = ExitStack()
        self.tensors = FakeTensorMode()

    def __enter__(self):
        self.modes.enter_context(self.tensors)
        self.modes.enter_context(Reads(self.waits))
        self.modes.enter_context(self.waits)
        self.modes.enter_context(self.methods())
        # by an exception, which the device guard of a Python backend does not survive
        self.modes.enter_context(set_checkpoint_early_stop(False))
        return self

    def __exit__(self, *error):
        self.modes.close()

    def build(self, settings: dict, lora_rank: int = 0) -> nn.Module:
        training = {"lora_rank": lora_rank, "lora_alpha": 16.0, "lora_targets": "q_proj"}
        with self.device:
            return build(make_model_config(SHAPE | settings), training)

    @contextmanager
    def methods(self):
        """What fake tensors refuse, or do by other means: swapping those of a module, and reading a list."""
        from torch._subclasses.fake_tensor import FakeTensor

        def to(module, device):
            for x in (*module.parameters(), *module.buffers()):
                assert x.device == device, f"a tensor of {type(module)} is on {x.device}"
            return module

        def tolist(x):
            self.waits.count += x.device.type == "fgpu"
            return numbers(x.shape)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.Module, "to", to)
            patch.setattr(FakeTensor, "tolist", tolist)
            yield

    @contextmanager
    def waiting(self, most: int, what: str):
        before = self.waits.count
        yield
        count = self.waits.count - before
        assert count <= most, f"{what}: {count} waits for the device"


@contextmanager
def watched_residual_stream():
    """Within it, what leaves a block, or one that decodes single tokens, has to be float32."""

    def check(module, inputs, x):
        if isinstance(module, Block) and module.residual:
            assert x.dtype == torch.float32, f"the residual stream is {x.dtype}"

    hook = nn.modules.module.register_module_forward_hook(check)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "agrees", lambda *args: True)  # it reads numbers
        yield
    hook.remove()


# --------------------------------------------------------------------------------------
# What is tried

SHAPE = GPT2 | {"n_layer": 2, "n_head": 4, "n_embd": 16, "block_size": 8, "vocab_size": 11}
OPTIONS = {
    "model": tuple(MODELS),
    "position": tuple(POSITIONS),
    "block": tuple(BLOCKS),
    "norm": tuple(NORMS),
    "mlp": tuple(MLPS),
    "activation": tuple(ACTIVATIONS),
    "n_kv_head": (None, 2, 1),
    "window": (0, 3),
    "dropout": (0.0, 0.2),
    "label_smoothing": (0.0, 0.1),
    "logit_soft_cap": (0.0, 15.0),
    "rope_factor": (1.0, 8.0),
    "init": ("gpt2", "zero"),
    "mlp_conv": (0, 2),
    "lora_rank": (0, 2),
    **dict.fromkeys(("bias", "tie_weights", "qk_norm", "embed_norm"), (False, True)),
    # of the training and of the texts
    "optimizer": tuple(OPTIMIZERS),
    "dtype": ("bfloat16", "float16", "float32"),
    "checkpoint_activations": (False, True),
    "padded": (False, True),
}
OF_THE_CASE = ("optimizer", "dtype", "checkpoint_activations", "padded", "lora_rank")


def allowed(case: dict) -> dict:
    """Return the case with what its other choices force."""
    case = dict(case)
    if case["model"] in ("window_mlp", "number_mlp"):
        case["window"] = 3
        case["lora_rank"] = 0
    if case["model"] == "number_mlp":
        case["n_embd"] = 1
    if case["block"] == "plain":
        case["init"] = "gpt2"
    if case["block"] == "parallel" and case["mlp"] == "none":
        case["mlp"] = "plain"
    if case["model"].endswith("_mlp"):
        case["lora_rank"] = 0
    if case["lora_rank"]:  # it trains small matrices, by AdamW
        case["optimizer"] = "adamw"
    return case


def meeting(case: dict, together: int) -> set[tuple]:
    """Return each choice of a case, or each two of them."""
    return set(itertools.combinations([(key, case[key]) for key in OPTIONS], together))


def covering_cases(together: int) -> list[dict]:
    """Return cases in which any choice occurs, or any two meet, but for those that exclude each other."""
    draw = random.Random(0)

    def random_case(**fixed) -> dict:
        drawn = {key: draw.choice(values) for key, values in OPTIONS.items()}
        return allowed(drawn | fixed)

    left = set().union(*(meeting(random_case(), together) for _ in range(3000)))
    cases = []
    while left:
        fixed = dict(min(left, key=repr))
        candidates = [random_case(**fixed) for _ in range(60)]
        best = max(candidates, key=lambda case: len(meeting(case, together) & left))
        cases.append(best)
        left -= meeting(best, together)
    return cases


def all_cases() -> list[dict]:
    """Every position x block x norm, of a GPT thrice, with the other settings drawn at random."""
    draw = random.Random(0)
    cases = []
    for model in MODELS:
        axes = [POSITIONS, BLOCKS, NORMS]
        if model.endswith("_mlp"):
            axes = [ACTIVATIONS, [None], [None]]
        for a, b, c in [*itertools.product(*axes)] * (3 if model == "gpt" else 1):
            case = {key: draw.choice(values) for key, values in OPTIONS.items()}
            keys = ("position", "block", "norm")
            if model.endswith("_mlp"):
                keys = ("activation", "unused", "unused")
            case |= dict(zip(keys, (a, b, c), strict=True)) | {"model": model}
            case.pop("unused", None)
            cases.append(allowed(case))
    return cases


# --------------------------------------------------------------------------------------
# In the process with the device


def run_case(case: dict) -> None:
    with FakeGPU() as gpu, watched_residual_stream():
        keys = {key: value for key, value in case.items() if key not in OF_THE_CASE}
        model = gpu.build(keys, case["lora_rank"])
        dtype = getattr(torch, case["dtype"])
        train_and_evaluate(gpu, model, case, dtype)
        model = lora.merge(model)
        ready = decoding.make_generator(model, dtype, gpu.device)
        check_weights(ready, dtype)
        if not model.has_encoder:
            generate_texts(gpu, ready, case["padded"])
        if model.has_cache:
            translate(gpu, ready)


def train_and_evaluate(
    gpu: FakeGPU, model: nn.Module, case: dict, dtype: torch.dtype
) -> None:
    """Two micro-batches a step, clipped; the batches are on the CPU."""
    names = ("idx", "targets") + ("source",) * model.has_encoder
    batch = dict.fromkeys(names, torch.zeros(2, 5, dtype=torch.int64))
    for module in model.modules():
        if isinstance(module, models.Stack):
            module.checkpoint_activations = case["checkpoint_activations"]
    config = TrainConfig(
        optimizer=case["optimizer"], batch_size=2, gradient_accumulation_steps=2
    )
    dataset = SimpleNamespace(
        batch=lambda index, size: batch, val_batches=lambda size, iters: iter([batch])
    )
    run = SimpleNamespace(
        config=config,
        model=model,
        net=model,
        task=find_task("translation" if model.has_encoder else "language modelling"),
        dataset=dataset,
        batches=dataset,
        scaler=torch.amp.GradScaler("fgpu", enabled=dtype == torch.float16),
        device=gpu.device,
        dtype=dtype,
        optimizer=make_optimizer(config, model),
        process=Process(gpu.device),
    )
    for it in range(2):
        # a scaler has to know whether the gradients are finite
        with gpu.waiting(int(dtype == torch.float16), "a training step"):
            loss, grad_norm, _ = train.train_step(run, it)
    assert loss.device == grad_norm.device == gpu.device
    with gpu.waiting(1, "an evaluation"):
        evaluation.evaluate(run, model, None)


def check_weights(ready: nn.Module, dtype: torch.dtype) -> None:
    """What generation multiplies by has the dtype already."""
    for module in ready.modules():
        if isinstance(module, decoding.ProductLinear):
            assert module.product.keywords["weight"].dtype == dtype
        assert dtype == torch.float32 or not isinstance(module, nn.Linear), module


def generate_texts(gpu: FakeGPU, model: nn.Module, padded: bool) -> None:
    """Past block_size, until one text has ended; each token that is shown is one wait."""
    idx = torch.zeros(2, 5, dtype=torch.int64, device=gpu.device)
    context = Context(model, idx, 12)
    if padded:
        context.padding = [0, 2]
        context.restart(8)
    stopped = set()
    options = {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2}
    steps = continue_texts(context, 7, stopped=stopped, **options)
    for number in range(7):
        with gpu.waiting(1, "a token"):
            step = next(steps)
        assert step.logits.dtype == torch.float32
        if number == 4:
            stopped.add(0)
    assert step.rows == [1]


def translate(gpu: FakeGPU, model: nn.Module) -> None:
    source = torch.zeros(2, 4, dtype=torch.int64, device=gpu.device)
    with gpu.waiting(3 * 6, "three steps of a beam search"):
        beam_search(model, source, 1, num_beams=3, max_new_tokens=3)


def run_cases(cases: list[dict]) -> str | None:
    """Return what the first case that fails reports."""
    for case in cases:
        try:
            run_case(case)
        except Exception:
            return f"{case}\n{traceback.format_exc(limit=-5)}"
    return None


def why_missing() -> str | None:
    """Return what this torch lacks."""
    try:
        with FakeGPU() as gpu:
            torch.zeros(1, device=gpu.device)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


PLAIN = {key: values[0] for key, values in OPTIONS.items()}
PLAIN |= {"model": "gpt", "position": "rotary", "norm": "rmsnorm"}


def plant_a_tensor_on_the_cpu(x: Tensor) -> Tensor:
    return x + torch.zeros(x.shape[-1])


def plant_a_wait(x: Tensor) -> Tensor:
    return x * x.sum().item()


def plant_a_cast(x: Tensor) -> Tensor:
    return x.bfloat16()


def run_planted(fault) -> str | None:
    forward = models.PreNormBlock.forward

    def planted(self, *args):
        return fault(forward(self, *args))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.PreNormBlock, "forward", planted)
        return run_cases([PLAIN])


def load_to_sample(dtype: str) -> str | None:
    """What sample.load makes of a model for this device, as run_cases reports."""
    with FakeGPU() as gpu, watched_residual_stream(), pytest.MonkeyPatch.context() as patch:
        model = gpu.build({"position": "rotary"})
        loaded = Loaded(model, ByteTokenizer(), Path(), "a model")
        patch.setattr(sample, "pick_device", lambda name: gpu.device)
        patch.setattr(sample, "sample_dtype", lambda name, device: getattr(torch, name))
        patch.setattr(sample, "free_memory", lambda device: 10**9)
        patch.setattr(sample.interchange, "load", lambda *args, **keys: loaded)
        ready = sample.load("a model", dtype=dtype).model
        with gpu.waiting(0, "a token"):
            cache = ready.make_cache()
            idx = torch.zeros(1, 3, dtype=torch.int64, device=gpu.device)
            ready.next_logits(idx, cache)
            ready.next_logits(idx[:, :1], cache)
        check_weights(ready, getattr(torch, dtype))
        assert {x.dtype for x in (cache.layers[0].k, cache.layers[0].v)} == {
            getattr(torch, dtype)
        }


# --------------------------------------------------------------------------------------
# Tests


@pytest.fixture(scope="module")
def elsewhere():
    """Call a function of this module in the process that has the device."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        if reason := pool.submit(why_missing).result():
            pytest.skip(f"this torch has no device in Python: {reason}")
        yield lambda function, *args: pool.submit(function, *args).result()


@pytest.mark.parametrize("together", [1, pytest.param(2, marks=pytest.mark.long)])
def test_any_choices_train_evaluate_and_generate_on_one_device_and_wait_only_to_show(
    elsewhere, together
):
    """And the residual stream is float32; see run_case for how often the CPU may wait."""
    assert elsewhere(run_cases, covering_cases(together)) is None


@pytest.mark.long
@pytest.mark.parametrize("part", range(10))
def test_every_position_block_and_norm_does_so(elsewhere, part):
    cases = all_cases()
    assert len(cases) == 3 * 60 + 60 + 10
    assert elsewhere(run_cases, cases[part::10]) is None


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        (plant_a_tensor_on_the_cpu, "two (different )?devices,? fgpu:0,? (and )?cpu"),
        (plant_a_wait, "a training step: 4 waits for the device"),
        (plant_a_cast, "the residual stream is torch.bfloat16"),
    ],
)
def test_a_planted_fault_is_found(elsewhere, fault, report):
    assert re.search(report, elsewhere(run_planted, fault))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_converted_once_to_sample_and_decode_keeps_its_residual_stream(
    elsewhere, dtype
):
    elsewhere(load_to_sample, dtype)
