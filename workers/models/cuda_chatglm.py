"""ChatGLM-6B's network on an NVIDIA GPU, made of the kernels in `kernels/cuda_*`: fp16, int8, int4 or e4m3 weights.

Says what `chatglm.ChatGLM` says, up to rounding, and takes its parameters. Knows nothing about graphs, requests or
sampling; launches only, so that a decode can be captured.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

import torch
from torch import nn

from workers.models.adapter_bank import AdapterBank, MaskedRows
from workers.models.batch import Batch, KVCache
from workers.models.chatglm import RESIDUAL_SCALE, ChatGLM, Layer
from workers.models.config import ModelConfig
from workers.models.kernels import cuda_driver, cuda_linear, cuda_ops
from workers.models.kernels.cuda_linear import Activations, Format, LinearWeight
from workers.models.kernels.weight_packing import can_pack
from workers.models.layers import LayerNorm, rotary_tables
from workers.models.linear import QuantizedEmbedding, QuantizedLinear
from workers.models.network import Network
from workers.models.quantization import dequantize, integers

logger = logging.getLogger(__name__)

WeightSetting = Literal["fp16", "int8", "int4", "fp8"]

FORMATS: Final[dict[WeightSetting, Format]] = {"fp16": "F16", "int8": "INT8", "int4": "INT4", "fp8": "E4M3"}


@dataclass(frozen=True, slots=True)
class Norm:
    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True, slots=True)
class LayerWeights:
    input_norm: Norm
    query_key_value: LinearWeight
    dense: LinearWeight
    post_attention_norm: Norm
    dense_h_to_4h: LinearWeight
    dense_4h_to_h: LinearWeight

    @property
    def linears(self) -> tuple[LinearWeight, ...]:
        return self.query_key_value, self.dense, self.dense_h_to_4h, self.dense_4h_to_h


@dataclass(frozen=True, slots=True)
class ChatGLMWeights:
    """All parameters on one GPU."""

    embedding: torch.Tensor | None
    """[V, H] fp16; None: the rows of the head, which is packed in int8"""
    layers: tuple[LayerWeights, ...]
    final_norm: Norm
    head: LinearWeight

    @classmethod
    def from_model(
        cls,
        model: ChatGLM,
        weights: WeightSetting | None = None,
        head: WeightSetting | None = None,
        device: torch.device | str = "cuda",
    ) -> ChatGLMWeights:
        """Takes the parameters of a half-precision model, wherever it is, to a GPU.

        Quantized layers stay what they are; `weights` and `head` quantize the others. One layer after another gives up its
        weights, so that the GPU never holds more than one of them twice. The model keeps its modules, but cannot be run
        afterwards.
        """
        if model.dtype != torch.float16:
            raise ValueError(f"the model is {model.dtype}: it must be float16")

        def norm(module: LayerNorm) -> Norm:
            return Norm(module.weight.data.to(device), module.bias.data.to(device))

        def linear(module: nn.Module, setting: WeightSetting | None) -> LinearWeight:
            if not isinstance(module, nn.Linear | QuantizedLinear):
                raise ValueError(f"a {type(module).__name__} has no form on a GPU")
            bias = None if module.bias is None else module.bias.data.to(device=device, dtype=torch.float16)
            stored = module.weight.data.to(device)
            if isinstance(module, QuantizedLinear):
                values, scales = integers(stored, module.bits), module.weight_scale.to(device)
                taken = LinearWeight.from_integers(values, scales, bias, module.bits)
            else:
                taken = LinearWeight.from_dense(stored.half(), bias, FORMATS[setting or "fp16"])
            module.weight.data = module.weight.data.new_empty(0)
            return taken

        transformer = model.transformer
        embedding, taken_head = _embedding_and_head(model, FORMATS[head or "fp16"], device)
        layers = tuple(
            LayerWeights(
                norm(layer.input_layernorm),
                linear(layer.attention.query_key_value, weights),
                linear(layer.attention.dense, weights),
                norm(layer.post_attention_layernorm),
                linear(layer.mlp.dense_h_to_4h, weights),
                linear(layer.mlp.dense_4h_to_h, weights),
            )
            for layer in cast(Sequence[Layer], transformer.layers)
        )
        return cls(embedding, layers, norm(transformer.final_layernorm), taken_head)

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        weights: WeightSetting = "fp16",
        head: WeightSetting = "fp16",
        device: torch.device | str = "cuda",
    ) -> ChatGLMWeights:
        """Random weights of the size of a trained network's, made on the GPU: weights do not change the speed."""
        hidden, inner = config.hidden_size, config.inner_hidden_size

        def normal(*shape: int, std: float = 0.02, mean: float = 0.0) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.float16, device=device).normal_(mean, std)

        def norm() -> Norm:
            return Norm(normal(hidden, mean=1.0), normal(hidden))

        def linear(out_features: int, in_features: int) -> LinearWeight:
            return LinearWeight.from_dense(
                normal(out_features, in_features), normal(out_features), FORMATS[weights]
            )

        layers = tuple(
            LayerWeights(
                norm(),
                linear(3 * hidden, hidden),
                linear(hidden, hidden),
                norm(),
                linear(inner, hidden),
                linear(hidden, inner),
            )
            for _ in range(config.num_layers)
        )
        embedding = normal(config.vocab_size, hidden)
        taken_head = LinearWeight.from_dense(embedding, None, FORMATS[head])
        return cls(_unless_packed(embedding, taken_head), layers, norm(), taken_head)

    @property
    def num_bytes(self) -> int:
        """GPU memory of the weights."""
        tensors = [self.final_norm.weight, self.final_norm.bias]
        for layer in self.layers:
            for one in (layer.input_norm, layer.post_attention_norm):
                tensors += [one.weight, one.bias]
        total = sum(tensor.nbytes for tensor in tensors) + self.head.num_bytes
        total += sum(linear.num_bytes for layer in self.layers for linear in layer.linears)
        if self.embedding is not None and self.embedding.data_ptr() != self.head.weight.data_ptr():
            total += self.embedding.nbytes
        return total


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """What a decode reads, at fixed addresses when it is captured. B sequences."""

    token_ids: torch.Tensor
    """int64; the token of row b is token_ids[token_rows[b]]"""
    token_rows: torch.Tensor | None
    """[B] int32; None: row b's is token_ids[b]"""
    positions: torch.Tensor
    """[2, B] int64"""
    slots: torch.Tensor
    """[B] int64"""
    kv_lens: torch.Tensor
    """[B] int32, at least 1"""
    block_tables: torch.Tensor
    """[B, max_blocks] int32"""
    adapter_slots: torch.Tensor | None = None
    """[B] int64, see `Batch`"""
    shares_sequences: bool = False
    """Rows may be of one sequence, at positions that follow each other: each sees the keys of those before it."""


