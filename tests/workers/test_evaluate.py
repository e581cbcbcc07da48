"""`glmq evaluate` on the small checkpoint: its measures against their definitions, and its table and picture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.lora_adapter import write_adapter
from workers import evaluate as program
from workers.models.loader import load_model
from workers.models.lora import linear_shapes
from workers.models.prefill import pack_sequences
from workers.models.tokenizer import Tokenizer
from workers.quality import chart
from workers.quality.evaluation import Measured, evaluate
from workers.quality.measures import Quality, predictions
from workers.quality.sample import Passage, SampleError, read_passages, sequences_of

PASSAGES = [
    Passage("多喝水，多休息。", "感冒了怎么办？"),
    Passage(
        "Rest, and see a doctor if it does not help.", "And then?", (("I have a cold.", "Drink water."),)
    ),
    Passage("深蹲的时候背部要保持挺直。" * 3),
]
FORMS = ["float32", "int8", "int4", "int8, int8 activations", "int4, int8 activations"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine take longer than one."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_checkpoint)


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = linear_shapes(load_model(tiny_checkpoint))
    return write_adapter(tmp_path_factory.mktemp("adapters") / "doctor", shapes)


@pytest.fixture(scope="module")
def measured(tiny_checkpoint: Path, adapter: Path) -> list[Measured]:
    return list(
        evaluate(
            tiny_checkpoint,
            PASSAGES,
            device=torch.device("cpu"),
            dtype="float32",
            adapter=adapter,
            max_len=64,
        )
    )


# --- measures --------------------------------------------------------------------------------------------------------


def test_a_model_that_knows_nothing_has_the_vocabularys_size_as_perplexity() -> None:
    log_probs = torch.zeros(5, 40).log_softmax(-1)
    quality = Quality()
    quality.add(log_probs, log_probs, torch.arange(5))
    assert math.isclose(quality.perplexity, 40, rel_tol=1e-5)
    assert (quality.num_targets, quality.agreement, quality.divergence) == (5, 1, 0)


def test_the_measures_are_what_their_names_say() -> None:
    expected = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]).log()
    log_probs = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.6, 0.2]]).log()
    quality = Quality()
    for row in range(2):  # in two parts, as a long sample comes
        quality.add(log_probs[row : row + 1], expected[row : row + 1], torch.tensor([[0], [1]][row]))
    assert math.isclose(quality.perplexity, math.exp(-(math.log(0.25) + math.log(0.6)) / 2), rel_tol=1e-6)
    assert quality.agreement == 0.5
    first = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    second = 0.2 * math.log(0.5) + 0.8 * math.log(0.8 / 0.6)
    assert math.isclose(quality.divergence, (first + second) / 2, rel_tol=1e-5)
    assert quality.worst_divergence <= max(first, second) + 1e-6


def test_what_the_other_model_excludes_costs_nothing() -> None:
    expected = torch.tensor([[1.0, 0.0]]).log()
    quality = Quality()
    quality.add(torch.tensor([[0.5, 0.5]]).log(), expected, torch.tensor([0]))
    assert math.isclose(quality.divergence, math.log(2), rel_tol=1e-6)


def test_predictions_are_those_of_each_sequence_alone(tiny_checkpoint: Path, tokenizer: Tokenizer) -> None:
    model = load_model(tiny_checkpoint)
    sequences = sequences_of(PASSAGES, tokenizer, max_len=64, max_targets=10_000)
    together = [torch.cat(parts) for parts in zip(*predictions(model, tokenizer, sequences), strict=True)]
    alone = [
        torch.cat(parts)
        for parts in zip(
            *(part for s in sequences for part in predictions(model, tokenizer, [s])), strict=True
        )
    ]
    assert torch.equal(together[1], alone[1])
    assert (together[0].exp() - alone[0].exp()).abs().max() < 1e-5
    targets = [id_ for s in sequences for id_ in s.ids[s.prompt_len :]]
    assert together[1].tolist() == targets
    assert torch.isneginf(together[0]).sum() == 0
    assert together[0].shape[1] == tokenizer.end_id


# --- the sample ------------------------------------------------------------------------------------------------------


def test_an_answer_ends_with_the_end_token_and_prose_does_not(tokenizer: Tokenizer) -> None:
    first, second, *prose = sequences_of(PASSAGES, tokenizer, max_len=64, max_targets=10_000)
    assert first.ids[: first.prompt_len] == tokenizer.build_prompt("感冒了怎么办？")
    assert first.ids[first.prompt_len :] == [*tokenizer.encode("多喝水，多休息。"), tokenizer.eos_id]
    assert second.ids[: second.prompt_len] == tokenizer.build_prompt(
        "And then?", [("I have a cold.", "Drink water.")]
    )
    assert all(sequence.ids[:2] == [tokenizer.gmask_id, tokenizer.bos_id] for sequence in prose)
    assert tokenizer.eos_id not in prose[-1].ids


def test_long_prose_becomes_several_sequences_and_loses_nothing(tokenizer: Tokenizer) -> None:
    text = "第一句话。Second sentence. " * 40
    sequences = sequences_of([Passage(text)], tokenizer, max_len=50, max_targets=10_000)
    assert len(sequences) > 3
    assert max(len(sequence.ids) for sequence in sequences) == 50
    assert [id_ for sequence in sequences for id_ in sequence.ids[2:]] == tokenizer.encode(text)


def test_no_more_tokens_are_measured_than_were_asked_for(tokenizer: Tokenizer) -> None:
    sequences = sequences_of(PASSAGES, tokenizer, max_len=64, max_targets=11)
    assert sum(sequence.num_targets for sequence in sequences) == 11


def test_a_question_that_leaves_no_room_is_left_out(tokenizer: Tokenizer) -> None:
    long = Passage("answer", "question " * 100)
    assert sequences_of([long], tokenizer, max_len=32, max_targets=100) == []


def test_the_built_in_sample_is_bilingual(tokenizer: Tokenizer) -> None:
    passages = read_passages()
    num_chinese = sum(any("\u4e00" <= character <= "\u9fff" for character in one.answer) for one in passages)
    assert 0.4 < num_chinese / len(passages) < 0.6
    assert {bool(one.query) for one in passages} == {True, False}
    assert any(one.history for one in passages)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", b'{"answer": "a"}\n{"query": "b"}\n', "line 2 is no passage"),
        ("a.jsonl", b'{"answer": 7}', "line 1 is no passage"),
        ("a.jsonl", b"[1]", "line 1 is no passage"),
        ("a.jsonl", b'{"answer": "a", "history": [["b"]]}', "line 1 is no passage"),
        ("a.jsonl", b"\n\n", "has no text"),
        ("a.txt", b"  ", "has no text"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_file_that_is_no_sample_is_named(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SampleError, match=problem) as caught:
        read_passages(tmp_path / name)
    assert name in str(caught.value)


def test_a_text_file_is_prose(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("一段文字。", encoding="utf-8")
    assert read_passages(tmp_path / "a.txt") == [Passage("一段文字。")]


# --- the forms -------------------------------------------------------------------------------------------------------


def test_fewer_bits_are_further_away(measured: list[Measured]) -> None:
    assert [(one.form, one.adapter) for one in measured] == [
        (form, name) for name in (None, "doctor") for form in FORMS
    ]
    for whole, int8, int4, int8_packed, int4_packed in (measured[:5], measured[5:]):
        assert whole.quality.agreement == 1
        assert whole.quality.divergence == 0
        assert 0 < int8.quality.divergence < int4.quality.divergence
        assert int8.quality.agreement >= int4.quality.agreement
        assert whole.weight_bytes > int8.weight_bytes > int4.weight_bytes
        # Activations in 8 bits come on top of the weights' own loss.
        assert int8.quality.divergence < int8_packed.quality.divergence < int4_packed.quality.divergence
        assert (int8_packed.weight_bytes, int4_packed.weight_bytes) == (int8.weight_bytes, int4.weight_bytes)
    assert measured[0].quality.perplexity != measured[5].quality.perplexity


def test_perplexity_is_that_of_the_networks_own_last_logits(
    tiny_checkpoint: Path, tokenizer: Tokenizer
) -> None:
    """Token by token, as generation sees them, without the offsets of a packed pass."""
    device = torch.device("cpu")
    whole, *_ = evaluate(tiny_checkpoint, PASSAGES[:1], device=device, dtype="float32")
    (sequence,) = sequences_of(PASSAGES[:1], tokenizer, max_len=64, max_targets=100)
    model = load_model(tiny_checkpoint)
    nll = 0.0
    for index in range(sequence.prompt_len, len(sequence.ids)):
        ids = sequence.ids[:index]
        with torch.inference_mode():
            logits = model(pack_sequences([ids], [tokenizer.layout(ids)]))[0, : tokenizer.end_id]
        nll -= float(logits.log_softmax(-1)[sequence.ids[index]])
    assert math.isclose(whole.quality.perplexity, math.exp(nll / sequence.num_targets), rel_tol=1e-4)


# --- the program -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # matplotlib's own
def test_it_prints_a_table_and_draws_a_picture(
    tiny_checkpoint: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("COLUMNS", "200")
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"query": "你好", "answer": "你好！很高兴见到你。"}) + "\n", encoding="utf-8")
    picture = tmp_path / "pictures" / "quality.png"
    options = [
        "--text",
        str(text),
        "--adapter",
        str(adapter),
        "--chart",
        str(picture),
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    assert program.main([str(tiny_checkpoint), *options]) == 0
    output = capsys.readouterr().out
    rows = [line.split("│")[1].strip() for line in output.splitlines() if line.startswith("│")]
    assert rows == [*FORMS, *(f"{form} + doctor" for form in FORMS)]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert 5_000 < picture.stat().st_size < 100_000


def test_without_matplotlib_it_says_what_to_do_before_it_measures(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chart.importlib.util, "find_spec", lambda _: None)
    assert program.main([str(tiny_checkpoint), "--device", "cpu"]) == 2
    assert "glmq[evaluate]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["{tmp}/nowhere"], "config.json"),
        (["{checkpoint}", "--text", "{tmp}/nowhere.txt"], "cannot be read"),
        (["{checkpoint}", "--adapter", "{tmp}"], "adapter_config.json"),
        (["{checkpoint}", "--max-len", "3", "--text", "{tmp}/long.jsonl"], "no passage"),
    ],
)
def test_what_cannot_be_used_is_one_line_of_error(
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    problem: str,
) -> None:
    (tmp_path / "long.jsonl").write_text('{"query": "a long question", "answer": "an answer"}')
    arguments = [option.format(tmp=tmp_path, checkpoint=tiny_checkpoint) for option in options]
    assert program.main([*arguments, "--no-chart", "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("glmq evaluate: ")
    assert problem in line
