"""What watching a worker costs it: `python -m ops.bench.metrics`.

CPU time of the thread that does it, so that a busy machine changes little. The roof is a step's budget: 256 sequences at 50 steps a second.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable

from prometheus_client import Histogram, generate_latest

from producer.contract import Finished
from workers import logs
from workers.metrics import MAX_TENANTS, Metrics, WorkerState
from workers.running import RunningRequest

SEQUENCES, STEPS_PER_SECOND = 256, 50


def microseconds(call: Callable[[], object], times: int) -> float:
    """Of CPU, the best of five rounds."""
    rounds = []
    for _ in range(5):
        begin = time.thread_time()
        for _ in range(times):
            call()
        rounds.append((time.thread_time() - begin) / times)
    return min(rounds) * 1e6


def running(tenant: str = "default") -> RunningRequest:
    request = RunningRequest("r" * 32, 1, None, 0.1, tenant=tenant, kind="chat", prompt_len=100)
    for number in range(50):
        request.add(65, "A", request.claimed + number / 50)
    return request


def main() -> None:
    metrics = Metrics(model="chatglm-6b")
    metrics.watch(WorkerState)
    per_token = Histogram("per_token", "", registry=None)

    step = microseconds(lambda: metrics.on_step(1.02, [], {1.0: SEQUENCES}, num_sequences=SEQUENCES), 2000)
    naive = microseconds(lambda: per_token.observe(0.02), 20_000) * SEQUENCES
    print(f"one step of {SEQUENCES} sequences             {step:8.1f} µs   {share(step * STEPS_PER_SECOND)}")
    print(f"  the same, observed token by token      {naive:8.1f} µs   {share(naive * STEPS_PER_SECOND)}")

    request, end = running(), Finished(reason="stop", text="A" * 50)
    print(
        f"the end of a request                     {microseconds(lambda: metrics.on_end(request, end), 2000):8.1f} µs"
    )
    print(
        f"a flush                                  {microseconds(lambda: metrics.on_flush(0.002, 256), 2000):8.1f} µs"
    )

    logs.set_up(stream=io.StringIO(), form="json")
    logger = logs.get_logger("workers.bench")
    line = microseconds(
        lambda: logger.info(
            "answered",
            request_id="r" * 32,
            attempt=1,
            kind="chat",
            reason="stop",
            tokens=50,
            total_seconds=1.234,
        ),
        500,
    )
    print(f"a line of the log                        {line:8.1f} µs")

    few = microseconds(lambda: generate_latest(metrics.registry), 20)
    for number in range(3 * MAX_TENANTS):
        for reason in ("stop", "length", "cancelled"):
            metrics.on_end(running(f"tenant-{number}"), Finished(reason=reason, text="A"))  # type: ignore[arg-type]
    many = microseconds(lambda: generate_latest(metrics.registry), 20)
    size = len(generate_latest(metrics.registry)) / 1000
    print(f"a scrape, one tenant                     {few / 1000:8.1f} ms   {share(few / 5)} at one in 5 s")
    print(
        f"a scrape, {3 * MAX_TENANTS} tenants ({size:.0f} kB)            {many / 1000:8.1f} ms   {share(many / 5)}"
    )


def share(microseconds_per_second: float) -> str:
    return f"{microseconds_per_second / 1e6:7.2%} of a core"


if __name__ == "__main__":
    main()
