"""Configuration of a ChatGLM2-6B as a checkpoint's own code has it, for the tests of the reference backend.

Our own writing, after the published behaviour; like the two files beside it, it imports nothing of this project.
"""

from transformers import PretrainedConfig


class ChatGLMConfig(PretrainedConfig):
    model_type = "chatglm"

    def __init__(self, quantization_bit=0, **fields):
        for name in (
            "hidden_size",
            "ffn_hidden_size",
            "kv_channels",
            "multi_query_group_num",
            "num_attention_heads",
            "num_layers",
            "padded_vocab_size",
        ):
            setattr(self, name, fields.pop(name, 0))
        self.layernorm_epsilon = fields.pop("layernorm_epsilon", 1e-5)
        self.quantization_bit = quantization_bit
        super().__init__(**fields)
