"""A fake GPU: a backend whose tensors have shapes, dtypes and a device, but no numbers.

A training step, an evaluation, generation and beam search run on it completely. It shows what a CPU cannot: an
operation on two devices (an error), the moments at which the CPU waits for the device (counted), and the dtype of the
residual stream under autocast with CUDA's rules for matrix products. It cannot show numbers, kernels, pinned memory or
speed. FakeGPU and its two modes use private parts of torch; if a version of torch lacks them, the tests are skipped
with the reason.

The tests run in a separate process, because a backend cannot be unregistered and its autograd threads do not survive a
fork.
"""

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
from humptygpt.model import ACTIVATIONS, BLOCKS, MLPS, NORMS, POSITIONS, Block
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import set_checkpoint_early_stop

import sample
import train
from humptygpt import model as models
from humptygpt.formats.load import Loaded
from humptygpt.generation import generator as decoding
from humptygpt.generation.sampling import Context, continue_texts
from humptygpt.generation.translation import beam_search
from humptygpt.models import attention, lora
from humptygpt.models.build import MODELS, build, make_model_config
from humptygpt.tokenizers.basic import ByteTokenizer
from humptygpt.training import evaluation
from humptygpt.training.evaluation import find_task
from humptygpt.training.optimizers import OPTIMIZERS, make_optimizer
from humptygpt.training.ranks import Ranks
from humptygpt.training.run import Progress
from humptygpt.training.settings import TrainConfig

# --------------------------------------------------------------------------------------
# The device


class Waits(TorchFunctionMode):
    """Count the calls that make the CPU wait for the device, and answer them."""

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
        device = kwargs.get("device") or "cpu"
        if func is torch.tensor and torch.device(device).type == "fgpu":
            return torch.tensor(*args, **kwargs | {"device": "cpu"}).to(device)
        return func(*args, **kwargs)


def numbers(shape: torch.Size) -> list | int:
    return [numbers(shape[1:]) for _ in range(shape[0])] if shape else 1


class Reads(TorchDispatchMode):
    """Count the waits inside torch: copies to the CPU, and operations that read numbers."""

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
            way = x.device.type, device.type
            self.waits.count += way == ("fgpu", "cpu")
            if way == ("cpu", "fgpu"):
                return torch.empty(x.shape, dtype=dtype, device=device)
        return func(*args, **kwargs)


PRODUCTS = "linear matmul mm addmm bmm baddbmm scaled_dot_product_attention"


def autocast_as_cuda() -> list[torch.library.Library]:
    """Make autocast convert the arguments of matrix products only. The libraries returned must stay alive."""
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

    for name in PRODUCTS.split():
        function = getattr(torch.ops.aten, name).default
        products.impl(f"aten::{name}", partial(product, function), key)
    return [products, others]


class FakeGPU:
    """The device and its counter of waits."""

    def __init__(self):
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

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
        # an early stop is an exception, and the device guard of a Python backend does not survive one
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
        """Replace the methods that fake tensors do not have: Module.to and Tensor.tolist."""
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
    """Assert that the outputs of all blocks are float32."""

    def check(module, inputs, x):
        if isinstance(module, Block) and module.residual:
            assert x.dtype == torch.float32, f"the residual stream is {x.dtype}"

    hook = nn.modules.module.register_module_forward_hook(check)
    with pytest.MonkeyPatch.context() as patch:
        # the originals read numbers
        patch.setattr(decoding, "agrees", lambda *args, **keys: True)
        patch.setattr(attention, "agrees", lambda *_: True)
        yield
    hook.remove()


# --------------------------------------------------------------------------------------
# The cases

SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 16, "block_size": 8, "vocab_size": 11}
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
    # keys of the training and of the texts
    "optimizer": tuple(OPTIMIZERS),
    "dtype": ("bfloat16", "float16", "float32"),
    "checkpoint_activations": (False, True),
    "padded": (False, True),
}
OF_THE_CASE = ("optimizer", "dtype", "checkpoint_activations", "padded", "lora_rank")


def allowed(case: dict) -> dict:
    """Replace the choices that do not go with the others."""
    if case["model"].endswith("_mlp"):
        case |= {"window": 3, "lora_rank": 0}
    if case["model"] == "number_mlp":
        case |= {"n_embd": 1}
    if case["block"] == "plain":
        case |= {"init": "gpt2"}
    if case["lora_rank"]:  # AdamW trains its small matrices
        case |= {"optimizer": "adamw"}
    return case


def draw_cases(count: int) -> list[dict]:
    """Draw cases in which all choices of a key occur equally often."""
    draw = random.Random(0)
    columns = []
    for choices in OPTIONS.values():
        column = [choices[number % len(choices)] for number in range(count)]
        columns.append(draw.sample(column, count))
    return [allowed(dict(zip(OPTIONS, row, strict=True))) for row in zip(*columns, strict=True)]


# --------------------------------------------------------------------------------------
# Functions for the process with the device


def run_case(case: dict) -> None:
    with FakeGPU() as gpu, watched_residual_stream():
        keys = {key: value for key, value in case.items() if key not in OF_THE_CASE}
        model = gpu.build(keys, case["lora_rank"])
        dtype = getattr(torch, case["dtype"])
        train_and_evaluate(gpu, model, case, dtype)
        assert {x.device for x in lora.merged_state(model).values()} == {gpu.device}
        ready = load_to_sample(gpu, gpu.build(keys), dtype)
        check_weights(ready, dtype)
        if not hasattr(model, "encode"):
            generate_texts(gpu, ready, case["padded"], dtype)
        if model.has_cache:
            translate(gpu, ready)