Attend = Callable[[int, torch.Tensor], torch.Tensor]
"""(layer, fused projection [T, 3H]) -> [T, H]"""


@dataclass(frozen=True, slots=True)
class _Pass:
    """One forward pass over T tokens."""

    num_rows: int
    attend: Attend
    adapter_rows: MaskedRows | None
    is_dependent: bool
    """Each kernel may be set up while the one before it runs. Pays where kernels are short."""


class CudaChatGLM:
    """The network over one set of weights. Shapes: see `Batch`."""

    dtype: Final = torch.float16

    def __init__(
        self,
        config: ModelConfig,
        weights: ChatGLMWeights,
        max_positions: int | None = None,
        bank: AdapterBank | None = None,
    ) -> None:
        """bank: the adapters that a batch may ask for."""
        if config.head_dim not in cuda_ops.HEAD_DIMS or config.hidden_size % 64:
            raise ValueError(
                f"the CUDA kernels have no heads of {config.head_dim} or width {config.hidden_size}"
            )
        self.config = config
        self.weights = weights
        self.bank = bank
        self.device = weights.head.weight.device
        self.scale = config.head_dim**-0.5
        self.set_max_positions(max_positions or config.max_sequence_length)

    def set_max_positions(self, max_positions: int) -> None:
        """Sequences of up to so many tokens can be run."""
        self.rotary = rotary_tables(max_positions + 1, self.config.head_dim, torch.float16, self.device)

    def __call__(
        self, batch: Batch, cache: KVCache | None = None, *, all_positions: bool = False
    ) -> torch.Tensor:
        """Logits in fp16 as `ChatGLM.forward` gives them."""
        if batch.is_prefill:
            return self.prefill(batch, cache, all_positions=all_positions)
        if cache is None:
            raise ValueError("a decode needs a cache")
        inputs = DecodeInputs(
            batch.token_ids,
            None,
            batch.positions.contiguous(),
            batch.slots,
            batch.kv_lens,
            batch.block_tables.contiguous(),
            batch.adapter_slots,
        )
        return self.decode(inputs, cache)

    def prefill(self, batch: Batch, cache: KVCache | None, *, all_positions: bool = False) -> torch.Tensor:
        """[B, vocab] for the last token of each packed sequence, or [T, vocab]."""
        layer_caches = list(_layer_caches(cache)) if cache is not None else None
        positions = batch.positions.contiguous()
        num_tokens, heads = len(batch.token_ids), self.config.num_heads

        def attend(layer: int, qkv: torch.Tensor) -> torch.Tensor:
            layer_cache = layer_caches[layer] if layer_caches is not None else None
            cuda_ops.run_rotate_and_store(qkv, *self.rotary, positions, layer_cache, batch.slots)
            q, k, v = qkv.view(num_tokens, heads, 3, self.config.head_dim).unbind(2)
            attended = cuda_ops.attend_prefill(
                q, k, v, batch.query_starts, batch.prefix_lens, batch.max_query_len, self.scale
            )
            return attended.view(num_tokens, -1)

        one = _Pass(num_tokens, attend, self._adapter_rows(batch.adapter_slots), is_dependent=False)
        normed = self._layers(one, batch.token_ids, None)
        if not all_positions:
            normed = normed[batch.query_starts[1:].long() - 1]
        return cuda_linear.apply(self.weights.head, Activations(normed)).half

    def decode(self, inputs: DecodeInputs, cache: KVCache) -> torch.Tensor:
        """[B, vocab]. Reads nothing on the host."""
        layer_caches = list(_layer_caches(cache))
        batch_size, heads, head_dim = len(inputs.kv_lens), self.config.num_heads, self.config.head_dim
        plan = cuda_ops.decode_plan(batch_size, heads, layer_caches[0].is_int8)
        workspace = cuda_ops.shared_workspace(plan, batch_size, heads, head_dim, self.device)

        def attend(layer: int, qkv: torch.Tensor) -> torch.Tensor:
            out = torch.empty(batch_size, self.config.hidden_size, dtype=qkv.dtype, device=qkv.device)
            if inputs.shares_sequences:
                # All keys are in the cache before any row reads them.
                cuda_ops.run_rotate_and_store(
                    qkv,
                    *self.rotary,
                    inputs.positions,
                    layer_caches[layer],
                    inputs.slots,
                    is_dependent=True,
                )
            cuda_ops.run_attend_decode(
                plan,
                workspace,
                qkv,
                layer_caches[layer],
                inputs.block_tables,
                inputs.kv_lens,
                self.scale,
                out,
                rotary=None if inputs.shares_sequences else self.rotary,
                positions=inputs.positions,
                slots=inputs.slots,
                is_dependent=True,
            )
            return out

        one = _Pass(batch_size, attend, self._adapter_rows(inputs.adapter_slots), is_dependent=True)
        normed = self._layers(one, inputs.token_ids, inputs.token_rows)
        return cuda_linear.apply(self.weights.head, Activations(normed), is_dependent=True).half

    def _layers(self, one: _Pass, token_ids: torch.Tensor, token_rows: torch.Tensor | None) -> torch.Tensor:
        """[T, H], the final norm's output."""
        layers = self.weights.layers
        x = self._embedded(one, token_ids, token_rows)
        for index, layer in enumerate(layers):
            name = f"transformer.layers.{index}"
            qkv = self._linear(one, f"{name}.attention.query_key_value", layer.query_key_value, x)
            attended = Activations(one.attend(index, qkv.half))
            branch = self._linear(one, f"{name}.attention.dense", layer.dense, attended)
            x = self._normed(one, branch, x, layer.post_attention_norm, layer.dense_h_to_4h)
            inner = self._linear(one, f"{name}.mlp.dense_h_to_4h", layer.dense_h_to_4h, x, has_gelu=True)
            branch = self._linear(one, f"{name}.mlp.dense_4h_to_h", layer.dense_4h_to_h, inner)
            if index + 1 == len(layers):
                x = self._normed(one, branch, x, self.weights.final_norm, self.weights.head)
            else:
                following = layers[index + 1]
                x = self._normed(one, branch, x, following.input_norm, following.query_key_value)
        return x.half

    def _linear(
        self, one: _Pass, path: str, weight: LinearWeight, x: Activations, *, has_gelu: bool = False
    ) -> Activations:
        """The layer's product, its tokens' adapters added."""
        stack = self.bank.stack(path) if self.bank is not None and one.adapter_rows is not None else None
        if stack is None or stack.a is None or stack.b is None or one.adapter_rows is None:
            return cuda_linear.apply(weight, x, has_gelu=has_gelu, is_dependent=one.is_dependent)
        y = cuda_linear.apply(weight, x, is_dependent=one.is_dependent).half
        y = one.adapter_rows.add(y, x.half, stack.a, stack.b, stack.ranks)
        if has_gelu:
            cuda_ops.run_rows(y, out=y, has_gelu=True)
        return Activations(y)

    def _adapter_rows(self, slots: torch.Tensor | None) -> MaskedRows | None:
        if slots is None or self.bank is None:
            return None
        return MaskedRows(slots, self.bank.num_slots)

    def _embedded(self, one: _Pass, token_ids: torch.Tensor, token_rows: torch.Tensor | None) -> Activations:
        """The first layer's norm of the tokens' embeddings."""
        layer, table, head = self.weights.layers[0], self.weights.embedding, self.weights.head
        out = self._empty(one, layer.query_key_value)
        # Not a dependent launch: what it looks up may have been written by the kernel before it.
        cuda_ops.run_layer_norm(
            head.weight if table is None else table,
            layer.input_norm.weight,
            layer.input_norm.bias,
            self.config.layernorm_eps,
            out.half,
            token_ids=token_ids,
            token_rows=token_rows,
            embedding_scales=head.scales if table is None else None,
            out_e4m3=out.e4m3,
            out_scales=out.scales,
        )
        return out

    def _normed(
        self, one: _Pass, branch: Activations, normed: Activations, norm: Norm, reader: LinearWeight
    ) -> Activations:
        """The norm of the scaled residual plus the branch, in the form in which `reader` takes it."""
        out = self._empty(one, reader)
        cuda_ops.run_layer_norm(
            branch.half,
            norm.weight,
            norm.bias,
            self.config.layernorm_eps,
            out.half,
            normed=normed.half,
            alpha=RESIDUAL_SCALE,
            out_e4m3=out.e4m3,
            out_scales=out.scales,
            is_dependent=one.is_dependent,
        )
        return out

    def _empty(self, one: _Pass, reader: LinearWeight) -> Activations:
        out = torch.empty(one.num_rows, self.config.hidden_size, dtype=torch.float16, device=self.device)
        if not cuda_linear.takes_e4m3(reader, one.num_rows):
            return Activations(out)
        return Activations(out, *cuda_linear.empty_e4m3(out))


