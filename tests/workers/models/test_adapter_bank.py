"""Many adapters in one forward pass: each token gets its own, and nothing of anybody else's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.lora_adapter import write_adapter
from workers.models.adapter_bank import AdapterBank, GroupedRows, LoraLinear, MaskedRows
from workers.models.chatglm import ChatGLM
from workers.models.config import CheckpointError, ModelConfig
from workers.models.loader import load_model
from workers.models.lora import TARGETS, AdapterError, linear_shapes, read_adapter
from workers.models.quantization import dequantize, quantize, stored_values

PROMPTS = [[5, 6, 7, 50, 51], [9, 50, 51, 11], [12, 13, 50, 51], [14, 50, 51, 3, 4, 5]]


def new_model(dtype: torch.dtype = torch.float32) -> ChatGLM:
    config = ModelConfig(
        hidden_size=32,
        inner_hidden_size=48,
        num_layers=2,
        num_heads=2,
        vocab_size=60,
        special_ids={"bos": 51, "eos": 52, "gmask": 50, "mask": 49},
    )
    torch.manual_seed(1)
    model = ChatGLM(config).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return model.to(dtype)


def new_bank(model: ChatGLM, num_slots: int = 3) -> AdapterBank:
    return AdapterBank(model, num_slots, dtype=model.dtype, device=model.device)


@pytest.fixture
def model() -> ChatGLM:
    return new_model()


@pytest.fixture
def bank(model: ChatGLM) -> AdapterBank:
    return new_bank(model)


@pytest.fixture
def adapter(bank: AdapterBank, tmp_path):
    """Makes adapters of this network."""

    def make(seed: int, **fields):
        return read_adapter(
            write_adapter(tmp_path / str(seed), bank.shapes, seed=seed, **fields), bank.shapes
        )

    return make


@pytest.fixture
def logits_of(pack_prompts):
    """Logits of all positions of each of PROMPTS, whose slots these are."""

    @torch.inference_mode()
    def run(model: ChatGLM, slots: list[int] | None, prompts=PROMPTS) -> list[torch.Tensor]:
        batch = pack_prompts(prompts, model.config)
        if slots is not None:
            lens = torch.tensor([len(prompt) for prompt in prompts])
            batch.adapter_slots = torch.tensor(slots).repeat_interleave(lens)
        return list(model(batch, all_positions=True).split([len(prompt) for prompt in prompts]))

    return run


def merged_model(adapter) -> ChatGLM:
    model = new_model()
    model.load_state_dict(
        {name: adapter.merged(name, tensor, torch.float32) for name, tensor in model.state_dict().items()}
    )
    return model


def test_a_mixed_batch_gives_each_sequence_what_its_own_merged_model_gives(bank, model, adapter, logits_of):
    one = adapter(1, rank=4)
    two = adapter(2, rank=16, targets=TARGETS, alpha=20)
    bank.load(1, one)
    bank.load(3, two)
    mixed = logits_of(model, [3, 0, 1, 3])

    base, with_one, with_two = (
        logits_of(m, None) for m in (new_model(), merged_model(one), merged_model(two))
    )
    for index, expected in enumerate((with_two, base, with_one, with_two)):
        torch.testing.assert_close(mixed[index], expected[index], atol=2e-4, rtol=2e-4)
    assert (with_one[0] - base[0]).abs().max() > 0.1
    assert (with_two[0] - with_one[0]).abs().max() > 0.1


def test_a_network_without_adapters_is_left_as_it_is(bank, model):
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    assert (bank.num_bytes, bank.generation) == (0, 0)
    assert not model._forward_pre_hooks


def test_a_batch_without_adapters_runs_the_base_alone(bank, model, adapter, logits_of, monkeypatch):
    bank.load(1, adapter(1))
    expected = logits_of(new_model(), None)
    torch.testing.assert_close(logits_of(model, [0, 0, 0, 0]), expected, atol=0, rtol=0)
    monkeypatch.setattr(GroupedRows, "add", None)
    torch.testing.assert_close(logits_of(model, None), expected, atol=0, rtol=0)


def test_a_batch_after_one_with_adapters_does_not_inherit_them(bank, model, adapter, logits_of):
    bank.load(1, adapter(1))
    logits_of(model, [1, 1, 1, 1])
    torch.testing.assert_close(logits_of(model, None), logits_of(new_model(), None), atol=0, rtol=0)


def test_the_memory_grows_with_the_largest_rank_and_keeps_the_others(bank, model, adapter, logits_of):
    bank.load(1, adapter(1, rank=3))
    before, small, generation = logits_of(model, [1, 1, 1, 1]), bank.num_bytes, bank.generation

    bank.load(2, adapter(2, rank=20))

    torch.testing.assert_close(logits_of(model, [1, 1, 1, 1]), before, atol=0, rtol=0)
    assert bank.num_bytes == 3 * small  # of 8 ranks, then of 24
    assert bank.generation > generation
    generation = bank.generation
    bank.load(3, adapter(3, rank=24))
    assert bank.generation == generation


def test_a_slot_has_nothing_left_of_who_was_there_before(bank, model, adapter, logits_of):
    small = adapter(2, rank=2)
    bank.load(1, small)
    expected = logits_of(model, [1, 0, 1, 1])
    bank.load(1, adapter(1, rank=8, targets=TARGETS))
    bank.load(1, small)
    torch.testing.assert_close(logits_of(model, [1, 0, 1, 1]), expected, atol=0, rtol=0)
    bank.clear(1)
    torch.testing.assert_close(logits_of(model, [1, 1, 1, 1]), logits_of(new_model(), None), atol=0, rtol=0)


def test_a_slot_is_zero_in_layers_that_its_new_adapter_leaves_alone(bank, model, adapter):
    bank.load(1, adapter(1, targets=TARGETS))
    bank.load(1, adapter(2, targets=TARGETS[:1]))
    x = torch.randn(5, 32)
    slots = torch.ones(5, dtype=torch.int64)
    for path, (out_features, in_features) in bank.shapes.items():
        layer = bank.stack(path)
        if layer is None or in_features != 32:
            continue
        # As a graph on a GPU adds them: without a look at who has which ranks.
        masked = MaskedRows(slots, 3).add(torch.zeros(5, out_features), x, layer.a, layer.b, [])
        assert masked.any() == path.endswith(TARGETS[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_float32(adapter, logits_of, dtype):
    model = new_model(dtype)
    bank = new_bank(model)
    one = adapter(1, targets=TARGETS)
    bank.load(2, one)
    noise = max(
        (ours.float() - exact).abs().max()
        for ours, exact in zip(logits_of(model, None), logits_of(new_model(), None), strict=True)
    )
    for ours, exact in zip(logits_of(model, [2] * 4), logits_of(merged_model(one), None), strict=True):
        assert ours.dtype == dtype
        assert (ours.float() - exact).abs().max() < 4 * noise


def test_an_adapter_out_of_the_networks_range_is_refused_and_its_slot_is_empty(adapter, logits_of):
    model = new_model(torch.float16)
    bank = new_bank(model)
    with pytest.raises(AdapterError, match=r"range of torch\.float16.*--dtype"):
        bank.load(1, adapter(1, alpha=1e7))
    torch.testing.assert_close(
        logits_of(model, [1] * 4), logits_of(new_model(torch.float16), None), atol=0, rtol=0
    )


@pytest.mark.parametrize("error", [MemoryError("2 GiB"), torch.OutOfMemoryError("2 GiB")])
def test_too_little_memory_is_an_error_of_the_adapter(model, adapter, logits_of, monkeypatch, error):
    bank = new_bank(model)
    bank.load(1, adapter(1, rank=2))
    before = logits_of(model, [1, 1, 1, 1])
    large = adapter(2, rank=12)

    def no_memory(*args):
        raise error

    monkeypatch.setattr("workers.models.adapter_bank._zeros", no_memory)
    with pytest.raises(AdapterError, match=r"no memory.*2 GiB.*--max-adapters"):
        bank.load(2, large)
    torch.testing.assert_close(logits_of(model, [1, 1, 1, 1]), before, atol=0, rtol=0)
    torch.testing.assert_close(logits_of(model, [2] * 4), logits_of(new_model(), None), atol=0, rtol=0)


def test_on_a_cpu_slots_that_were_never_used_take_no_memory(tmp_path):
    model = torch.nn.Module()
    model.dense = torch.nn.Linear(1 << 16, 1 << 16, device="meta")
    bank = AdapterBank(model, 100, dtype=torch.bfloat16, device="cpu")
    adapter = read_adapter(write_adapter(tmp_path, bank.shapes, targets=["dense"], rank=8), bank.shapes)

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident_bytes()
    bank.load(1, adapter)
    assert bank.num_bytes > 200e6
    assert resident_bytes() - before < 20e6


@pytest.mark.parametrize("slot", [0, -1, 4])
def test_only_slots_of_the_bank_can_be_loaded(bank, adapter, slot):
    with pytest.raises(ValueError, match="not one of 1 to 3"):
        bank.load(slot, adapter(1))


# --- the two ways to compute it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [[0, 0, 0], [1, 1, 1], [2, 0, 1, 2, 3, 0, 1], [3]])
def test_grouped_and_masked_rows_give_the_same(slots):
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(4, 8, width, generator=generator) for width in (24, 40))
    ranks = [0, 8, 5, 0]
    for slot, rank in enumerate(ranks):
        a[slot, rank:] = b[slot, rank:] = 0
    x, y = (torch.randn(len(slots), width, generator=generator) for width in (24, 40))
    expected = torch.stack([row + x[i] @ a[slots[i]].T @ b[slots[i]] for i, row in enumerate(y)])
    indexes = torch.tensor(slots)

    grouped = GroupedRows(indexes).add(y.clone(), x, a, b, ranks)
    masked = MaskedRows(indexes, 3).add(y.clone(), x, a, b, ranks)

    torch.testing.assert_close(grouped, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(masked, expected, atol=1e-4, rtol=1e-4)


def test_an_overflow_in_one_adapter_stays_in_its_own_rows():
    a = torch.ones(3, 8, 64, dtype=torch.float16)
    b = torch.ones(3, 8, 16, dtype=torch.float16)
    a[0] = b[0] = 0
    a[2] = 60000
    x = torch.full((2, 64), 100.0, dtype=torch.float16)
    y = torch.zeros(2, 16, dtype=torch.float16)
    slots = torch.tensor([1, 2])

    for rows in (GroupedRows(slots), MaskedRows(slots, 2)):
        result = rows.add(y.clone(), x, a, b, [0, 8, 8])
        assert result[0].isfinite().all()
        assert result[1].isinf().all()


def test_masked_rows_look_at_no_value_on_the_host():
    """What a captured GPU graph needs: the same operations whatever the slots are."""
    with torch.device("meta"):
        slots = torch.zeros(5, dtype=torch.int64)
        x, y = torch.zeros(5, 24), torch.zeros(5, 40)
        result = MaskedRows(slots, 3).add(y, x, torch.zeros(4, 8, 24), torch.zeros(4, 8, 40), [0, 8, 8, 8])
    assert result.shape == (5, 40)


# --- over other forms of the base ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chatglm-6b-tiny", "chatglm2-6b-tiny"])
@pytest.mark.parametrize("bits", [4, 8])
def test_over_a_quantized_base_a_mixed_batch_gives_each_what_it_gets_alone(
    golden_root, logits_of, tmp_path, name, bits
):
    folder = golden_root / name
    model = load_model(folder, dtype=torch.float32, quantize_bits=bits)
    prompts = [
        prompt["input_ids"]
        for prompt in json.loads((folder / "golden_model.json").read_text())["prompts"][:6]
    ]
    base = logits_of(model, None, prompts)
    bank = new_bank(model)
    golden_adapter = read_adapter(folder / "lora", bank.shapes)
    own = read_adapter(
        write_adapter(tmp_path, bank.shapes, targets=TARGETS, rank=12, strength=0.1), bank.shapes
    )
    bank.load(1, golden_adapter)
    bank.load(2, own)
    slots = [0, 1, 2, 1, 2, 0]

    mixed = logits_of(model, slots, prompts)

    for index, slot in enumerate(slots):
        (alone,) = logits_of(model, [slot], prompts[index : index + 1])
        torch.testing.assert_close(mixed[index], alone, atol=1e-3, rtol=1e-4)
        assert (mixed[index] - base[index]).abs().max() > (0.5 if slot else -1)

    # What an adapter adds to integers is what it adds to the weights that they stand for.
    widened = load_model(folder, dtype=torch.float32)
    state = widened.state_dict()
    for path in bank.shapes:
        layer = model.get_submodule(path)
        stored = layer.base if isinstance(layer, LoraLinear) else layer
        weight = dequantize(stored.weight, stored.weight_scale, bits, torch.float32)
        state[f"{path}.weight"] = own.merged(f"{path}.weight", weight, torch.float32)
    widened.load_state_dict(state)
    expected = logits_of(widened, None, prompts)
    for index in (2, 4):
        torch.testing.assert_close(mixed[index], expected[index], atol=5e-3, rtol=1e-3)


def test_an_adapter_cannot_be_merged_into_integers(golden_root, tmp_path):
    folder = golden_root / "chatglm-6b-tiny"
    model = load_model(folder, quantize_bits=8)
    save_file(
        {name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors"
    )
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_bit": 8}))
    load_model(tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot be merged into integers.*glmq quantize"):
        load_model(tmp_path, adapter=folder / "lora")


def test_an_adapter_is_merged_before_weights_are_quantized(golden_root):
    folder = golden_root / "chatglm-6b-tiny"
    merged = load_model(folder, dtype=torch.float16, adapter=folder / "lora")
    quantized = load_model(folder, dtype=torch.float32, adapter=folder / "lora", quantize_bits=8)
    for path in linear_shapes(merged):
        layer = quantized.get_submodule(path)
        expected = quantize(merged.get_submodule(path).weight, 8)
        assert torch.equal(layer.weight, stored_values(expected, 8))
        assert torch.equal(layer.weight_scale, expected.scales)
