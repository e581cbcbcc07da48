"""One Celery worker = one GPU = one engine."""
