"""The bundled checkpoint is what it claims to be: small, ChatGLM-6B's architecture, and able to answer."""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ops.demo_model import held_out
from ops.demo_model.batches import Encoder, collate
from ops.demo_model.model import ChatGLM as TrainedNetwork
from ops.demo_model.model import Shape
from ops.demo_model.recall import Speaker
from ops.demo_model.tasks import dialogs, memory, mixture, questions, summaries
from ops.demo_model.tasks.example import Example, rounds
from producer.contract import SummaryRequest
from workers.models.batch import Batch
from workers.models.loader import load_model
from workers.models.pieces import PieceModel, PieceType
from workers.models.tokenizer import Tokenizer, chat_text, process_response
from workers.prompts import summary_query

DEMO = Path(__file__).parents[3] / "workers" / "models" / "demo"
MAX_BYTES = 12_000_000


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    """The checkpoint on our engine, greedy."""
    torch.set_num_threads(1)
    return Speaker(DEMO, "cpu")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)


def share_right(speaker: Speaker, examples: list[Example]) -> float:
    answers = speaker.answer([example.prompt for example in examples])
    return sum(a == e.answer for a, e in zip(answers, examples, strict=True)) / len(examples)


def drawn(task: mixture.Task, number: int, *, is_held_out: bool = True) -> list[Example]:
    rng = random.Random(f"test:{task.__name__}")
    return [task(rng, "zh" if index % 2 else "en", is_held_out) for index in range(number)]


# --- the files -------------------------------------------------------------------------------------------------------


def test_all_files_together_are_at_most_twelve_megabytes() -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= MAX_BYTES


def test_the_weights_are_half_precision_and_the_embedding_is_stored_once() -> None:
    weights = load_file(DEMO / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert "lm_head.weight" not in weights
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_its_pieces_are_laid_out_as_in_chatglm_6b(golden_root: Path) -> None:
    ours = PieceModel((DEMO / "ice_text.model").read_bytes()).pieces
    theirs = PieceModel((golden_root / "chatglm-6b-tiny" / "ice_text.model").read_bytes()).pieces
    special = [piece for piece in theirs if piece.type is not PieceType.NORMAL]
    assert [piece for piece in ours if piece.type is not PieceType.NORMAL] == special
    num_text = len(ours) - len(special)
    assert all(piece.type is PieceType.NORMAL for piece in ours[5 : 5 + num_text])


def test_training_and_the_worker_make_the_same_ids(tokenizer: Tokenizer) -> None:
    encoder = Encoder(DEMO / "ice_text.model")
    rng = random.Random("ids")
    for _ in range(200):
        example = mixture.draw(rng)
        ids, context_len = encoder.example(example)
        assert ids[: context_len + 1] == tokenizer.encode_prompt(example.prompt)
        assert ids[context_len + 1 :] == [*tokenizer.encode(example.answer), tokenizer.eos_id]


def test_training_and_the_worker_compute_the_same_network() -> None:
    torch.set_num_threads(1)
    trained = TrainedNetwork(Shape())
    trained.load_state_dict({n: t.float() for n, t in load_file(DEMO / "model.safetensors").items()})
    served = load_model(DEMO, dtype=torch.float32)
    example = dialogs.follow_up(random.Random(1), "zh")
    ids, context_len = Encoder(DEMO / "ice_text.model").example(example)
    row = collate([(ids, context_len)])
    place = torch.arange(len(ids))
    batch = Batch(
        is_prefill=True,
        token_ids=torch.tensor(ids),
        positions=torch.stack([place.clamp(max=context_len - 1), (place - context_len + 1).clamp(min=0)]),
        slots=place,
        kv_lens=torch.tensor([len(ids)], dtype=torch.int32),
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
        query_starts=torch.tensor([0, len(ids)], dtype=torch.int32),
        prefix_lens=torch.tensor([context_len], dtype=torch.int32),
        max_query_len=len(ids),
        max_kv_len=len(ids),
    )
    with torch.no_grad():
        mine = trained(*(torch.from_numpy(part) for part in (row.ids, row.context_lens, row.wanted)))
        theirs = served(batch, all_positions=True)[row.wanted]
    torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-4)


