"""An engine with the native one's interface around the original's generate(): one sequence at a time, in the order they came.

Knows nothing about processes, queues or text.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from workers.engine.admission import Admission, CannotRun
from workers.engine.config import EngineConfig
from workers.engine.loading import BITS, find_device
from workers.engine.messages import FromEngine, Generate, Ready, Refused, Step
from workers.models.config import ModelConfig
from workers.models.loader import DTYPES
from workers.models.lora import AdapterError
from workers.models.tokenizer import Tokenizer
from workers.reference.adapters import ReferenceAdapters
from workers.reference.checkpoint import Reference, load_reference

_END: Final = object()


class ReferenceEngine:
    """Answers with the checkpoint's own code. Single-threaded for its caller."""

    def __init__(
        self,
        reference: Reference,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        context_len: int,
        max_adapters: int = 8,
    ) -> None:
        self._reference = reference
        self._tokenizer = tokenizer
        self.adapters = ReferenceAdapters(reference.model, max_adapters=max_adapters)
        self.context_len = context_len
        self._admission = Admission(tokenizer, vocab_size, context_len)
        self._waiting: deque[Generate] = deque()
        self._answer: Answer | None = None
        self.on_prefill: Callable[[list[int]], None] = lambda _sequence_ids: None
        """Called with a sequence before its answer begins."""

    @classmethod
    def from_config(cls, config: EngineConfig) -> ReferenceEngine:
        """Loads the checkpoint with its own code. Raises ValueError, as CheckpointError or for a setting."""
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        if config.quantize == "fp8":
            raise ValueError(
                "quantize is fp8, which the original has not. Use int8 or int4, or the native backend"
            )
        model_config = ModelConfig.from_folder(config.checkpoint)
        reference = load_reference(
            config.checkpoint,
            trust_remote_code=config.trust_remote_code,
            device=find_device(config.device),
            dtype=None if config.dtype == "auto" else DTYPES[config.dtype],
            bits=BITS[config.quantize],
        )
        engine = cls(
            reference,
            Tokenizer.from_folder(config.checkpoint, model_config),
            vocab_size=model_config.vocab_size,
            context_len=config.context_len or model_config.max_sequence_length,
            max_adapters=config.max_adapters,
        )
        for name, folder in config.known_adapters.items():
            engine.adapters.know(name, Path(folder))
        for name, folder in config.adapters.items():
            if config.merge_adapter:
                engine.adapters.merge(name, Path(folder))
            else:
                engine.adapters.know(name, Path(folder))
                engine.adapters.use(name)
        return engine

    @property
    def has_work(self) -> bool:
        return self._answer is not None or bool(self._waiting)

    def add(self, message: Generate) -> Refused | None:
        """Puts this sequence at the end of the line, or says why it cannot be run here."""
        try:
            self.adapters.check(message.adapter)
            self._admission.layout(message)
        except CannotRun as error:
            return Refused(message.sequence_id, error.code, str(error))
        self._waiting.append(message)
        return None

    def abort(self, sequence_id: int) -> None:
        """Forgets this sequence; one that runs ends after the token that it is at. An unknown id is ignored."""
        self._waiting = deque(message for message in self._waiting if message.sequence_id != sequence_id)
        if self._answer is not None and self._answer.sequence_id == sequence_id:
            self._answer.abort()
            self._answer = None

    def settle(self) -> list[FromEngine]:
        """What can be done between two answers: commands about adapters, and the adapter of the next answer."""
        news: list[FromEngine] = []
        if self._answer is None:
            news += self.adapters.settle()
        while self._answer is None and self._waiting:
            message = self._waiting[0]
            try:
                self.adapters.check(message.adapter)
                self.adapters.use(message.adapter)
                break
            except CannotRun as error:  # it was unloaded meanwhile
                news.append(Refused(message.sequence_id, error.code, str(error)))
            except AdapterError as error:
                news.append(Refused(message.sequence_id, "invalid_adapter", f"adapter: {error}"))
            self._waiting.popleft()
        return news

    def step(self) -> Step:
        """The next token of the sequence that runs. Call it only while there is work; raises what generate() raises."""
        if self._answer is None:
            message = self._waiting.popleft()
            self.on_prefill([message.sequence_id])
            self._answer = Answer(self._reference, message, self._tokenizer, self.context_len)
        answer = self._answer
        token_id = answer.next_token()
        finish_reason = answer.finish_reason(token_id)
        if finish_reason:
            answer.join()
            self._answer = None
        return Step(
            sequence_ids=[answer.sequence_id],
            token_ids=[token_id],
            finish_reasons=[finish_reason],
            num_running=int(self._answer is not None),
            num_waiting=len(self._waiting),
            num_free_blocks=int(self._answer is None),
        )

    def ready(self, load_seconds: float) -> Ready:
        """What the worker is told about this engine. Its cache holds one sequence: it is one block of that length."""
        return Ready(
            context_len=self.context_len,
            num_blocks=1,
            block_size=self.context_len,
            device=str(self._reference.device),
            dtype=str(self._reference.dtype).removeprefix("torch."),
            load_seconds=load_seconds,
            adapters=self.adapters.names,
            loaded_adapters=self.adapters.names,
        )


