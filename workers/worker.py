"""The composition root of a worker: every part is built and wired here.

Celery sees it as the one who takes the pool's tickets.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
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
from workers.engine.client import ENGINE_MODULE, EngineDied
from workers.engine.config import EngineConfig
from workers.engine.detokenizer import StreamDetokenizer
from workers.engine.messages import Abort, AdaptersChanged, FromEngine, Generate, Ready, Refused, Step
from workers.exporter import PORTS_TO_TRY, Exporter, PortTaken
from workers.folding import Folding
from workers.foreground import keep_log, run_celery
from workers.gpu import Gpu, GpuReading
from workers.leases import Leases
from workers.logs import get_logger, set_up
from workers.metrics import Metrics, WorkerState
from workers.models.config import CheckpointError
from workers.models.tokenizer import Tokenizer
from workers.options import parser
from workers.pool import Ticket
from workers.prompts import Prompts
from workers.publisher import Publisher
from workers.running import RELEASED, RunningRequest, RunningRequests
from workers.settings import Backend, WorkerSettings, named_folders
from workers.supervisor import Death, Supervisor, Toll
from workers.tasks import carries_request
from workers.trials import Trials

logger = get_logger(__name__)

ENGINES: dict[Backend, str] = {"native": ENGINE_MODULE, "reference": "workers.reference.process"}
"""What the engine process runs."""
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
        self._supervisor = Supervisor(
            ENGINES[settings.backend],
            stall_seconds=settings.stall_seconds,
            load_seconds=settings.load_seconds,
            new_config=self._engine_config,
            num_generating=lambda: self._running.num_generating,
            num_prefill_tokens=self._num_prefill_tokens,
            on_message=self._on_message,
            on_down=self._on_down,
            on_death=self._on_death,
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
            is_stuck=self._supervisor.is_stuck,
            on_stuck=self._supervisor.kill_stuck,
            on_reaped=self._claims.look,
            max_attempts=settings.max_attempts,
            metrics=self._metrics,
        )
        self._trials = Trials(
            self._running,
            self._publisher,
            resume=self._claims.resume,
            on_done=self._open_claims,
            others_serve=self._others_serve,
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
        self._started_at = time.time()
        self._version = _version()
        self._hurry = threading.Event()
        self._is_stopping = False

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
            self._supervisor.wait_until_ready(check_interrupted)
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
        self._is_stopping = True
        self._supervisor.expect_end()
        self._claims.stop()
        self._control.stop()
        self._leases.stop()
        self._publisher.stop(FLUSH_AT_STOP_SECONDS)
        self._folding.stop()
        if self._exporter is not None:
            self._exporter.stop()
        self._supervisor.stop()
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

    def _engine_config(self, is_first: bool) -> EngineConfig:
        return engine_config(self.settings, self._adapters, is_first=is_first)

    def _on_message(self, message: FromEngine) -> None:
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

    def _on_down(self) -> None:
        self._claims.close()
        for command_id, reply in self._adapters.give_up():
            self._reply(command_id, reply)

    def _on_death(self, death: Death) -> Toll:
        self._metrics.engine_restarts.inc()
        num_lost = self._trials.on_death(death)
        return Toll(num_lost, self._trials.num_left)

    def _on_ready(self, ready: Ready) -> None:
        settings = self.settings
        self._step = Step([], [], [], num_free_blocks=ready.num_blocks)
        if self._gpu is None and ready.device.startswith("cuda"):
            self._gpu = Gpu.find(settings.device)
        self._adapters.on_ready(ready)
        self._prompts = Prompts(self._tokenizer, ready.context_len, self._adapters)
        self._trials.on_ready()
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

    def _others_serve(self) -> bool:
        """Whether another worker of this model says that it is ready; no, when Redis does not answer."""
        model = self.settings.model
        ledger = Ledger.at(self.redis_url, self.settings.queue.keys, timeout_seconds=1.0, retries=0)
        try:
            return ledger.run(calls.overview(model)).is_served(model, besides=self.name)
        except (GlmqError, RedisError):
            return False
        finally:
            ledger.close()

    def _open_claims(self) -> None:
        """The engine is there for everybody."""
        if self._prompts is not None:
            self._claims.open(self._prompts)

    def _generate(self, generate: Generate) -> None:
        """Raises EngineDied."""
        if (introduction := self._adapters.introduce(generate.adapter)) is not None:
            self._supervisor.send(introduction)
        self._supervisor.generate(generate)

    def _abort(self, sequence_id: int) -> None:
        # A dead engine has forgotten it anyway.
        with contextlib.suppress(EngineDied):
            self._supervisor.send(Abort(sequence_id))

    def _num_prefill_tokens(self, sequence_ids: frozenset[int]) -> int:
        sequences = map(self._running.of_sequence, sequence_ids)
        return sum(each.prompt_len + len(each.token_ids) for each in sequences if each is not None)

    # --- adapters -----------------------------------------------------------------------------------------------------

    def _on_adapter_command(self, command: AdapterCommand) -> None:
        message = self._adapters.obey(command)
        if message is None:
            return
        try:
            if self._supervisor.ready is None:
                raise EngineDied(None, "it is not ready")
            self._supervisor.send(message)
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
        if not self._is_stopping:
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
        ready, step, adapters = self._supervisor.ready, self._step, self._adapters.about()
        running = list(self._running)
        # An idle engine makes no steps, so the last one says nothing about what was aborted since.
        num_generating = self._running.num_generating
        num_running = min(step.num_running, num_generating)
        num_blocks = max(ready.num_blocks - 1, 1) if ready else 0
        device = ready.device if ready else self.settings.device
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
            is_stuck=self._supervisor.is_stuck(),
            renewal_age_seconds=self._leases.renewal_age_seconds,
            load_seconds=ready.load_seconds if ready else 0.0,
            engine_pid=self._supervisor.pid,
            info={
                "worker": self.name,
                "version": self._version,
                "device": device,
                "dtype": ready.dtype if ready else self.settings.dtype,
                "backend": self.settings.backend,
            },
        )

    def _health(self) -> tuple[bool, str]:
        if self._supervisor.is_stuck():
            return False, "stuck"
        if self._supervisor.ready is None:
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
            "restarts": self._supervisor.num_restarts,
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
        speculation=settings.speculation,
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
    options = vars(parser().parse_args(argv))
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


def __getattr__(name: str) -> Any:
    """`celery -A workers.worker worker` finds its app here, composed from the environment when it is asked for."""
    if name == "app":
        return compose(WorkerSettings.from_environ())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
