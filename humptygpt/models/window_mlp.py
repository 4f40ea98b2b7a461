"""The first networks of the article linked in README.md: feed-forward, without attention, over a window of tokens."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from humptygpt.model import ACTIVATIONS, GPT, ModelConfig, check_values


@dataclass(frozen=True)
class WindowConfig(ModelConfig):
    """A GPT's settings, of which the network uses n_layer, n_hidden, n_embd, window, activation, bias and dropout."""

    def validate(self) -> None:
        """Raise ValueError for the first invalid value or combination."""
        check_values(self)
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1: model={self.model} reads that many tokens")
        if self.model == "number_mlp" and self.n_embd != 1:
            raise ValueError(
                f"n_embd={self.n_embd} must be 1: model=number_mlp represents each token by a single number"
            )


class NumberEmbedding(nn.Module):
    """Represent each token by a fixed number: the first by 1 / V, the second by 2 / V, and so on; the last by 1.

    No token is represented by 0, because 0 stands for positions before the text.
    """

    def __init__(self, vocab_size: int, n_embd: int):
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, idx: Tensor) -> Tensor:
        """idx: (B, T). Returns (B, T, 1)."""
        return ((idx + 1) / self.vocab_size)[..., None]


class WindowMLP(nn.Module):
    """A feed-forward network that reads the last `window` tokens side by side and predicts the next one.

    It predicts at every position of a text. If the window extends beyond the start of the text, it is filled with
    zeros, both in training and in generation, so block_size should be several times the window. There are n_layer
    hidden layers of n_hidden neurons; the default for n_hidden is the number of inputs.
    Source: Bengio et al. 2003, "A neural probabilistic language model".
    """

    config_class = WindowConfig
    embedding = nn.Embedding
    has_cache = False  # it would save little: neighbouring windows share only embeddings

    def __init__(self, config: ModelConfig):
        super().__init__()
        WindowConfig.validate(config)
        self.config = config
        inputs = config.window * config.n_embd
        n_hidden = config.n_hidden or inputs
        self.wte = self.embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(
            nn.Linear(n_hidden if i else inputs, n_hidden, config.bias) for i in range(config.n_layer)
        )
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.dropout)
        self.lm_head = nn.Linear(n_hidden, config.vocab_size, bias=config.bias)
        for layer in self.layers:
            # this standard deviation preserves the variance of activations
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        # so that all tokens are equally likely
        nn.init.zeros_(self.lm_head.weight)
        if config.bias:
            for layer in (*self.layers, self.lm_head):
                nn.init.zeros_(layer.bias)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """idx: (B, T) token ids. targets: (B, T); targets of -1 are ignored.

        Returns logits (B, T, V) and the mean cross-entropy in nats, or None without targets.
        """
        window = self.config.window
        x = F.pad(self.wte(idx), (0, 0, window - 1, 0))  # (B, window - 1 + T, C)
        x = x.unfold(1, window, 1).mT.flatten(2)  # (B, T, window C), the oldest token first
        for layer in self.layers:
            x = self.dropout(self.activation(layer(x)))
        logits = self.head(x)
        return logits, None if targets is None else self.loss(logits, targets)

    head = GPT.head
    loss = GPT.loss

    def next_logits(self, idx: Tensor, cache: None = None) -> Tensor:
        """Compute the logits (B, V) of the token that follows idx."""
        return self(idx[:, -self.config.window :])[0][:, -1]

    generate = GPT.generate


class NumberMLP(WindowMLP):
    """A WindowMLP without a learned embedding: each token is represented by a fixed number."""

    embedding = NumberEmbedding
