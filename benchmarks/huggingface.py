"""Hugging Face's transformers."""

from collections.abc import Iterator

import torch
from humptygpt.model import ModelConfig
from torch import Tensor, nn

from benchmarks.contenders import Generator
from benchmarks.settings import BenchConfig


def random_gpt2(config: ModelConfig) -> nn.Module:
    """Build Hugging Face's GPT-2 with the shape of the config, always with the same weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
    # token 0 ends a text, because a small vocabulary lacks the usual id
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_positions=config.block_size, **shape, **ends)).eval()


class HuggingFaceGenerator(Generator):
    """GPT-2 with a KV cache, in a loop that is faster than generate()."""

    packages = ("torch", "transformers")

    def load(self, model_config: ModelConfig, config: BenchConfig) -> None:
        self.model = random_gpt2(model_config)

    @torch.inference_mode()
    def steps(self, n: int) -> Iterator[Tensor]:
        from transformers import DynamicCache

        idx = self.idx
        cache = DynamicCache()
        for _ in range(n):
            logits = self.model(idx, cache, logits_to_keep=1).logits  # (B, 1, V)
            idx = logits.argmax(dim=-1)
            yield idx