def load_to_sample(gpu: FakeGPU, model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Load a model onto the device as sample.py does."""
    loaded = Loaded(model, ByteTokenizer(), Path(), "a model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "pick_device", lambda name: gpu.device)
        patch.setattr(decoding, "pick_dtype", lambda name, device: dtype)
        patch.setattr(decoding, "load", lambda *args, **keys: loaded)
        return sample.load("a model").model


def train_and_evaluate(gpu: FakeGPU, model: nn.Module, case: dict, dtype: torch.dtype) -> None:
    """Take steps of two micro-batches, with clipping. The batches come from the CPU."""
    names = ("idx", "targets") + ("source",) * hasattr(model, "encode")
    batch = dict.fromkeys(names, torch.zeros(2, 5, dtype=torch.int64))
    for module in model.modules():
        if isinstance(module, models.Stack):
            module.checkpoint_activations = case["checkpoint_activations"]
    config = TrainConfig(optimizer=case["optimizer"], batch_size=2, gradient_accumulation_steps=2)
    dataset = SimpleNamespace(
        batch=lambda index, size: batch,
        val_batches=lambda size, iters: iter([batch]),
    )
    run = SimpleNamespace(
        config=config,
        model=model,
        net=model,
        task=find_task("translation" if hasattr(model, "encode") else "language modelling"),
        dataset=dataset,
        batches=dataset,
        scaler=torch.amp.GradScaler("fgpu", enabled=dtype == torch.float16),
        device=gpu.device,
        dtype=dtype,
        optimizer=make_optimizer(config, model),
        ranks=Ranks(gpu.device),
        progress=Progress(),
    )
    for _ in range(2):
        # the scaler waits once, to know whether the gradients are finite
        with gpu.waiting(int(dtype == torch.float16), "a training step"):
            losses, grad_norm, _ = train.train_step(run)
            model.zero_grad()
            run.progress.iter += 1
    assert losses["train_loss"].device == grad_norm.device == gpu.device
    with gpu.waiting(1, "an evaluation"):
        evaluation.validation_loss(run, model, None)


def check_weights(ready: nn.Module, dtype: torch.dtype) -> None:
    """Assert that the weights that generation multiplies by have the dtype."""
    for module in ready.modules():
        if isinstance(module, decoding.ProductLinear):
            assert module.product.keywords["weight"].dtype == dtype
        assert dtype == torch.float32 or not isinstance(module, nn.Linear), module


def generate_texts(gpu: FakeGPU, model: nn.Module, padded: bool, dtype: torch.dtype) -> None:
    """Generate past block_size. Each token waits once, to be shown. What is cached has the dtype."""
    texts = [[0] * 5, [0] * (3 if padded else 5)]
    context = Context(model, texts, 12, device=gpu.device)
    options = {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2}
    steps = continue_texts(context, [0, 1], 11, max_new_tokens=7, **options)
    for _ in range(7):
        with gpu.waiting(1, "a token"):
            _, logits = next(steps)
        assert logits.dtype == torch.float32
    if model.has_cache:
        assert {x.dtype for x in context.cache.layers[0].buffers.values()} == {dtype}


def translate(gpu: FakeGPU, model: nn.Module) -> None:
    source = torch.zeros(2, 4, dtype=torch.int64, device=gpu.device)
    with gpu.waiting(3 * 6, "three steps of a beam search"):
        tokenizer = SimpleNamespace(eot=1, vocab_size=None)
        beam_search(model, tokenizer, source, num_beams=3, max_new_tokens=3)


def run_cases(cases: list[dict]) -> str | None:
    """Run cases until one fails, and return its report."""
    for case in cases:
        try:
            run_case(case)
        except Exception:
            return f"{case}\n{traceback.format_exc(limit=-5)}"
    return None


def why_missing() -> str | None:
    """Say why this version of torch cannot have a fake GPU; None: it can."""
    try:
        with FakeGPU() as gpu:
            torch.zeros(1, device=gpu.device)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


PLAIN = {key: values[0] for key, values in OPTIONS.items()}
PLAIN |= {"model": "gpt", "position": "rotary", "norm": "rmsnorm"}


FAULTS = {
    "two (different )?devices,? fgpu:0,? (and )?cpu": lambda x: x + torch.zeros(x.shape[-1]),
    "a training step: 4 waits for the device": lambda x: x * x.sum().item(),
    "the residual stream is torch.bfloat16": Tensor.bfloat16,
}


def run_planted(report: str) -> str | None:
    """Run a case with the fault that leads to this report in its blocks."""
    forward = models.Block.forward

    def planted(self, *args):
        return FAULTS[report](forward(self, *args))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.Block, "forward", planted)
        return run_cases([PLAIN])


# --------------------------------------------------------------------------------------
# Tests


@pytest.fixture(scope="module")
def elsewhere():
    """Call a function of this module in the process that has the device."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        if reason := pool.submit(why_missing).result():
            pytest.skip(f"this torch has no device in Python: {reason}")
        yield lambda function, *args: pool.submit(function, *args).result()


@pytest.mark.parametrize("count", [4, pytest.param(150, marks=pytest.mark.long)])
def test_any_choices_train_evaluate_and_generate_on_one_device_and_wait_only_to_show(elsewhere, count):
    """The residual stream is also float32. run_case() says how often the CPU may wait."""
    assert elsewhere(run_cases, draw_cases(count)) is None


@pytest.mark.parametrize("report", FAULTS)
def test_a_planted_fault_is_found(elsewhere, report):
    assert re.search(report, elsewhere(run_planted, report))
