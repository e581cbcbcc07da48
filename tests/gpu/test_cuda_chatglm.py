"""The network on a GPU against the original code's results, and against the float32 network on the same weights.

Half precision's noise on the golden models: logits of about 15 are rounded to 1/128, and the original's own fp16 differs from
its fp32 by `max_abs_diff_fp16_vs_fp32_last`; tokens are compared where the two best scores are further apart than that.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from workers.models.batch import Batch, KVCache
from workers.models.chatglm import ChatGLM
from workers.models.config import ModelConfig
from workers.models.layout import Layout
from workers.models.loader import load_model
from workers.models.quantization import quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

BLOCK_SIZE = 16
CONFIG = ModelConfig(
    hidden_size=512,
    inner_hidden_size=2048,
    num_layers=3,
    num_heads=4,
    vocab_size=1024,
    special_ids={"bos": 1004, "gmask": 1001, "mask": 1000},
)
FORMATS = [("fp16", 3e-3), ("int8", 3e-3), ("int4", 3e-3), ("fp8", 6e-2)]


@pytest.fixture(scope="module")
def golden() -> Path:
    root = Path(os.environ.get("GLMQ_TEST_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))
    folder = root / "chatglm-6b-tiny"
    if not folder.is_dir():
        pytest.skip(f"the golden data is not at {folder}: set GLMQ_TEST_GOLDEN to its parent")
    return folder


def pack(prompts: list[list[int]], config: ModelConfig, first_block: int = 1) -> tuple[Batch, list[Layout]]:
    """A prefill on the GPU; prompt i owns the blocks from first_block + 10 i on."""
    ids = config.special_ids
    layouts = [
        Layout.of_prompt(prompt, bos_id=ids["bos"], gmask_id=ids["gmask"], mask_id=ids["mask"])
        for prompt in prompts
    ]
    lens = [len(prompt) for prompt in prompts]
    positions = [layout.positions(0, length) for layout, length in zip(layouts, lens, strict=True)]
    slots = [
        (first_block + 10 * row) * BLOCK_SIZE + offset
        for row, length in enumerate(lens)
        for offset in range(length)
    ]
    batch = Batch(
        is_prefill=True,
        token_ids=torch.tensor([id_ for prompt in prompts for id_ in prompt]).cuda(),
        positions=torch.tensor([[p for both in positions for p in both[row]] for row in (0, 1)]).cuda(),
        slots=torch.tensor(slots).cuda(),
        kv_lens=torch.tensor(lens, dtype=torch.int32).cuda(),
        block_tables=torch.zeros(len(prompts), 1, dtype=torch.int32).cuda(),
        query_starts=torch.tensor([0, *lens]).cumsum(0).int().cuda(),
        prefix_lens=torch.tensor([layout.context_len for layout in layouts], dtype=torch.int32).cuda(),
        max_query_len=max(lens),
        max_kv_len=max(lens),
    )
    return batch, layouts


def decode_batch(tokens: list[int], lens: list[int], layouts: list[Layout]) -> Batch:
    """One more token for each prompt of `pack`; `lens` counts it."""
    positions = [layout.position(length - 1) for layout, length in zip(layouts, lens, strict=True)]
    return Batch(
        is_prefill=False,
        token_ids=torch.tensor(tokens).cuda(),
        positions=torch.tensor(positions).T.contiguous().cuda(),
        slots=torch.tensor([(1 + 10 * row) * BLOCK_SIZE + n - 1 for row, n in enumerate(lens)]).cuda(),
        kv_lens=torch.tensor(lens, dtype=torch.int32).cuda(),
        block_tables=(1 + 10 * torch.arange(len(lens))[:, None] + torch.arange(10)).int().cuda(),
        query_starts=torch.arange(len(lens) + 1, dtype=torch.int32).cuda(),
        prefix_lens=torch.zeros(len(lens), dtype=torch.int32).cuda(),
        max_kv_len=max(lens),
    )


def empty_cache(config: ModelConfig, num_blocks: int, kv: str = "fp16") -> KVCache:
    shape = (config.num_layers, num_blocks, config.num_heads, BLOCK_SIZE, config.head_dim)
    if kv == "fp16":
        return KVCache(*(torch.full(shape, torch.nan, dtype=torch.half, device="cuda") for _ in range(2)))
    values = [torch.zeros(shape, dtype=torch.int8, device="cuda") for _ in range(2)]
    scales = [torch.full(shape[:-1], torch.nan, dtype=torch.half, device="cuda") for _ in range(2)]
    return KVCache(*values, *scales)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def random_prompts(config: ModelConfig, lens: list[int]) -> list[list[int]]:
    ids = config.special_ids
    return [[*torch.randint(900, (n - 2,)).tolist(), ids["gmask"], ids["bos"]] for n in lens]


def half_model(config: ModelConfig) -> ChatGLM:
    model = ChatGLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "layernorm" in name and name.endswith("weight")
            parameter.normal_(mean=float(is_norm), std=0.02 if parameter.ndim == 1 else 0.04)
    return model.half().cuda()


@torch.inference_mode()
def test_prompt_logits_are_as_close_to_the_originals_as_half_precision_can_be(golden: Path) -> None:
    """PyTorch's own operators in fp16 are the measure: their distance from the original's float32, and the margin between the
    two best scores from which on no token may change."""
    from workers.models.cuda_chatglm import ChatGLMWeights, CudaChatGLM

    data = json.loads((golden / "golden_model.json").read_text(encoding="utf-8"))
    config = ModelConfig.from_folder(golden)
    plain = load_model(golden, dtype=torch.half, device="cuda")
    batch, _ = pack([prompt["input_ids"] for prompt in data["prompts"]], config)
    batch.slots.zero_()
    plain_logits = plain(batch, None, all_positions=True).float().cpu()
    model = CudaChatGLM(config, ChatGLMWeights.from_model(plain))
    logits = model(batch, None, all_positions=True).float().cpu()
    with safe_open(golden / "logits.safetensors", "pt") as file:
        expected = torch.cat(
            [file.get_tensor(f"prompt{index}.logits") for index in range(len(data["prompts"]))]
        )
    assert relative_error(logits, expected) < 1.2 * relative_error(plain_logits, expected) < 3e-2
    noise = (plain_logits - expected).abs().max()
    assert (logits - expected).abs().max() < 1.5 * noise
    best = expected.topk(2).values
    is_clear = best[:, 0] - best[:, 1] > noise
    assert is_clear.sum() > 30
    assert torch.equal(logits.argmax(-1)[is_clear], expected.argmax(-1)[is_clear])


@torch.inference_mode()
def test_a_long_prompt_equals_the_originals_within_half_precision(golden: Path) -> None:
    from workers.models.cuda_chatglm import ChatGLMWeights, CudaChatGLM

    data = json.loads((golden / "golden_model.json").read_text(encoding="utf-8"))
    config = ModelConfig.from_folder(golden)
    model = CudaChatGLM(
        config, ChatGLMWeights.from_model(load_model(golden, dtype=torch.half, device="cuda"))
    )
    batch, _ = pack([data["long_prompt"]["input_ids"]], config)
    logits = model(batch, None, all_positions=True)[-8:].cpu()
    with safe_open(golden / "logits.safetensors", "pt") as file:
        # 706 tokens: the half-precision table of angles alone moves these; the original's fp16 was not recorded.
        assert relative_error(logits, file.get_tensor("long.last8.logits")) < 1e-1


@torch.inference_mode()
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_logits_equal_the_originals_within_half_precision(golden: Path, bits: int) -> None:
    from workers.models.cuda_chatglm import ChatGLMWeights, CudaChatGLM

    data = json.loads((golden / "golden_model.json").read_text(encoding="utf-8"))
    noise = data["half"]["max_abs_diff_fp16_vs_fp32_last"]
    config = ModelConfig.from_folder(golden)
    weights = ChatGLMWeights.from_model(
        load_model(golden, dtype=torch.half, device="cuda"), "int4" if bits == 4 else "int8"
    )
    model = CudaChatGLM(config, weights)
    with safe_open(golden / "logits.safetensors", "pt") as file:
        for index in (0, 2, 8):
            batch, _ = pack([data["prompts"][index]["input_ids"]], config)
            logits = model(batch, None).float().cpu()
            expected = file.get_tensor(f"int{bits}.dequant_fp32_product.prompt{index}.logits")
            torch.testing.assert_close(logits, expected, atol=4 * noise, rtol=0)


@torch.inference_mode()
def test_greedy_answers_are_the_originals_up_to_the_first_close_call(golden: Path) -> None:
    from workers.models.cuda_chatglm import ChatGLMWeights, CudaChatGLM

    data = json.loads((golden / "golden_model.json").read_text(encoding="utf-8"))
    noise = data["half"]["max_abs_diff_fp16_vs_fp32_last"]
    config = ModelConfig.from_folder(golden)
    model = CudaChatGLM(
        config, ChatGLMWeights.from_model(load_model(golden, dtype=torch.half, device="cuda"))
    )
    prompts = [prompt["input_ids"] for prompt in data["prompts"]]
    cache = empty_cache(config, 10 * len(prompts) + 1)
    batch, layouts = pack(prompts, config)
    logits = model(batch, cache).float().cpu()
    expected = [json.loads(str(prompt["greedy_new_ids"])) for prompt in data["prompts"]]
    num_compared, lens, is_followed = 0, [len(prompt) for prompt in prompts], [True] * len(prompts)
    for step in range(max(map(len, expected))):
        tokens = []
        for row, ids in enumerate(expected):
            best = logits[row].topk(2)
            is_followed[row] &= step < len(ids)
            if is_followed[row] and best.values[0] - best.values[1] > 4 * noise:
                assert int(best.indices[0]) == ids[step]
                num_compared += 1
            # The original's tokens are fed, so that one close call does not end the comparison.
            tokens.append(ids[step] if step < len(ids) else 5)
        lens = [length + 1 for length in lens]
        logits = model(decode_batch(tokens, lens, layouts), cache).float().cpu()
    assert num_compared > 200


@torch.inference_mode()
@pytest.mark.parametrize(("weights", "tolerance"), FORMATS)
@pytest.mark.parametrize("num_prompts", [1, 3, 17, 64])
@pytest.mark.parametrize("kv", ["fp16", "int8"])
def test_prefill_and_decode_agree_with_the_float32_network(
    weights: str, tolerance: float, num_prompts: int, kv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers.models.cuda_chatglm import ChatGLMWeights, CudaChatGLM

    if weights == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 needs sm_89")
    original = half_model(CONFIG)
    reference = ChatGLM(CONFIG).cuda()
    reference.load_state_dict(original.state_dict())
    if weights in ("int4", "int8"):
        # The quantizing is tested elsewhere; this compares with what the quantized weights mean.
        bits = 4 if weights == "int4" else 8
        for layer in reference.transformer.layers:
            for linear in (
                layer.attention.query_key_value,
                layer.attention.dense,
                layer.mlp.dense_h_to_4h,
                layer.mlp.dense_4h_to_h,
            ):
                quantized = quantize(linear.weight.data.half(), bits)
                linear.weight.data = quantized.values.float() * quantized.scales.float()[:, None]
    model = CudaChatGLM(CONFIG, ChatGLMWeights.from_model(original, weights))
    # Both turn by the angles of a half-precision model.
    monkeypatch.setattr(reference, "rotary", lambda: model.rotary)
    prompts = random_prompts(CONFIG, [3 + (7 * row) % 60 for row in range(num_prompts)])
    answers = torch.randint(900, (5, num_prompts)).tolist()
    cache = empty_cache(CONFIG, 10 * num_prompts + 1, kv)
    batch, layouts = pack(prompts, CONFIG)
    found = [model(batch, cache)]
    lens = [len(prompt) for prompt in prompts]
    for tokens in answers:
        lens = [length + 1 for length in lens]
        found.append(model(decode_batch(tokens, lens, layouts), cache))
    whole = [prompt + [tokens[row] for tokens in answers] for row, prompt in enumerate(prompts)]
    full, _ = pack(whole, CONFIG)
    expected = reference(full, None, all_positions=True)
    ends = full.query_starts[1:].long()
    for step, logits in enumerate(found):
        tolerance_here = tolerance + (5e-3 if kv == "int8" and step else 0)
        assert relative_error(logits, expected[ends - len(found) + step]) < tolerance_here


@pytest.mark.parametrize("kv", ["fp16", "int8"])
@torch.inference_mode()
def test_rows_of_one_sequence_give_what_one_after_another_gives(kv: str) -> None:
    from workers.models.cuda_chatglm import ChatGLMWeights, CudaChatGLM, DecodeInputs

    model = CudaChatGLM(CONFIG, ChatGLMWeights.from_model(half_model(CONFIG), "int8"))
    prompts = random_prompts(CONFIG, [20, 33])
    batch, layouts = pack(prompts, CONFIG)
    following = torch.randint(900, (2, 5)).tolist()

    cache = empty_cache(CONFIG, 40, kv)
    model(batch, cache)
    expected = []
    for step in range(5):
        lens = [len(prompt) + step + 1 for prompt in prompts]
        expected.append(model(decode_batch([ids[step] for ids in following], lens, layouts), cache))

    cache = empty_cache(CONFIG, 40, kv)
    model(batch, cache)
    steps = [
        decode_batch(
            [ids[step] for ids in following], [len(prompt) + step + 1 for prompt in prompts], layouts
        )
        for step in range(5)
    ]
    together = DecodeInputs(
        torch.cat([one.token_ids for one in steps]),
        None,
        torch.cat([one.positions for one in steps], dim=1).contiguous(),
        torch.cat([one.slots for one in steps]),
        torch.cat([one.kv_lens for one in steps]),
        torch.cat([one.block_tables for one in steps]).contiguous(),
        shares_sequences=True,
    )
    found = model.decode(together, cache)
    assert relative_error(found, torch.cat(expected)) < 3e-3
