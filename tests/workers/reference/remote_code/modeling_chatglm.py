"""The network of a ChatGLM-6B as a checkpoint's own code has it, in plain PyTorch behind transformers' interface.

Our own writing, after the published behaviour of the model: one sequence or several of one length, no padding.
"""

import math
import re

import torch
from torch import nn
from torch.nn import functional
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_chatglm import ChatGLMConfig

BLOCK_DEPTH = 28
HIDDEN_SCORE = -10000.0


class InvalidScoreLogitsProcessor(LogitsProcessor):
    def __call__(self, input_ids, scores):
        if not torch.isfinite(scores).all():
            scores = torch.zeros_like(scores)
            scores[..., 5] = 5e4
        return scores


def rotate(states, angles):
    """states [S, N, r], angles [S, r / 2]: the second half of each vector is the partner of the first."""
    cos, sin = (torch.cat([table, table], -1).unsqueeze(1) for table in (angles.cos(), angles.sin()))
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat([-second, first], -1) * sin


class QuantizedLinear(nn.Linear):
    """Weights as integers and a scale a row; computes with what they stand for."""

    def __init__(self, bits, linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        largest = 2 ** (bits - 1) - 1
        weight = linear.weight.data
        self.scale = (weight.abs().max(-1).values / largest).half()
        self.levels = (weight / self.scale[:, None].to(weight.dtype)).round().to(torch.int8)
        self.register_buffer("weight", self.levels.to(weight.dtype) * self.scale[:, None].to(weight.dtype))
        self.bias = linear.bias

    def forward(self, x):
        return functional.linear(x, self.weight, self.bias)


class SelfAttention(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.index = index
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def angles(self, positions, dtype):
        size = self.head_dim // 2
        exponents = torch.arange(0, size, 2, device=positions.device).float() / size
        frequencies = (1.0 / 10000.0**exponents).half().to(dtype)
        return positions.to(dtype)[:, None] * frequencies

    def forward(self, x, position_ids, mask, past):
        outputs, presents = [], []
        for row in range(x.shape[0]):
            fused = self.query_key_value(x[row]).view(-1, self.num_heads, 3 * self.head_dim)
            query, key, value = fused.chunk(3, -1)
            angles = [self.angles(positions, x.dtype) for positions in position_ids[row]]
            query, key = (
                torch.cat(
                    [rotate(half, table) for half, table in zip(part.chunk(2, -1), angles, strict=True)], -1
                )
                for part in (query, key)
            )
            if past is not None:
                key = torch.cat([past[0][:, row], key])
                value = torch.cat([past[1][:, row], value])
            presents.append((key, value))
            depth = self.index + 1
            query = query / (math.sqrt(self.head_dim) * depth)
            scores = torch.einsum("qnd,knd->nqk", query, key)
            if mask is not None:
                scores = scores.masked_fill(mask[row], HIDDEN_SCORE)
            shares = functional.softmax(scores.float() * depth, -1).to(x.dtype)
            outputs.append(torch.einsum("nqk,knd->qnd", shares, value).flatten(1))
        present = tuple(torch.stack(parts, 1) for parts in zip(*presents, strict=True))
        return self.dense(torch.stack(outputs)), present


class GLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, x):
        return self.dense_4h_to_h(functional.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class GLMBlock(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.attention = SelfAttention(config, index)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = GLU(config)

    def forward(self, x, position_ids, mask, past):
        alpha = math.sqrt(2 * BLOCK_DEPTH)
        normed = self.input_layernorm(x)
        attended, present = self.attention(normed, position_ids, mask, past)
        normed = self.post_attention_layernorm(alpha * normed + attended)
        return alpha * normed + self.mlp(normed), present


class ChatGLMPreTrainedModel(PreTrainedModel):
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"

    def _init_weights(self, module):
        pass


class ChatGLMModel(ChatGLMPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GLMBlock(config, index) for index in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)

    def get_input_embeddings(self):
        return self.word_embeddings

    def set_input_embeddings(self, value):
        self.word_embeddings = value

    def forward(self, input_ids, position_ids, mask, past_key_values=None):
        x = self.word_embeddings(input_ids)
        presents = []
        for index, layer in enumerate(self.layers):
            past = past_key_values[index] if past_key_values is not None else None
            x, present = layer(x, position_ids, mask, past)
            presents.append(present)
        return self.final_layernorm(x), tuple(presents)


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel):
    def __init__(self, config, *args, **kwargs):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def place(self, ids):
        """(position ids [2, S], mask [1, S, S]) of a sequence: a context that sees itself, then bos and the answer."""
        sequence = ids.tolist()
        if self.config.bos_token_id not in sequence:
            raise ValueError("the sequence has no bos token")
        context = sequence.index(self.config.bos_token_id)
        marks = [self.config.gmask_token_id, self.config.mask_token_id]
        mark = sequence.index(next(mark for mark in marks if mark in sequence))
        index = torch.arange(len(sequence), device=ids.device)
        first = torch.where(index < context, index, torch.full_like(index, mark))
        block = (index - context + 1).clamp(min=0)
        hidden = (index[None, :] > index[:, None]) & (index[None, :] >= context)
        return torch.stack([first, block]), hidden[None]

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        positions = torch.stack([self.place(row)[0] for row in input_ids])
        if past_key_values is not None:
            input_ids, positions = input_ids[:, -1:], positions[..., -1:]
        return {"input_ids": input_ids, "past_key_values": past_key_values, "position_ids": positions}

    def forward(  # noqa: PLR0917  (transformers' interface)
        self,
        input_ids=None,
        position_ids=None,
        attention_mask=None,
        past_key_values=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        **kwargs,
    ):
        mask = None
        if past_key_values is None:
            placed = [self.place(row) for row in input_ids]
            mask = torch.stack([hidden for _, hidden in placed])
            if position_ids is None:
                position_ids = torch.stack([positions for positions, _ in placed])
        hidden, presents = self.transformer(input_ids, position_ids, mask, past_key_values)
        return CausalLMOutputWithPast(logits=self.lm_head(hidden), past_key_values=presents)

    def process_response(self, response):
        response = response.strip().replace("[[训练时间]]", "2023年")
        for narrow, wide in zip(",!:;?", "，！：；？", strict=True):
            response = re.sub(rf"([\u4e00-\u9fff]){re.escape(narrow)}", rf"\1{wide}", response)
            response = re.sub(rf"{re.escape(narrow)}([\u4e00-\u9fff])", rf"{wide}\1", response)
        return response

    def prompt(self, query, history):
        if not history:
            return query
        rounds = [f"[Round {i}]\n问：{asked}\n答：{answer}\n" for i, (asked, answer) in enumerate(history)]
        return "".join(rounds) + f"[Round {len(history)}]\n问：{query}\n答："

    @torch.no_grad()
    def chat(  # noqa: PLR0917  (the original's interface)
        self,
        tokenizer,
        query,
        history=None,
        max_length=2048,
        num_beams=1,
        do_sample=True,
        top_p=0.7,
        temperature=0.95,
        logits_processor=None,
        **kwargs,
    ):
        history = history or []
        processors = LogitsProcessorList([*(logits_processor or []), InvalidScoreLogitsProcessor()])
        inputs = tokenizer([self.prompt(query, history)], return_tensors="pt").to(self.device)
        outputs = self.generate(
            **inputs,
            max_length=max_length,
            num_beams=num_beams,
            do_sample=do_sample,
            top_p=top_p,
            temperature=temperature,
            logits_processor=processors,
            **kwargs,
        )
        new_ids = outputs.tolist()[0][inputs["input_ids"].shape[1] :]
        response = self.process_response(tokenizer.decode(new_ids))
        return response, [*history, (query, response)]

    def quantize(self, bits, **kwargs):
        for layer in self.transformer.layers:
            attention, mlp = layer.attention, layer.mlp
            attention.query_key_value = QuantizedLinear(bits, attention.query_key_value)
            attention.dense = QuantizedLinear(bits, attention.dense)
            mlp.dense_h_to_4h = QuantizedLinear(bits, mlp.dense_h_to_4h)
            mlp.dense_4h_to_h = QuantizedLinear(bits, mlp.dense_4h_to_h)
        self.config.quantization_bit = bits
        return self
