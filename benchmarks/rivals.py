"""This program and others in generation: what `bench.py --what=sample` times, each in a process of its own.

All have random weights. The others are imported only where they are timed; see bench.py for how to install them.
"""

import importlib.util
import io
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import psutil
import torch
from torch import Tensor, nn

from humptygpt.checkpoint.checkpoint import restore_model
from humptygpt.generation.decoder import prepare_for_generation
from humptygpt.generation.sampling import generate
from model import ModelConfig

NANOGPT_KEYS = (
    "block_size",
    "n_layer",
    "n_head",
    "n_embd",
    "dropout",
    "bias",
)  # of its model, beside vocab_size
PATIENCE = 20  # seconds after which a contender need not generate the rest; without a KV cache that would be minutes


@dataclass(frozen=True)
class Case:
    """What each contender does: continue `batch` texts, each of `prompt` tokens, by new_tokens."""

    ours: ModelConfig
    gpt2: ModelConfig  # of all others
    dtype: str  # float32, bfloat16 or int8: of the weights
    batch: int
    prompt: int
    new_tokens: int
    nanogpt: str | None  # a checkout
    folder: Path  # for write_model() and load()


class Process:
    """A process without a model, whose memory is subtracted from that of the contenders."""

    def peak_memory(self) -> int:
        """The most resident bytes so far, or those of now where the system does not count them; mapped files count."""
        status = Path(
            "/proc/self/status"
        )  # getrusage() would start with the peak of the process that started this one
        if found := status.exists() and re.search(r"VmHWM:\s*(\d+) kB", status.read_text()):
            return 1024 * int(found[1])
        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss)

    def write(
        self, contender: type["Contender"], gpt2: ModelConfig, dtype: str, folder: Path
    ) -> None:
        """Make what this contender loads: in another process than its own, whose memory is measured."""
        contender.write_model(gpt2, dtype, folder)


class Contender(Process):
    """A program with a model, which continues the same texts each time it is asked."""

    dtypes: tuple[str, ...] = ("float32",)  # that it has
    max_batch = math.inf  # texts that it continues together
    packages: tuple[str, ...] = ("torch",)  # that it needs
    past_context = False  # can it continue a text that is longer than its context?

    def __init__(self, case: Case):
        torch.manual_seed(0)
        self.idx = torch.randint(case.gpt2.vocab_size, (case.batch, case.prompt))
        self.load(case)
        self.measure(2)  # what happens only once is not timed

    @classmethod
    def write_model(cls, gpt2: ModelConfig, dtype: str, folder: Path) -> None:
        """Make what it loads, if it loads anything."""

    def load(self, case: Case) -> None:
        raise NotImplementedError

    def steps(self, n: int) -> Iterator[object]:
        """Generate n tokens of each text, one at a time."""
        raise NotImplementedError

    def measure(self, n: int) -> list[float]:
        """Generate n >= 2 tokens of each text. Returns the seconds of each step, the first with the prompt.

        It ends before, but not before the second, once it has taken more than PATIENCE seconds.
        """
        ends = [time.perf_counter()]
        for _ in self.steps(n):
            ends.append(time.perf_counter())
            if len(ends) > 2 and ends[-1] - ends[0] > PATIENCE:
                break
        return [end - start for start, end in pairwise(ends)]

    def version(self) -> str:
        return ", ".join(f"{package} {version(package)}" for package in self.packages)


# in another process than the one whose memory is measured
WRITE_OURS = f"""import json, sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import model, torch
torch.manual_seed(0)
torch.save(model.build(model.ModelConfig(**json.loads(sys.argv[2]))).state_dict(), sys.argv[1])
"""


class Ours(Contender):
    past_context = True
    dtypes = ("float32", "bfloat16", "int8")

    def load(self, case: Case) -> None:
        """As sample.py does, from a mapped file where it maps one."""
        path, mapped = case.folder / "ours.pt", sys.platform == "linux"
        if not path.exists():
            subprocess.run(
                [sys.executable, "-c", WRITE_OURS, str(path), json.dumps(asdict(case.ours))],
                check=True,
            )
        dtype = torch.bfloat16 if case.dtype == "bfloat16" else torch.float32
        weights = torch.load(path, weights_only=True, mmap=mapped)
        model = restore_model(weights, case.ours)
        self.model = prepare_for_generation(model, dtype, case.dtype == "int8", mapped)

    def steps(self, n: int) -> Iterator[Tensor]:
        return generate(self.model, self.idx, n, temperature=0.0)


class NanoGPT(Contender):
    """Its GPT.generate, one token a call, which is the same work: it keeps nothing from one token to the next."""

    past_context = True

    def load(self, case: Case) -> None:
        module = load_nanogpt(Path(case.nanogpt))
        shape = {key: getattr(case.gpt2, key) for key in (*NANOGPT_KEYS, "vocab_size")}
        with redirect_stdout(io.StringIO()):  # it prints how many parameters it has
            self.model = module.GPT(module.GPTConfig(**shape)).eval()

    def steps(self, n: int) -> Iterator[Tensor]:
        idx = self.idx
        for _ in range(n):
            idx = self.model.generate(idx, 1)
            yield idx


class Transformers(Contender):
    """Hugging Face's model and KV cache in a loop that is faster than its generate()."""

    packages = ("torch", "transformers")

    def load(self, case: Case) -> None:
        self.model = random_gpt2(case.gpt2)

    @torch.inference_mode()
    def steps(self, n: int) -> Iterator[Tensor]:
        from transformers import DynamicCache

        idx, cache = self.idx, DynamicCache()
        for _ in range(n):
            logits = self.model(idx, cache, use_cache=True, logits_to_keep=1).logits  # (B, 1, V)
            idx = logits.argmax(dim=-1)
            yield idx


