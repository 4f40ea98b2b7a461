"""llama.cpp, through the package xllamacpp."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from gguf import TokenType
from humptygpt.model import GPT, ModelConfig

from benchmarks.contenders import Generator
from benchmarks.settings import BenchConfig
from humptygpt.formats.gguf import write_gguf

DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "int8": "q8_0"}  # GGUF's names


def write_random_gguf(path: Path, config: ModelConfig, dtype: str) -> None:
    """Write a random GPT-2 for llama.cpp. dtype: a name in export.DTYPES."""
    torch.manual_seed(0)
    words = [f"t{i}" for i in range(config.vocab_size)]
    vocabulary = {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "gpt-2",
        "token_list": words,
        "token_types": [TokenType.NORMAL] * len(words),
        "token_merges": ["t 0"],  # llama.cpp insists on one merge
        "eos_token_id": 0,
        "bos_token_id": 0,
        "add_bos_token": False,
        "add_space_prefix": False,
    }
    shape = replace(config, activation="gelu_tanh")  # llama.cpp's only one for GPT-2
    write_gguf(path, "random", GPT(shape), vocabulary, dtype)


class LlamaCppGenerator(Generator):
    """llama.cpp's server inside this process, which reports its times itself: of later tokens only their total."""

    dtypes = tuple(DTYPES)
    packages = ("xllamacpp", "gguf")
    max_texts = 1

    def load(self, model_config: ModelConfig, config: BenchConfig) -> None:
        import xllamacpp

        self.folder = TemporaryDirectory()  # kept, because the server maps the file
        path = Path(self.folder.name) / "model.gguf"
        write_random_gguf(path, model_config, DTYPES[config.weights])
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = config.prompt + config.new_tokens
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = torch.get_num_threads()
        params.cpuparams_batch.n_threads = torch.get_num_threads()
        params.verbosity = -1
        params.cache_ram_mib = 0  # no cache of earlier requests
        self.server = xllamacpp.Server(params)

    def measure(self, n: int) -> list[float]:
        request = {
            "prompt": self.idx[0].tolist(),
            "max_tokens": n,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        timings = self.server.handle_completions(request)["timings"]
        return [timings["prompt_ms"] / 1000, timings["predicted_ms"] / 1000 / (n - 1)]
