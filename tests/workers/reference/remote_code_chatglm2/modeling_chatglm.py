"""The network of a ChatGLM2-6B as a checkpoint's own code has it, in plain PyTorch behind transformers' interface.

Our own writing, after the published behaviour of the model: sequences of one length, no padding.
"""

import torch
from torch import nn
from torch.nn import functional
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_chatglm import ChatGLMConfig


class InvalidScoreLogitsProcessor(LogitsProcessor):
    def __call__(self, input_ids, scores):
        if not torch.isfinite(scores).all():
            scores = torch.zeros_like(scores)
            scores[..., 5] = 5e4
        return scores


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def rotate(states, cos, sin):
    """states [B, S, N, D]: the first half of each vector is turned in pairs of neighbours."""
    turned, kept = states.chunk(2, -1)
    even, odd = turned[..., 0::2], turned[..., 1::2]
    pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    return torch.cat([pairs.flatten(-2), kept], -1)


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.groups = config.num_attention_heads, config.multi_query_group_num
        self.width = config.kv_channels
        outputs = (self.heads + 2 * self.groups) * self.width
        self.query_key_value = nn.Linear(config.hidden_size, outputs)
        self.dense = nn.Linear(self.heads * self.width, config.hidden_size, bias=False)

    def forward(self, x, positions, past):
        size = self.width // 2
        frequencies = 1.0 / 10000.0 ** (torch.arange(0, size, 2, device=x.device).to(x.dtype) / size)
        angles = (positions.to(x.dtype)[..., None] * frequencies)[:, :, None].float()
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        fused = self.query_key_value(x).unflatten(-1, (-1, self.width))
        query, key, value = fused.split([self.heads, self.groups, self.groups], 2)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if past is not None:
            key, value = torch.cat([past[0], key], 1), torch.cat([past[1], value], 1)
        wide = [part.repeat_interleave(self.heads // self.groups, 2) for part in (key, value)]
        attended = functional.scaled_dot_product_attention(
            query.transpose(1, 2), *(part.transpose(1, 2) for part in wide), is_causal=past is None
        )
        return self.dense(attended.transpose(1, 2).flatten(2)), (key, value)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x):
        gate, up = self.dense_h_to_4h(x).chunk(2, -1)
        return self.dense_4h_to_h(functional.silu(gate) * up)


class GLMBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.self_attention = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(config)


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(GLMBlock(config) for _ in range(config.num_layers))
        self.final_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)


class Embedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)


class ChatGLMModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = Embedding(config)
        self.encoder = Encoder(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)

    def forward(self, input_ids, positions, past_key_values):
        x = self.embedding.word_embeddings(input_ids)
        presents = []
        for index, layer in enumerate(self.encoder.layers):
            past = past_key_values[index] if past_key_values is not None else None
            attended, present = layer.self_attention(layer.input_layernorm(x), positions, past)
            presents.append(present)
            x = x + attended
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.output_layer(self.encoder.final_layernorm(x)), tuple(presents)


class ChatGLMForConditionalGeneration(PreTrainedModel):
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"

    def __init__(self, config, *args, **kwargs):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)

    def _init_weights(self, module):
        pass

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        if past_key_values is not None:
            input_ids, positions = input_ids[:, -1:], positions[:, -1:]
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
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        logits, presents = self.transformer(input_ids, position_ids, past_key_values)
        return CausalLMOutputWithPast(logits=logits, past_key_values=presents)

    def process_response(self, response):
        return response.strip().replace("[[训练时间]]", "2023年")

    @torch.no_grad()
    def chat(  # noqa: PLR0917  (the original's interface)
        self,
        tokenizer,
        query,
        history=None,
        max_length=8192,
        num_beams=1,
        do_sample=True,
        top_p=0.8,
        temperature=0.8,
        logits_processor=None,
        **kwargs,
    ):
        history = history or []
        processors = LogitsProcessorList([*(logits_processor or []), InvalidScoreLogitsProcessor()])
        inputs = tokenizer([tokenizer.build_prompt(query, history)], return_tensors="pt").to(self.device)
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
