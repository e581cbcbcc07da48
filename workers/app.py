"""The Celery app of a worker: the deployment's shared settings, the engine's pool, this model's queue.

Configuration only. Who takes the tickets is put in by the composition root.
"""

from __future__ import annotations

from celery import Celery

from producer.celery_settings import celery_settings
from workers.pool import TicketTaker
from workers.settings import WorkerSettings
from workers.tasks import register_tasks


def create_app(settings: WorkerSettings, redis_url: str, ticket_taker: TicketTaker) -> Celery:
    """An app whose worker hands every ticket of `settings.model` to `ticket_taker`."""
    app = Celery("glmq", set_as_current=False)
    app.conf.update(celery_settings(redis_url, settings.queue.namespace))
    app.conf.update(
        worker_pool="workers.pool:EnginePool",
        worker_consumer="workers.consumer:SteadyConsumer",
        worker_concurrency=settings.slots,
        task_default_queue=settings.queue.keys.celery_queue(settings.model),
        # The log is ours.
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
    )
    register_tasks(app)
    app.ticket_taker = ticket_taker
    return app
