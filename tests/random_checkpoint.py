"""A small checkpoint with random weights and a sentencepiece model trained on the spot, so that tests need no data.

Its special pieces have other ids than the released models': nothing may rely on those.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

TEXTS = """
你好！我是一个人工智能助手，很高兴见到你。
感冒了要多喝水、多休息，发烧超过三天应该去看医生。
Hello, how are you? I can't say that it's easy, but we're sure they've tried.
深蹲的时候膝盖不要超过脚尖，背部要保持挺直，核心要收紧。
What is the capital of France? It is Paris, isn't it!
请根据我的身高和体重，制定一个为期四周的训练计划：跑步、游泳、拉伸。
Round 0 1 2 3 4 5 6 7 8 9 [ ] ( ) < > | 问：答：数据更新于2023年。
"""
CONTROL_PIECES = ["<eop>", "<sop>", "[gMASK]", "[MASK]", "[sMASK]", "<unused_0>", "<ENC>", "<dBLOCK>"]
USER_DEFINED_PIECES = ["<n>", "<|tab|>", *(f"<|blank_{length}|>" for length in range(2, 81))]


def train_tokenizer() -> bytes:
    """A unigram model with ChatGLM-6B's special and byte pieces, as the bytes of `ice_text.model`."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS.strip().splitlines() * 5),
        model_writer=model,
        model_type="unigram",
        vocab_size=700,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=3,
        control_symbols=CONTROL_PIECES,
        user_defined_symbols=USER_DEFINED_PIECES,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
        num_threads=1,
    )
    return model.getvalue()


def write_random_checkpoint(folder: Path, *, seed: int = 0, num_layers: int = 3) -> None:
    """A checkpoint folder as a release has it: config.json, tokenizer, and weights in one safetensors file."""
    import torch
    from safetensors.torch import save_file

    from workers.models.chatglm import ChatGLM
    from workers.models.config import ModelConfig
    from workers.models.pieces import PieceModel

    model_proto = train_tokenizer()
    pieces = PieceModel(model_proto)
    fields = {
        "model_type": "chatglm",
        "hidden_size": 64,
        "inner_hidden_size": 128,
        "num_layers": num_layers,
        "num_attention_heads": 4,
        "vocab_size": len(pieces) + 24,
        "max_sequence_length": 512,
        "layernorm_epsilon": 1e-5,
        "position_encoding_2d": True,
        "torch_dtype": "float32",
        "bos_token_id": pieces.id_of("<sop>"),
        "eos_token_id": pieces.id_of("<eop>"),
        "gmask_token_id": pieces.id_of("[gMASK]"),
        "mask_token_id": pieces.id_of("[MASK]"),
        "pad_token_id": pieces.id_of("<pad>"),
    }
    model = ChatGLM(ModelConfig.from_fields(fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    (folder / "ice_text.model").write_bytes(model_proto)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def train_second_tokenizer() -> bytes:
    """A byte-pair model as ChatGLM2-6B's: nothing is normalised, and special tokens are no pieces."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS.strip().splitlines() * 5),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        num_threads=1,
    )
    return model.getvalue()


def write_random_second_generation(folder: Path, *, seed: int = 0, num_layers: int = 2) -> None:
    """The same for ChatGLM2-6B's architecture."""
    import torch
    from safetensors.torch import save_file

    from workers.models.config import ModelConfig
    from workers.models.loader import new_network
    from workers.models.pieces import PieceModel

    model_proto = train_second_tokenizer()
    fields = {
        "model_type": "chatglm",
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "kv_channels": 16,
        "num_attention_heads": 4,
        "num_layers": num_layers,
        "padded_vocab_size": len(PieceModel(model_proto)) + 19,
        "seq_length": 512,
        "layernorm_epsilon": 1e-5,
        "add_qkv_bias": True,
        "rmsnorm": True,
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    model = new_network(ModelConfig.from_fields(fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(model_proto)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
