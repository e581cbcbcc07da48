"""Configuration of a ChatGLM-6B as a checkpoint's own code has it, for the tests of the reference backend.

Our own writing, after the published behaviour; like the two files beside it, it imports nothing of this project.
"""

from transformers import PretrainedConfig


class ChatGLMConfig(PretrainedConfig):
    model_type = "chatglm"

    def __init__(  # noqa: PLR0917  (transformers' interface)
        self,
        hidden_size=64,
        inner_hidden_size=256,
        num_layers=3,
        num_attention_heads=4,
        vocab_size=2048,
        layernorm_epsilon=1e-5,
        max_sequence_length=2048,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=3,
        mask_token_id=None,
        gmask_token_id=None,
        quantization_bit=0,
        use_cache=True,
        **kwargs,
    ):
        self.hidden_size = hidden_size
        self.inner_hidden_size = inner_hidden_size
        self.num_layers = num_layers
        self.num_attention_heads = num_attention_heads
        self.vocab_size = vocab_size
        self.layernorm_epsilon = layernorm_epsilon
        self.max_sequence_length = max_sequence_length
        self.mask_token_id = mask_token_id
        self.gmask_token_id = gmask_token_id
        self.quantization_bit = quantization_bit
        self.use_cache = use_cache
        super().__init__(
            bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id, **kwargs
        )