class CTranslate2(Contender):
    dtypes = ("float32", "int8")
    packages = ("ctranslate2", "transformers")

    @classmethod
    def write_model(cls, gpt2: ModelConfig, dtype: str, folder: Path) -> None:
        import transformers
        from ctranslate2.converters import TransformersConverter
        from tokenizers import Tokenizer, models

        transformers.utils.logging.disable_progress_bar()
        random_gpt2(gpt2).save_pretrained(folder / "hugging_face")
        words = models.WordLevel(
            {text: i for i, text in enumerate(vocabulary(gpt2))}, unk_token="t0"
        )
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "t0")
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(words), **special
        )
        tokenizer.save_pretrained(folder / "hugging_face")
        TransformersConverter(str(folder / "hugging_face")).convert(
            str(folder / "ctranslate2"), quantization=dtype
        )

    def load(self, case: Case) -> None:
        import ctranslate2

        threads = {"inter_threads": 1, "intra_threads": torch.get_num_threads()}
        self.model = ctranslate2.Generator(
            str(case.folder / "ctranslate2"), compute_type=case.dtype, **threads
        )
        self.texts = [[f"t{i}" for i in text] for text in self.idx.tolist()]

    def measure(self, n: int) -> list[float]:
        ends = [time.perf_counter()]

        def has_token(result: object) -> bool:
            if result.batch_id == 0:
                ends.append(time.perf_counter())
            return False  # do not stop

        keys = {
            "sampling_topk": 1,
            "min_length": n,
            "max_length": n,
            "include_prompt_in_result": False,
        }
        self.model.generate_batch(self.texts, callback=has_token, **keys)
        return [end - start for start, end in pairwise(ends)]


class LlamaCpp(Contender):
    """Its server, called in its own process: it reports the seconds, of the tokens after the first their mean."""

    dtypes = ("float32", "bfloat16", "int8")
    max_batch = 1
    packages = ("xllamacpp", "gguf", "transformers")

    @classmethod
    def write_model(cls, gpt2: ModelConfig, dtype: str, folder: Path) -> None:
        write_random_gguf(
            folder / "model.gguf",
            gpt2,
            {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}[dtype],
        )

    def load(self, case: Case) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(case.folder / "model.gguf")
        params.n_ctx, params.n_parallel, params.n_gpu_layers = case.prompt + case.new_tokens, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        params.verbosity, params.cache_ram_mib = -1, 0  # MiB of earlier requests
        self.server, self.instructions = xllamacpp.Server(params), xllamacpp.get_system_info()

    def measure(self, n: int) -> list[float]:
        request = {
            "prompt": self.idx[0].tolist(),
            "max_tokens": n,
            "temperature": 0.0,
            "ignore_eos": True,
        }
        timings = self.server.handle_completions(request | {"cache_prompt": False})["timings"]
        assert (timings["prompt_n"], timings["predicted_n"]) == (self.idx.shape[1], n), timings
        return [timings["prompt_ms"] / 1000, timings["predicted_ms"] / 1000 / (n - 1)]

    def version(self) -> str:
        return f"{super().version()}; {self.instructions.strip(' |')}"


CONTENDERS = {"ours": Ours, "nanogpt": NanoGPT, "transformers": Transformers}
CONTENDERS |= {"ctranslate2": CTranslate2, "llama_cpp": LlamaCpp}


def find_contenders(nanogpt: str | None) -> tuple[dict[str, type[Contender]], dict[str, str]]:
    """Those that can be timed, and for each of the others how it could be; nanogpt: a checkout."""
    there, missing = {}, {}
    for name, cls in CONTENDERS.items():
        lacking = [package for package in cls.packages if importlib.util.find_spec(package) is None]
        if lacking:
            missing[name] = f"pip install {' '.join(lacking)}"
        elif cls is NanoGPT and nanogpt is None:
            missing[name] = "--nanogpt=FOLDER"
        else:
            there[name] = cls
    return there, missing


# --------------------------------------------------------------------------------------
# What the others read


def load_nanogpt(checkout: Path) -> ModuleType:
    """Its model.py."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(
        spec
    )  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def random_gpt2(config: ModelConfig) -> nn.Module:
    """Hugging Face's GPT-2, always with the same weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    keys = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
    # token 0 ends a text: the usual id is not in a small vocabulary
    keys |= {"n_positions": config.block_size, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**keys)).eval()


def vocabulary(config: ModelConfig) -> list[str]:
    """A text for each token; no token is shown, so any will do."""
    return [f"t{i}" for i in range(config.vocab_size)]


def write_random_gguf(path: Path, config: ModelConfig, kind: str) -> None:
    """random_gpt2() for llama.cpp; kind: F32, BF16 or Q8_0.

    The output head is that of the embedding, as llama.cpp has it where a file has none.
    """
    from humptygpt.interchange.gguf import Vocabulary, write_gguf

    model = random_gpt2(config)
    weights = {
        name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }
    tokens = Vocabulary(
        "gpt2", vocabulary(config), eot=model.config.eos_token_id, merges=["t 0"]
    )  # it insists on one
    content = model.config.to_dict() | {"architectures": ["GPT2LMHeadModel"]}
    write_gguf(path, content, weights, tokens, kind=kind, about={})
