"""The composition root of a worker: every part is built and wired here, the engine is started and, if it dies, started again.

Celery sees it as the one who takes the pool's tickets.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from celery import Celery
from redis.exceptions import RedisError

from producer.contract import GlmqError, InvalidSetting
from producer.contract.control import AdapterCommand, Reply
from producer.contract.keys import REPLY_SECONDS
from producer.contract.latencies import encode_counts
from producer.embedded import find_server
from producer.ledger import Ledger, calls, connect
from workers.adapters import ServedAdapters
from workers.app import create_app
from workers.backlog import BacklogReader
from workers.claims import Claims
from workers.control import Control
from workers.engine.client import ENGINE_MODULE, EngineClient, EngineDied
from workers.engine.config import EngineConfig
from workers.engine.detokenizer import StreamDetokenizer
from workers.engine.messages import Abort, AdaptersChanged, Generate, Ready, Refused, Step
from workers.exporter import PORTS_TO_TRY, Exporter, PortTaken
from workers.folding import Folding
from workers.foreground import keep_log, run_celery
from workers.gpu import Gpu, GpuReading
from workers.leases import Leases
from workers.logs import FORMS, LEVELS, get_logger, set_up
from workers.metrics import Metrics, WorkerState
from workers.models.config import CheckpointError
from workers.models.tokenizer import Tokenizer
from workers.pool import StartFailed, Ticket
from workers.prompts import Prompts
from workers.publisher import Publisher
from workers.running import RELEASED, RunningRequest, RunningRequests
from workers.settings import (
    ACTIVATIONS,
    BACKENDS,
    CACHE_DTYPES,
    DTYPES,
    QUANTIZE,
    Backend,
    WorkerSettings,
    named_folders,
)
from workers.tasks import carries_request
from workers.trials import Death, Trials

logger = get_logger(__name__)

ENGINES: dict[Backend, str] = {"native": ENGINE_MODULE, "reference": "workers.reference.process"}
"""What the engine process runs."""
RESTART_SECONDS = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Waits before the engine is started again, for deaths in a row; the last one repeats."""
GOOD_LIFE_SECONDS = 60.0
"""An engine that was ready for so long does not belong to the row."""
CPU_PREFILL_SECONDS_PER_TOKEN = 0.25
"""What a prefill may take on a CPU beyond the time in which a step must end: 6 billion parameters on two old cores."""
FLUSH_AT_STOP_SECONDS = 5.0
DEFAULT_METRICS_PORT = 9750


