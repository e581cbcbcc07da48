"""Continuous batching: waiting and running sequences; a step is schedule, forward, sample.

Knows no Celery, no Redis, no HTTP. Importing the package imports no torch; `engine` and what it uses do.
"""