class Answer:
    """One answer in the making. generate() runs in a thread of its own and hands over each token.

    The same call as the model card's chat() makes, with the same processors; `torch.manual_seed` is given the request's
    seed, so on one device it says what chat() would say after that call.
    """

    def __init__(
        self, reference: Reference, message: Generate, tokenizer: Tokenizer, context_len: int
    ) -> None:
        self.sequence_id = message.sequence_id
        self._reference = reference
        self._message = message
        self._tokenizer = tokenizer
        sampling = message.sampling
        num_before = len(message.prompt_ids) + len(message.emitted_ids)
        self._num_left = min(sampling.max_new_tokens - len(message.emitted_ids), context_len - num_before)
        self._tokens: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._is_aborted = False
        self._thread = threading.Thread(target=self._run, name="generate", daemon=True)
        self._thread.start()

    def next_token(self) -> int:
        """Waits for the next token. Raises what generate() raised."""
        item = self._tokens.get()
        if isinstance(item, BaseException):
            raise item
        if item is _END:
            raise RuntimeError("generate() ended before the end token and before max_new_tokens")
        self._num_left -= 1
        return int(item)

    def finish_reason(self, token_id: int) -> str:
        if token_id == self._tokenizer.eos_id:
            return "stop"
        return "length" if self._num_left <= 0 else ""

    def abort(self) -> None:
        """Ends generate() after the token that it is at."""
        self._is_aborted = True
        self.join()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            self._generate()
            self._tokens.put(_END)
        except BaseException as error:  # noqa: BLE001  (it is raised where the token is waited for)
            self._tokens.put(error)

    def _generate(self) -> None:
        message, sampling, model = self._message, self._message.sampling, self._reference.model
        self._seed(sampling.seed, len(message.emitted_ids))
        ids = [*message.prompt_ids, *message.emitted_ids]
        warpers = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
        model.generate(
            input_ids=torch.tensor([ids], device=self._reference.device),
            do_sample=sampling.temperature > 0,
            num_beams=1,
            max_new_tokens=self._num_left,
            min_new_tokens=max(sampling.min_new_tokens - len(message.emitted_ids), 0) or None,
            repetition_penalty=sampling.repetition_penalty,
            logits_processor=self._processors(),
            stopping_criteria=self._stopping_criteria(),
            streamer=_Streamer(self._tokens),
            **(warpers if sampling.temperature > 0 else {}),
        )

    def _seed(self, seed: int, num_drawn: int) -> None:
        """The state of torch's generator after so many tokens, so that a continuation draws what would have come next."""
        torch.manual_seed(seed)
        model = self._reference.model
        if self._message.sampling.temperature > 0 and num_drawn:
            flat = torch.ones(1, _num_scores(model), device=self._reference.device)
            for _ in range(num_drawn):
                torch.multinomial(flat, 1)

    def _processors(self) -> Any:
        import transformers  # noqa: PLC0415  (an extra)

        processors = transformers.LogitsProcessorList()
        if bias := self._message.sampling.logit_bias:
            processors.append(_LogitBias(bias))
        # chat() adds it behind the caller's own ones.
        code = sys.modules[type(self._reference.model).__module__]
        if (invalid_scores := getattr(code, "InvalidScoreLogitsProcessor", None)) is not None:
            processors.append(invalid_scores())
        processors.append(_OnlyPieces(self._tokenizer.first_id, self._tokenizer.end_id))
        return processors

    def _stopping_criteria(self) -> Any:
        import transformers  # noqa: PLC0415  (an extra)

        return transformers.StoppingCriteriaList([lambda *_, **__: self._is_aborted])


class _Streamer:
    """transformers' interface for tokens as they come; the prompt comes first."""

    def __init__(self, tokens: queue.SimpleQueue[Any]) -> None:
        self._tokens = tokens
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        for token_id in value.flatten().tolist():
            self._tokens.put(token_id)

    def end(self) -> None:
        pass


class _LogitBias:
    """transformers' interface for what changes scores."""

    def __init__(self, bias: dict[int, float]) -> None:
        self._bias = bias

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for token_id, value in self._bias.items():
            if token_id < scores.shape[-1]:
                scores[:, token_id] += value
        return scores


class _OnlyPieces:
    """Hides the rows of the embedding that no piece has: the original's decode() stumbles over them."""

    def __init__(self, first_id: int, end_id: int) -> None:
        self._first_id, self._end_id = first_id, end_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, : self._first_id] = -torch.inf
        scores[:, self._end_id :] = -torch.inf
        return scores


def _num_scores(model: Any) -> int:
    """Columns of the scores that tokens are drawn from."""
    config = model.config
    return int(getattr(config, "padded_vocab_size", None) or config.vocab_size)
