"""ChatGLM-6B's network for training: whole padded sequences, differentiable, logits where they are asked for.

Parameter names and arithmetic are CHATGLM.md's (A2 to A7), so what is saved loads in `workers.models`, which has the inference
side. It knows nothing about tokenizers or tasks.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

ALPHA = math.sqrt(2 * 28)
"""Of the scaled residual; 28 whatever the number of layers is (A3)."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The network's sizes under their names in config.json."""

    vocab_size: int = 3584
    hidden_size: int = 256
    inner_hidden_size: int = 1024
    num_attention_heads: int = 8
    num_layers: int = 6
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def config(self, token_ids: dict[str, int]) -> dict[str, object]:
        """The fields of config.json."""
        return {
            "architectures": ["ChatGLMForConditionalGeneration"],
            **token_ids,
            **asdict(self),
            "model_type": "chatglm",
            "position_encoding_2d": True,
            "torch_dtype": "float16",
            "use_cache": True,
        }


def is_branch_end(name: str) -> bool:
    """Whether this parameter makes the output of a residual branch.

    The branch is weighed against ALPHA times a normalised input. Made ALPHA times larger, and trained at ALPHA times the
    rate, it is an ordinary post-LN branch; otherwise copying is learned in twice as many steps.
    """
    return name.endswith(
        ("attention.dense.weight", "attention.dense.bias", "dense_4h_to_h.weight", "dense_4h_to_h.bias")
    )


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_heads = shape.num_attention_heads
        self.query_key_value = nn.Linear(shape.hidden_size, 3 * shape.hidden_size)
        self.dense = nn.Linear(shape.hidden_size, shape.hidden_size)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """x [B, S, H]; rotary: cos and sin [B, 1, S, D]; mask [B, 1, S, S], added to the scores."""
        batch, length, hidden = x.shape
        fused = self.query_key_value(x).view(batch, length, self.num_heads, -1).transpose(1, 2)
        query, key, value = fused.chunk(3, dim=-1)
        query, key = _rotate(query, *rotary), _rotate(key, *rotary)
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.dense(out.transpose(1, 2).reshape(batch, length, hidden))


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(shape.hidden_size, shape.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(shape.inner_hidden_size, shape.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(functional.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(shape.hidden_size, shape.layernorm_epsilon)
        self.attention = Attention(shape)
        self.post_attention_layernorm = nn.LayerNorm(shape.hidden_size, shape.layernorm_epsilon)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        normed = self.input_layernorm(x)
        x = ALPHA * normed + self.attention(normed, rotary, mask)
        normed = self.post_attention_layernorm(x)
        return ALPHA * normed + self.mlp(normed)


class Transformer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList([Layer(shape) for _ in range(shape.num_layers)])
        self.final_layernorm = nn.LayerNorm(shape.hidden_size, shape.layernorm_epsilon)


class ChatGLM(nn.Module):
    """The network with its embedding tied to its output (A7)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.transformer = Transformer(shape)
        self._initialize()
        half = shape.head_dim // 2
        # Rounded to fp16, as the original keeps it (A4).
        inv_freq = (1.0 / 10000 ** (torch.arange(0, half, 2) / half)).half().float()
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def _initialize(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "embeddings" in name:
                nn.init.normal_(parameter, std=0.03)
            elif parameter.dim() == 2:
                gain = ALPHA if is_branch_end(name) else 1.0
                nn.init.normal_(parameter, std=gain / math.sqrt(parameter.shape[1]))

    def forward(self, ids: Tensor, context_lens: Tensor, wanted: Tensor) -> Tensor:
        """Logits [N, V] at `wanted` [N], places in the flattened [B * S] ids.

        ids [B, S], padded on the right; context_lens [B]: the place of `<sop>` (A6).
        """
        place = torch.arange(ids.shape[1], device=ids.device)
        context = context_lens[:, None]
        first = torch.minimum(place, context - 1)
        block = (place - context + 1).clamp(min=0)
        device = ids.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        cos, sin = self._rotary(first, block)
        rotary = cos.to(dtype), sin.to(dtype)
        visible = (place[:, None] >= place)[None] | (place < context)[:, None, :]
        # What attention adds to the scores; once for all layers.
        mask = torch.zeros(visible.shape, dtype=dtype, device=ids.device).masked_fill_(~visible, -math.inf)[
            :, None
        ]
        x = self.transformer.word_embeddings(ids)
        for layer in self.transformer.layers:
            x = layer(x, rotary, mask)
        x = self.transformer.final_layernorm(x.flatten(0, 1)[wanted])
        return functional.linear(x, self.transformer.word_embeddings.weight)

    def _rotary(self, first: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, 1, S, D]: a half for each kind of position, each with its angles twice."""
        angles = torch.cat(
            [positions[..., None] * self.inv_freq.repeat(2) for positions in (first, block)], dim=-1
        )
        return angles.cos()[:, None], angles.sin()[:, None]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b, c, d = x.chunk(4, dim=-1)
    return x * cos + torch.cat((-b, a, -d, c), dim=-1) * sin
