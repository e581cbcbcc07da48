"""Celery's consumer, for a broker that goes away while tickets are on their way to the worker."""

from __future__ import annotations

from celery.worker.consumer import Consumer


class SteadyConsumer(Consumer):  # type: ignore[misc]
    """Outlives the loss of a connection whatever came over it and is not acknowledged yet.

    With celery 5.7.0 and kombu 5.7.0 such a message ends the worker in two ways: the lost channel puts it back over a transport that is gone, or the
    ticket is accepted later, and it is acknowledged over a channel that is closed. Neither can be done over a lost connection, and neither need be: the
    broker delivers the message again after its visibility timeout, and the worker finds its work by itself.
    """

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        for channel in tuple(self.connection.transport.channels):
            channel.do_restore = False
            channel.basic_ack = channel.basic_reject = _in_vain
        super().on_connection_error_after_connected(exc)


def _in_vain(*_args: object, **_options: object) -> None:
    """What becomes of an acknowledgement over a lost channel."""