def on_gpu(
    model: Network, weights: WeightSetting | None = None, head: WeightSetting | None = None
) -> CudaChatGLM | None:
    """This network, which is on a GPU, on the fast kernels; None, and one line in the log, when they cannot run it.

    Raises ValueError for e4m3 weights that they cannot run: nothing else has them.
    """
    reason = _why_not(model)
    if weights == "fp8" and reason is None and torch.cuda.get_device_capability(model.device) < (8, 9):
        reason = f"{torch.cuda.get_device_name(model.device)} has no e4m3 (compute capability 8.9)"
    try:
        cuda_driver.check()
        # What the whole network cannot have, its operators may.
        cuda_ops.register()
    except cuda_driver.CudaUnavailableError as error:
        reason = str(error)
    if reason is not None and weights == "fp8":
        raise ValueError(f"quantize is fp8, but {reason}. Use int8 or int4")
    if reason is not None or not isinstance(model, ChatGLM):
        logger.warning("The fast CUDA network is off, PyTorch runs this one: %s", reason)
        return None
    taken = ChatGLMWeights.from_model(model, weights, head, model.device)
    return CudaChatGLM(model.config, taken)


def _why_not(model: Network) -> str | None:
    config = model.config
    if not isinstance(model, ChatGLM):
        return f"they have no {type(model).__name__}"
    if model.dtype != torch.float16:
        return f"the model runs in {str(model.dtype).removeprefix('torch.')}, and they are made for float16"
    if torch.cuda.get_device_capability(model.device) < (8, 0):
        return f"{torch.cuda.get_device_name(model.device)} is older than Ampere (compute capability 8.0)"
    shapes = [
        (3 * config.hidden_size, config.hidden_size),
        (config.inner_hidden_size, config.hidden_size),
        (config.hidden_size, config.inner_hidden_size),
        (config.vocab_size, config.hidden_size),
    ]
    if config.head_dim not in cuda_ops.HEAD_DIMS or not all(can_pack(*shape) for shape in shapes):
        return f"they have no heads of {config.head_dim} values, or widths that are no multiples of 64"
    return None


