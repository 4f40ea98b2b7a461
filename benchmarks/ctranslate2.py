"""CTranslate2, with a GPT-2 converted from Hugging Face's."""

import time
from itertools import pairwise
from tempfile import TemporaryDirectory

import torch
from humptygpt.model import ModelConfig

from benchmarks.contenders import Generator
from benchmarks.huggingface import random_gpt2
from benchmarks.settings import BenchConfig


def write_gpt2(config: ModelConfig, folder: str) -> None:
    """Write random_gpt2() and a tokenizer with the words t0, t1, ... in the format that the converter reads."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({f"t{i}": i for i in range(config.vocab_size)}, unk_token="t0")
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "t0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **special).save_pretrained(folder)
    random_gpt2(config).save_pretrained(folder)


class CTranslate2Generator(Generator):
    dtypes = ("float32", "int8")
    packages = ("ctranslate2", "transformers")

    def load(self, model_config: ModelConfig, config: BenchConfig) -> None:
        import ctranslate2
        from ctranslate2.converters import TransformersConverter

        with TemporaryDirectory() as folder:
            write_gpt2(model_config, folder)
            converted = f"{folder}/converted"
            TransformersConverter(folder).convert(converted, quantization=config.weights)
            self.model = ctranslate2.Generator(
                converted,
                compute_type=config.weights,
                intra_threads=torch.get_num_threads(),
            )
        self.texts = [[f"t{i}" for i in text] for text in self.idx.tolist()]

    def measure(self, n: int) -> list[float]:
        ends = [time.perf_counter()]

        def record_time(result: object) -> bool:
            if result.batch_id == 0:
                ends.append(time.perf_counter())
            return False  # do not stop

        self.model.generate_batch(
            self.texts,
            callback=record_time,
            sampling_topk=1,
            min_length=n,
            max_length=n,
            include_prompt_in_result=False,
        )
        return [end - start for start, end in pairwise(ends)]
