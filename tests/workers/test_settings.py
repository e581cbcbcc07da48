"""A worker's settings: from the environment, overridden by options, refused by the name of their variable."""

from __future__ import annotations

from pathlib import Path

import pytest

from producer.contract import InvalidSetting
from workers.adapters import ServedAdapters
from workers.options import parser
from workers.settings import WorkerSettings, named_folders
from workers.worker import engine_config

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
        ("GLMQ_SPECULATION", "on"),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_variable(variable: str, value: str) -> None:
    with pytest.raises(InvalidSetting) as refused:
        WorkerSettings.from_environ({**REDIS, variable: value})

    assert refused.value.name == variable
    assert variable in str(refused.value)


@pytest.mark.parametrize(
    ("variable", "argv", "expected"),
    [
        (None, [], "auto"),
        ("off", [], "off"),
        (None, ["--speculation", "off"], "off"),
        ("off", ["--speculation", "auto"], "auto"),
    ],
)
def test_speculation_reaches_the_engine_from_the_variable_and_the_option(
    variable: str | None, argv: list[str], expected: str
) -> None:
    environ = REDIS if variable is None else {**REDIS, "GLMQ_SPECULATION": variable}
    settings = WorkerSettings.from_environ(environ, **vars(parser().parse_args(argv)))

    config = engine_config(settings, ServedAdapters(settings.worker_id), is_first=True)

    assert (settings.speculation, config.speculation) == (expected, expected)


def test_adapters_are_named_folders(tmp_path: Path) -> None:
    for name in ("fitness", "law", "all"):
        (tmp_path / name).mkdir()
    environ = {
        **REDIS,
        "GLMQ_ADAPTERS": f"fitness={tmp_path}/fitness, law={tmp_path}/law,",
        "GLMQ_ADAPTERS_DIR": f"{tmp_path}/all",
        "GLMQ_MAX_ADAPTERS": "3",
        "GLMQ_MAX_ADAPTER_RANK": "16",
        "GLMQ_MERGE_ADAPTER": "off",
    }

    settings = WorkerSettings.from_environ(environ)

    assert settings.adapters == (("fitness", tmp_path / "fitness"), ("law", tmp_path / "law"))
    assert settings.adapters_dir == tmp_path / "all"
    assert (settings.max_adapters, settings.max_adapter_rank, settings.merge_adapter) == (3, 16, False)
    assert named_folders(["a=b=c"]) == (("a", Path("b=c")),)


@pytest.mark.parametrize(
    ("environ", "variable"),
    [
        ({"GLMQ_ADAPTERS": "fitness"}, "GLMQ_ADAPTERS"),
        ({"GLMQ_ADAPTERS": "fitness="}, "GLMQ_ADAPTERS"),
        ({"GLMQ_ADAPTERS": "my fitness=/"}, "GLMQ_ADAPTERS"),
        ({"GLMQ_ADAPTERS": "a=/,a=/"}, "GLMQ_ADAPTERS"),
        ({"GLMQ_ADAPTERS": "a=/no/such/folder"}, "GLMQ_ADAPTERS"),
        ({"GLMQ_ADAPTERS_DIR": "/no/such/folder"}, "GLMQ_ADAPTERS_DIR"),
        ({"GLMQ_MAX_ADAPTERS": "-1"}, "GLMQ_MAX_ADAPTERS"),
        ({"GLMQ_MAX_ADAPTERS": "1", "GLMQ_ADAPTERS": "a=/,b=/"}, "GLMQ_MAX_ADAPTERS"),
        ({"GLMQ_MAX_ADAPTER_RANK": "0"}, "GLMQ_MAX_ADAPTER_RANK"),
        ({"GLMQ_MERGE_ADAPTER": "perhaps"}, "GLMQ_MERGE_ADAPTER"),
        ({"GLMQ_MERGE_ADAPTER": "1"}, "GLMQ_MERGE_ADAPTER"),
        ({"GLMQ_MERGE_ADAPTER": "1", "GLMQ_ADAPTERS": "a=/,b=/"}, "GLMQ_MERGE_ADAPTER"),
        ({"GLMQ_MERGE_ADAPTER": "1", "GLMQ_ADAPTERS": "a=/", "GLMQ_ADAPTERS_DIR": "/"}, "GLMQ_MERGE_ADAPTER"),
    ],
)
def test_adapters_that_cannot_be_served_are_refused_by_the_name_of_their_variable(
    environ: dict[str, str], variable: str
) -> None:
    with pytest.raises(InvalidSetting) as refused:
        WorkerSettings.from_environ({**REDIS, **environ})

    assert refused.value.name == variable