def _embedding_and_head(
    model: ChatGLM, head_format: Format, device: torch.device | str
) -> tuple[torch.Tensor | None, LinearWeight]:
    """Both, taken from the model. A plain head becomes `head_format`."""
    embedding, head = cast(Any, model.transformer.word_embeddings), cast(Any, model.lm_head)
    is_tied = embedding.weight is head.weight
    stored: torch.Tensor = head.weight.data.to(device)
    if isinstance(head, QuantizedLinear):
        scales = head.weight_scale.to(device)
        taken = LinearWeight.from_integers(integers(stored, head.bits), scales, None, head.bits)
    else:
        taken = LinearWeight.from_dense(stored.half(), None, head_format)
    if isinstance(embedding, QuantizedEmbedding):
        dense = dequantize(
            embedding.weight.to(device), embedding.weight_scale.to(device), embedding.bits, torch.float16
        )
    else:
        dense = stored.half() if is_tied else embedding.weight.data.to(device=device, dtype=torch.float16)
    for module in (embedding, head):
        module.weight.data = module.weight.data.new_empty(0)
    return (_unless_packed(dense, taken) if is_tied else dense), taken


def _unless_packed(embedding: torch.Tensor, head: LinearWeight) -> torch.Tensor | None:
    """An embedding that is tied to this head: not kept beside a packed one, whose rows serve as well."""
    return None if head.weight_format == "INT8" else embedding


def _layer_caches(cache: KVCache) -> Iterator[cuda_ops.LayerCache]:
    for layer in range(cache.keys.shape[0]):
        scales = (
            (cache.key_scales[layer], cache.value_scales[layer])
            if cache.key_scales is not None and cache.value_scales is not None
            else (None, None)
        )
        yield cuda_ops.LayerCache(cache.keys[layer], cache.values[layer], *scales)
