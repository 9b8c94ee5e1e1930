"""A small GPT over bytes: the model that the launch scripts train. It knows nothing of how it is sharded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256  # one token per byte value, so that any text will do without a tokenizer


class Attention(nn.Module):
    """Causal self-attention; query, key and value are separate, so that tensor parallelism can split heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, time, width]`` to the same shape."""
        batch, time, _ = x.shape
        # The number of heads is left open: a tensor-parallel rank holds only its own.
        query, key, value = (
            layer(x).view(batch, time, -1, self.head_width).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """The position-wise part of a block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, time, width]`` to the same shape."""
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out


class Block(nn.Module):
    """One pre-norm transformer block; the unit in which FSDP gathers parameters."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, time, width]`` to the same shape."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class GPT(nn.Module):
    """A decoder over bytes.

    Args:
        layers: number of blocks.
        width: width of the residual stream; a multiple of ``heads``.
        heads: attention heads per block.
        context: longest sequence, in bytes.
    """

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.apply(_initialise)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                # GPT-2's rule: the residual stream keeps its variance at any depth.
                nn.init.normal_(parameter, std=(2 * layers * parameter.shape[1]) ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Byte values ``[batch, time]``, int64, to logits of the next byte, ``[batch, time, 256]``."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        # Places are expanded to the batch because tensor parallelism splits both embeddings along dimension 1.
        x = self.token(tokens) + self.position(places.expand_as(tokens))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def _initialise(module: nn.Module) -> None:
    """Unit variance in, unit variance out, in place: a narrow model learns sooner than from GPT-2's .02 everywhere."""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.5)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