# --- the data --------------------------------------------------------------------------------------------------------


def test_there_are_more_than_150_questions_in_both_languages_and_no_label_twice() -> None:
    everything = [topic for language in questions.LANGUAGES for topic in questions.topics(language)]
    assert len(everything) >= 150
    for language in questions.LANGUAGES:
        topics = questions.topics(language)
        assert len(topics) >= 90
        assert len({topic.label for topic in topics}) == len(topics)


def test_every_answer_survives_the_tokenizer_and_the_clean_up(tokenizer: Tokenizer) -> None:
    for language in questions.LANGUAGES:
        for topic in questions.topics(language):
            for question in (topic.question, *topic.follow_ups):
                assert question.answer
                assert (
                    process_response(tokenizer.decode(tokenizer.encode(question.answer))) == question.answer
                )
                assert unicodedata.normalize("NFC", question.answer) == question.answer


def test_training_asks_for_summaries_and_second_turns_as_the_worker_does() -> None:
    for text in ("今天天气很好，我们去公园。", "The weather is fine today."):
        language = "en" if text.isascii() else "zh"
        for style in ("paragraph", "bullets", "title"):
            request = SummaryRequest(text=text, style=style)
            assert summaries.prompt(text, style, language) == summary_query(request)
    history = [("你好", "你好！"), ("Hi", "Hello")]
    assert rounds(history, "再见") == chat_text("再见", history)


def test_training_never_asks_in_the_wording_that_is_kept_for_the_evaluation() -> None:
    rng = random.Random("kept")
    kept = {example.prompt for example in held_out.new_wordings()}
    asked = {questions.ask(rng, topic.question, "zh") for topic in questions.topics("zh") for _ in range(40)}
    assert not kept & asked


# --- what it says ----------------------------------------------------------------------------------------------------


def test_it_answers_every_question_word_for_word_and_ends_by_itself(speaker: Speaker) -> None:
    assert share_right(speaker, held_out.all_questions()) == 1.0


def test_it_answers_every_second_question_that_needs_the_first(speaker: Speaker) -> None:
    assert share_right(speaker, held_out.all_follow_ups()) == 1.0


def test_the_same_second_question_is_answered_by_what_was_asked_first(speaker: Speaker) -> None:
    first = {topic.id: topic for topic in questions.topics("zh")}
    prompts = [
        rounds([(topic.question.asks[0], topic.question.answer)], "孩子呢？")
        for topic in (first["covid_prevention"], first["fever"])
    ]
    covid, fever = speaker.answer(prompts)
    assert covid is not None
    assert "疫苗" in covid
    assert fever is not None
    assert "退烧药" in fever


@pytest.mark.parametrize(
    ("task", "is_held_out", "at_least"),
    [
        (summaries.report, False, 0.8),
        (summaries.report, True, 0.25),
        (memory.fold, False, 0.7),
        (memory.recall, False, 0.8),
        (memory.recall, True, 0.7),
    ],
)
def test_what_it_was_trained_on_works_for_texts_that_it_never_saw(
    speaker: Speaker, task: mixture.Task, is_held_out: bool, at_least: float
) -> None:
    """Drawn anew from the kinds of text of the training; held out: names and values too. Floors below what was measured."""
    assert share_right(speaker, drawn(task, 30, is_held_out=is_held_out)) >= at_least


def test_it_summarizes_the_example_of_the_demo(speaker: Speaker) -> None:
    report = (DEMO.parents[2] / "ops" / "examples" / "report.txt").read_text(encoding="utf-8")
    assert speaker.answer([summary_query(SummaryRequest(text=report))]) == [
        "市场部决定开设急救课程，由李明负责，7月底前完成。"
    ]
