"""A worker's settings: from the environment, overridden by options, refused by the name of their variable."""

from __future__ import annotations

from pathlib import Path

import pytest

from producer.contract import InvalidSetting
from workers.settings import WorkerSettings

REDIS = {"REDIS_URL": "redis://somewhere:6379/0"}


def test_variables_are_read_and_options_win() -> None:
    environ = {**REDIS, "GLMQ_SLOTS": "8", "GLMQ_CHECKPOINT": "/models/a", "GLMQ_LEASE_SECONDS": "4.5"}

    settings = WorkerSettings.from_environ(environ, slots=16, device=None)

    assert (settings.slots, settings.checkpoint) == (16, Path("/models/a"))
    assert (settings.lease_seconds, settings.device) == (4.5, "auto")


def test_the_model_is_the_deployment_s_unless_the_worker_has_its_own() -> None:
    environ = {**REDIS, "GLMQ_MODEL": "chatglm-fitness"}

    assert WorkerSettings.from_environ(environ).model == "chatglm-fitness"
    assert WorkerSettings.from_environ(environ, model="other").model == "other"


def test_two_workers_never_have_the_same_name() -> None:
    assert WorkerSettings.from_environ(REDIS).worker_id != WorkerSettings.from_environ(REDIS).worker_id


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("GLMQ_SLOTS", "many"),
        ("GLMQ_SLOTS", "0"),
        ("GLMQ_SLOTS", "100000"),
        ("GLMQ_DEVICE", "gpu"),
        ("GLMQ_DEVICE", "cuda:x"),
        ("GLMQ_DTYPE", "float8"),
        ("GLMQ_CONTEXT", "3"),
        ("GLMQ_THREADS", "0"),
        ("GLMQ_CACHE_GIB", "-1"),
        ("GLMQ_GRACE_SECONDS", "-1"),
        ("GLMQ_FLUSH_SECONDS", "nan"),
        ("GLMQ_LEASE_SECONDS", "0.1"),
        ("GLMQ_MODEL", "no name"),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_variable(variable: str, value: str) -> None:
    with pytest.raises(InvalidSetting) as refused:
        WorkerSettings.from_environ({**REDIS, variable: value})

    assert refused.value.name == variable
    assert variable in str(refused.value)