class Worker:
    """One engine, and everything that lets it answer requests from the queue.

    Raises GlmqError when Redis cannot be found, CheckpointError when the checkpoint's small files are not in order.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.redis_url = find_server(settings.queue)
        self.name = settings.worker_id
        self._tokenizer = Tokenizer.from_folder(settings.checkpoint)
        keys = settings.queue.keys
        timeout = settings.queue.redis_timeout_seconds
        self._running = RunningRequests()
        self._metrics = Metrics(
            model=settings.model,
            engine=str(settings.engine_index),
            namespace=settings.queue.namespace,
            queue_name=keys.celery_queue(settings.model),
        )
        self._publisher = Publisher(
            # A retry inside redis-py would hide that Redis is away, and hold up everybody's tokens.
            Ledger.at(self.redis_url, keys, timeout_seconds=1.0, retries=0),
            self._running,
            self.name,
            abort=self._abort,
            on_gone=self._on_gone,
            flush_seconds=settings.flush_seconds,
            metrics=self._metrics,
            log_text=settings.log_text,
            on_kept=self._on_kept,
            max_attempts=settings.max_attempts,
        )
        self._claims = Claims(
            Ledger.at(self.redis_url, keys, timeout_seconds=timeout, retries=0),
            self._running,
            self._publisher,
            settings,
            generate=self._generate,
            new_detokenizer=self._new_detokenizer,
            end_id=self._tokenizer.eos_id,
            metrics=self._metrics,
        )
        self._leases = Leases(
            Ledger.at(self.redis_url, keys, timeout_seconds=1.0, retries=0),
            self._running,
            self._publisher,
            self.name,
            lease_seconds=settings.lease_seconds,
            about=self._about,
            is_stuck=self._is_stuck,
            on_stuck=self._on_stuck,
            on_reaped=self._claims.look,
            max_attempts=settings.max_attempts,
            metrics=self._metrics,
        )
        self._trials = Trials(
            self._running, self._publisher, resume=self._claims.resume, on_done=self._open_claims
        )
        self._folding = Folding(
            Ledger.at(self.redis_url, keys, timeout_seconds=timeout),
            model=settings.model,
            retention_seconds=settings.queue.retention_seconds,
            on_queued=self._claims.look,
        )
        self._control = Control(
            connect(self.redis_url, timeout_seconds=2.0, retries=0),
            keys.control(self.name),
            self._on_cancel,
            self._on_adapter_command,
            self._claims.look,
        )
        self._adapters = ServedAdapters(self.name, dict(settings.adapters), settings.adapters_dir)
        self._engine: EngineClient | None = None
        self._ready: Ready | None = None
        self._step = Step([], [], [])
        """The engine's last one."""
        self._gpu: Gpu | None = None
        self._backlog = BacklogReader(
            Ledger.at(self.redis_url, keys, timeout_seconds=1.0, retries=0),
            settings.queue.namespace,
            settings.model,
        )
        self._metrics.watch(self._state)
        self._metrics.watch_backlog(self._backlog.read)
        self._metrics.watch_gpu(self._read_gpu)
        self._exporter = _exporter(settings, self._metrics, self._health)
        self._prompts: Prompts | None = None
        self._failure: str | None = None
        self._stuck_engine: EngineClient | None = None
        self._last_progress = time.monotonic()
        self._started_at = time.time()
        self._ready_since = 0.0
        self._version = _version()
        self._num_restarts = 0
        self._hurry = threading.Event()
        self._is_stopping = threading.Event()
        self._state_changed = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="engine", daemon=True)

    # --- as the pool's ticket taker -----------------------------------------------------------------------------------

    def start(self, check_interrupted: Callable[[], None]) -> None:
        """Load the model, then begin to claim. Raises StartFailed, and what `check_interrupted` raises."""
        self._warn_of_redis()
        self._publisher.start()
        self._folding.start()
        self._leases.start()
        self._control.start()
        self._supervisor.start()
        try:
            while self._ready is None:
                check_interrupted()
                if self._failure is not None:
                    raise StartFailed(self._failure)
                self._state_changed.wait(0.1)
        except BaseException:
            self._hurry.set()
            self.stop()
            raise
        self._claims.start()

    def _warn_of_redis(self) -> None:
        """Settings of the server with which accepted requests can be lost. That it cannot be asked is said elsewhere."""
        with connect(self.redis_url, timeout_seconds=2.0, retries=0) as connection:
            try:
                info: Any = connection.info()
            except RedisError as error:
                logger.debug("Redis does not say how it is set: %s", error)
                return
        for problem in redis_problems(info):
            logger.warning("Redis: %s", problem)

    def take(self, ticket: Ticket) -> None:
        self._claims.take(ticket)

    def withdraw(self, ticket: Ticket) -> None:
        """Cancel, through the ledger, what the ticket carries or holds a slot for."""
        running = self._running.of_ticket(ticket)
        if running is not None:
            request_id = running.request_id
        elif carries_request(ticket.task_name):
            request_id = ticket.task_id
        else:
            return
        threading.Thread(target=self._cancel, args=(request_id,), name="cancel", daemon=True).start()

    def resize(self, slots: int) -> None:
        self._claims.resize(slots)

    def drain(self) -> None:
        if self._claims.is_draining:
            logger.info("stopping now: running requests are released")
            self._hurry.set()
        else:
            logger.info("draining: %d requests are running", len(self._running))
            self._claims.drain()

    def stop(self) -> None:
        self._claims.drain()
        if not self._wait_until_idle(self.settings.grace_seconds):
            logger.info("%d requests are released to other workers", len(self._running))
        self._release_all()
        self._is_stopping.set()
        self._claims.stop()
        self._control.stop()
        self._leases.stop()
        self._publisher.stop(FLUSH_AT_STOP_SECONDS)
        self._folding.stop()
        if self._exporter is not None:
            self._exporter.stop()
        if self._engine is not None:
            # It has nothing to lose, and is deaf while it loads: an ordinary exit would take seconds.
            self._engine.kill()
            self._engine.close()
        logger.info("stopped")

    def _wait_until_idle(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while len(self._running):
            if time.monotonic() > deadline or self._hurry.is_set():
                return False
            time.sleep(0.02)
        return True

    def _release_all(self) -> None:
        deadline = time.monotonic() + FLUSH_AT_STOP_SECONDS
        while len(self._running) and time.monotonic() < deadline:
            # More than once: one that was lost with its engine a moment ago may just be kept.
            for running in self._running:
                self._publisher.end(running, RELEASED)
            time.sleep(0.01)

    # --- the engine ---------------------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        """Run the engine; when it dies, see to its requests and start it again."""
        num_in_a_row = 0
        for life in range(sys.maxsize):
            death = self._run_engine(is_first=life == 0)
            if self._is_stopping.is_set():
                return
            was_ready, self._ready = self._ready is not None, None
            self._claims.close()
            self._failure = death.cause
            for command_id, reply in self._adapters.give_up():
                self._reply(command_id, reply)
            if not was_ready and life == 0:
                # The operator's mistake rather than bad luck: a restart would not help.
                self._state_changed.set()
                return
            num_lost = self._trials.on_death(death)
            self._num_restarts += 1
            self._metrics.engine_restarts.inc()
            if was_ready and time.monotonic() - self._ready_since > GOOD_LIFE_SECONDS:
                num_in_a_row = 0
            pause = RESTART_SECONDS[min(num_in_a_row, len(RESTART_SECONDS) - 1)]
            num_in_a_row += 1
            logger.error(
                "the engine died",
                reason=death.cause,
                requests=num_lost,
                suspects=self._trials.num_left,
                restart_in_seconds=pause,
            )
            if self._is_stopping.wait(pause):
                return

    def _run_engine(self, *, is_first: bool) -> Death:
        """One life of the engine process."""
        self._failure = None
        try:
            config = engine_config(self.settings, self._adapters, is_first=is_first)
            engine = self._engine = EngineClient(config, module=ENGINES[self.settings.backend])
        except ValueError as error:
            # A setting that only the engine can judge.
            return Death(str(error))
        try:
            for message in engine.messages():
                self._last_progress = time.monotonic()
                match message:
                    case Step():
                        self._metrics.on_preemptions(message.num_preemptions - self._step.num_preemptions)
                        self._step = message
                        self._publisher.on_step(message)
                        self._trials.on_step()
                    case Ready():
                        self._on_ready(message)
                    case Refused():
                        self._publisher.on_refused(message)
                    case AdaptersChanged():
                        self._on_adapters_changed(message)
        except EngineDied as error:
            if engine is self._stuck_engine:
                cause = f"no step ended for {self.settings.stall_seconds:g} s"
                return Death(cause, error.prefilling)
            return Death(error.reason or error.how, error.prefilling, is_from_outside=error.is_killed)
        except Exception as error:  # the engine's output is a boundary: a new engine may do better
            logger.exception("the engine's output could not be used")
            return Death(str(error), engine.prefilling)
        finally:
            engine.close()
        return Death("it was closed")

    def _on_ready(self, ready: Ready) -> None:
        settings = self.settings
        self._ready = ready
        self._step = Step([], [], [], num_free_blocks=ready.num_blocks)
        if self._gpu is None and ready.device.startswith("cuda"):
            self._gpu = Gpu.find(settings.device)
        self._adapters.on_ready(ready)
        self._ready_since = time.monotonic()
        self._prompts = Prompts(self._tokenizer, ready.context_len, self._adapters)
        self._trials.on_ready()
        self._state_changed.set()
        logger.info(
            "ready: %s from %s",
            settings.model,
            settings.checkpoint.name,
            worker=self.name,
            device=f"{ready.device} {ready.dtype}",
            slots=self._claims.slots,
            context_tokens=ready.context_len,
            cache_tokens=ready.num_blocks * ready.block_size,
            load_seconds=round(ready.load_seconds, 1),
            queue=settings.queue.keys.celery_queue(settings.model),
            metrics="off" if self._exporter is None else f"http://{self._exporter.address}/metrics",
        )

    def _open_claims(self) -> None:
        """The engine is there for everybody."""
        if self._prompts is not None:
            self._claims.open(self._prompts)

    def _generate(self, generate: Generate) -> None:
        """Raises EngineDied."""
        if self._running.num_generating <= 1:
            # It was idle: its silence until now was no lack of progress.
            self._last_progress = time.monotonic()
        if self._engine is not None:
            if (introduction := self._adapters.introduce(generate.adapter)) is not None:
                self._engine.send(introduction)
            self._engine.send(generate)

    def _abort(self, sequence_id: int) -> None:
        # A dead engine has forgotten it anyway.
        if self._engine is not None:
            with contextlib.suppress(EngineDied):
                self._engine.send(Abort(sequence_id))

    def _is_stuck(self) -> bool:
        if self._running.num_generating == 0:
            return False
        silent_seconds = time.monotonic() - self._last_progress
        return silent_seconds > self.settings.stall_seconds + self._prefill_seconds()

    def _prefill_seconds(self) -> float:
        """How long the prefill in progress may take, if there is one. On a GPU it is a step like any other."""
        if self._engine is None or self._ready is None or not self._ready.device.startswith("cpu"):
            return 0.0
        sequences = map(self._running.of_sequence, self._engine.prefilling)
        num_tokens = sum(each.prompt_len + len(each.token_ids) for each in sequences if each is not None)
        return CPU_PREFILL_SECONDS_PER_TOKEN * num_tokens

    def _on_stuck(self) -> None:
        """It will not come back by itself. If it cannot even be killed, its leases run out."""
        if self._engine is not None:
            self._stuck_engine = self._engine
            self._engine.kill()

    # --- adapters -----------------------------------------------------------------------------------------------------

    def _on_adapter_command(self, command: AdapterCommand) -> None:
        message = self._adapters.obey(command)
        if message is None:
            return
        try:
            if self._ready is None or self._engine is None:
                raise EngineDied(None, "it is not ready")
            self._engine.send(message)
        except EngineDied:
            for command_id, reply in self._adapters.give_up(command.command_id):
                self._reply(command_id, reply)

    def _on_adapters_changed(self, changed: AdaptersChanged) -> None:
        reply = self._adapters.on_changed(changed)
        if reply is not None:
            self._reply(changed.command_id, reply)

    def _reply(self, command_id: str, reply: Reply) -> None:
        """Tell whoever gave the command, from a thread of its own: the engine's tokens do not wait for Redis."""
        threading.Thread(target=self._send_reply, args=(command_id, reply), name="reply", daemon=True).start()

    def _send_reply(self, command_id: str, reply: Reply) -> None:
        keys = self.settings.queue.keys
        if not self._is_stopping.is_set():
            # Whoever gave the command may look at what this worker says of itself next.
            self._leases.renew()
        with connect(self.redis_url, timeout_seconds=5.0) as connection:
            try:
                with connection.pipeline() as pipeline:
                    pipeline.rpush(keys.replies(command_id), reply.model_dump_json())
                    pipeline.expire(keys.replies(command_id), REPLY_SECONDS)
                    pipeline.execute()
            except RedisError as error:
                logger.warning("adapters: the reply to command %s was lost: %s", command_id, error)

    # --- requests -----------------------------------------------------------------------------------------------------

    def _new_detokenizer(self, stop: Sequence[str], emitted_ids: Sequence[int]) -> StreamDetokenizer:
        return StreamDetokenizer(self._tokenizer, stop=stop, emitted_ids=emitted_ids)

    def _on_gone(self, running: RunningRequest) -> None:
        """A request has left this worker: its slot is free."""
        self._claims.on_free_slot()
        self._trials.on_gone(running)
        if running.ticket is not None:
            running.ticket.complete()
        if running.fold is not None and running.end in ("stop", "length"):
            self._folding.submit(running.fold, running.request_id)

    def _on_kept(self, running: RunningRequest) -> None:
        self._trials.on_kept(running)

    def _on_cancel(self, request_id: str) -> None:
        running = self._running.get(request_id)
        # Not here yet, or not any more: the ledger knows, and says so with the next flush.
        if running is not None:
            self._publisher.end(running, "cancelled")

    def _cancel(self, request_id: str) -> None:
        ledger = Ledger.at(self.redis_url, self.settings.queue.keys, timeout_seconds=5.0)
        try:
            ledger.run(calls.cancel(request_id))
        except GlmqError as error:
            logger.warning("could not be cancelled: %s", error, request_id=request_id)
        finally:
            ledger.close()

    # --- what it says of itself ---------------------------------------------------------------------------------------

    def _state(self) -> WorkerState:
        """What a scrape reads, and `glmq status`."""
        ready, step, adapters = self._ready, self._step, self._adapters.about()
        running = list(self._running)
        # An idle engine makes no steps, so the last one says nothing about what was aborted since.
        num_generating = self._running.num_generating
        num_running = min(step.num_running, num_generating)
        num_blocks = max(ready.num_blocks - 1, 1) if ready else 0
        device = ready.device if ready else self.settings.device
        engine = self._engine
        return WorkerState(
            state="draining" if self._claims.is_draining else "ready" if ready else "loading",
            slots=self._claims.slots,
            num_claimed=len(running),
            num_running=num_running,
            num_waiting=num_generating - num_running,
            num_blocks=num_blocks,
            num_free_blocks=min(step.num_free_blocks, num_blocks) if num_generating else num_blocks,
            num_unpublished_tokens=sum(len(each.token_ids) - each.num_published for each in running),
            known_adapters=_names(adapters["adapters"]),
            loaded_adapters=_names(adapters["adapters_loaded"]),
            running_adapters=sorted({each.adapter for each in running if each.adapter is not None}),
            max_adapters=self.settings.max_adapters,
            is_stuck=self._is_stuck(),
            renewal_age_seconds=self._leases.renewal_age_seconds,
            load_seconds=ready.load_seconds if ready else 0.0,
            engine_pid=engine.pid if engine is not None and engine.is_alive else None,
            info={
                "worker": self.name,
                "version": self._version,
                "device": device,
                "dtype": ready.dtype if ready else self.settings.dtype,
                "backend": self.settings.backend,
            },
        )

    def _health(self) -> tuple[bool, str]:
        if self._is_stuck():
            return False, "stuck"
        if self._ready is None:
            return False, "loading"
        return True, "draining" if self._claims.is_draining else "ready"

    def _read_gpu(self) -> GpuReading | None:
        return None if self._gpu is None else self._gpu.read()

    def _about(self) -> dict[str, str | int | float]:
        """What `glmq status` and `glmq top` show."""
        state = self._state()
        return {
            "model": self.settings.model,
            "device": state.info["device"],
            "dtype": state.info["dtype"],
            "slots": state.slots,
            "running": state.num_claimed,
            "waiting": state.num_waiting,
            "kv_usage": round(state.kv_usage, 4),
            "tokens_per_second": round(self._publisher.speed.tokens_per_second, 1),
            "first_token": encode_counts(self._metrics.recent_first_token.counts()),
            "between_tokens": encode_counts(self._metrics.recent_between_tokens.counts()),
            "state": state.state,
            "restarts": self._num_restarts,
            "metrics": "" if self._exporter is None else self._exporter.address,
            **self._adapters.about(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": round(self._started_at),
        }


def _exporter(
    settings: WorkerSettings, metrics: Metrics, health: Callable[[], tuple[bool, str]]
) -> Exporter | None:
    """Serves the metrics, if they are to be served. Raises InvalidSetting."""
    if settings.metrics_port == 0:
        return None
    is_given = settings.metrics_port is not None
    port = settings.metrics_port or DEFAULT_METRICS_PORT
    try:
        return Exporter(
            metrics.registry,
            health,
            host=settings.metrics_host,
            port=port + settings.engine_index,
            num_ports=1 if is_given else PORTS_TO_TRY,
        )
    except PortTaken as error:
        raise InvalidSetting(
            "GLMQ_METRICS_PORT",
            f"{error.strerror}",
            "Give another port, or each worker of this machine its own GLMQ_WORKER_INDEX, or 0 to serve no metrics.",
        ) from error
    except OSError as error:
        raise InvalidSetting(
            "GLMQ_METRICS_HOST",
            f"{settings.metrics_host!r} cannot be listened at ({error.strerror or error})",
            "Use an address of this machine, such as 127.0.0.1 or 0.0.0.0.",
        ) from error


def redis_problems(info: Mapping[str, Any]) -> list[str]:
    """What is wrong with a server of which INFO says this, each with its remedy."""
    problems = []
    if (policy := info.get("maxmemory_policy", "noeviction")) != "noeviction":
        problems.append(
            f"maxmemory-policy is {policy}: when memory runs out, requests and streams would vanish. "
            "CONFIG SET maxmemory-policy noeviction, and set it in redis.conf."
        )
    if not int(info.get("aof_enabled", 1)):
        problems.append(
            "appendonly is no: a restart loses requests and answers. CONFIG SET appendonly yes, and set it in redis.conf."
        )
    return problems


def _version() -> str:
    try:
        return version("glmq")
    except PackageNotFoundError:
        return "source"


def _names(joined: str) -> list[str]:
    return [name for name in joined.split(",") if name]


def engine_config(settings: WorkerSettings, adapters: ServedAdapters, *, is_first: bool) -> EngineConfig:
    """What an engine needs of a worker's settings; `is_first`: of the worker's life. Raises ValueError."""
    loaded, known = adapters.at_start(is_first=is_first or settings.merge_adapter)
    return EngineConfig(
        checkpoint=str(settings.checkpoint),
        device=settings.device,
        dtype=settings.dtype,
        quantize=settings.quantize,
        quantize_head=settings.quantize_head,
        activations=settings.activations,
        max_num_seqs=settings.slots,
        cache_gib=settings.cache_gib,
        cache_dtype=settings.cache_dtype,
        context_len=settings.context_len,
        num_threads=settings.num_threads,
        adapters=loaded,
        known_adapters={} if settings.merge_adapter else known,
        merge_adapter=settings.merge_adapter,
        max_adapters=settings.max_adapters,
        max_adapter_rank=settings.max_adapter_rank,
        trust_remote_code=settings.trust_remote_code,
    )


# --- the program ------------------------------------------------------------------------------------------------------


def compose(settings: WorkerSettings) -> Celery:
    """A Celery app whose worker is a `Worker` with these settings."""
    worker = Worker(settings)
    return create_app(settings, worker.redis_url, worker)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m workers`: one worker in the foreground. Returns the exit code: 0 after a drain."""
    options = vars(_parser().parse_args(argv))
    # First of all with the defaults, so that a bad setting can be told.
    set_up()
    keep_log()
    try:
        options["adapters"] = named_folders(options["adapters"] or ()) or None
        settings = WorkerSettings.from_environ(**options)
        set_up(settings.log_level, settings.log_form, with_text=settings.log_text)
        app = compose(settings)
    except (GlmqError, CheckpointError) as error:
        logger.critical("cannot start: %s", error)
        return 1
    return run_celery(app)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glmq worker",
        description="Answers chat and summary requests from the queue with one engine on one device. "
        "SIGTERM or Ctrl-C drains: nothing new is taken, running requests finish within the grace time; "
        "a second one releases them at once.",
        epilog="Each option has an environment variable (GLMQ_CHECKPOINT and so on), which the option overrides. "
        "Redis is found by REDIS_URL, else it is the embedded server that `glmq up` started.",
    )
    parser.add_argument("--model", help="name under which requests ask for it (default: GLMQ_MODEL)")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="PATH", help="its folder (default: the bundled demo)"
    )
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the computation (default: auto)")
    parser.add_argument(
        "--quantize",
        choices=QUANTIZE,
        help="linear layers of an fp16 checkpoint to int8, int4 or (GPU) fp8 while loading (faster: glmq quantize, once)",
    )
    parser.add_argument(
        "--quantize-head", action="store_true", default=None, help="the head to int8 while loading"
    )
    parser.add_argument(
        "--activations",
        choices=ACTIVATIONS,
        help="of quantized layers on a CPU: int8 (fast), full (exact); auto: int8",
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        help="native, or reference: the checkpoint's own code on transformers, one request at a time",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        default=None,
        help="let the reference backend run the Python files of the checkpoint's folder",
    )
    parser.add_argument("--slots", type=int, help="requests answered at the same time (default: 64)")
    parser.add_argument(
        "--context", type=int, dest="context_len", metavar="TOKENS", help="prompt and answer together"
    )
    parser.add_argument("--cache-gib", type=float, metavar="GIB", help="memory for the KV cache")
    parser.add_argument(
        "--cache-dtype", choices=CACHE_DTYPES, help="int8: twice the tokens in the KV cache (GPU only)"
    )
    parser.add_argument(
        "--adapter",
        action="append",
        dest="adapters",
        metavar="NAME=PATH",
        help="a LoRA adapter (PEFT's folder), loaded at the start, for requests that name it; may be repeated",
    )
    parser.add_argument(
        "--adapters-dir",
        type=Path,
        metavar="PATH",
        help="each folder in it is an adapter of that name, loaded when a request first names it",
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        default=None,
        dest="merge_adapter",
        help="add the one --adapter to the weights: every request is answered with it",
    )
    parser.add_argument(
        "--max-adapters",
        type=int,
        metavar="N",
        help="adapters in memory at the same time; the least recently used one makes room (default: 8)",
    )
    parser.add_argument(
        "--max-adapter-rank", type=int, metavar="R", help="refuse adapters of a larger rank (default: 64)"
    )
    parser.add_argument(
        "--threads", type=int, dest="num_threads", metavar="N", help="CPU threads of the engine"
    )
    parser.add_argument(
        "--grace-seconds",
        type=float,
        metavar="S",
        help="how long a drain waits for running requests (default: 25)",
    )
    parser.add_argument(
        "--metrics-port",
        type=int,
        metavar="PORT",
        help="metrics are served at http://GLMQ_METRICS_HOST:PORT/metrics, PORT plus the GPU's index; 0: not at all "
        "(default: from 9750 on the first that is free, on 127.0.0.1)",
    )
    parser.add_argument("--log-level", choices=LEVELS, help="default: INFO")
    parser.add_argument(
        "--log-format", choices=FORMS, dest="log_form", help="auto: console at a terminal, else json"
    )
    return parser


def __getattr__(name: str) -> Any:
    """`celery -A workers.worker worker` finds its app here, composed from the environment when it is asked for."""
    if name == "app":
        return compose(WorkerSettings.from_environ())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
