"""Settings from the environment: defaults, and what is said about a bad value."""

from __future__ import annotations

from pathlib import Path

import pytest

from producer.contract import InvalidSetting
from producer.settings import Settings


def test_an_empty_environment_gives_the_documented_defaults() -> None:
    settings = Settings.from_environ({"HOME": "/home/someone"})
    assert settings.redis_url is None
    assert (settings.namespace, settings.model) == ("glmq", "chatglm-6b")
    assert settings.state_dir == Path("/home/someone/.local/state/glmq")
    assert (settings.retention_seconds, settings.idempotency_seconds) == (600, 86_400)


def test_every_variable_is_read() -> None:
    settings = Settings.from_environ(
        {
            "REDIS_URL": "rediss://:pw@cache:6380/2",
            "GLMQ_NAMESPACE": "clinic",
            "GLMQ_MODEL": "THUDM/chatglm2-6b",
            "GLMQ_STATE_DIR": "/var/lib/glmq",
            "GLMQ_RETENTION_SECONDS": "60.5",
            "GLMQ_IDEMPOTENCY_SECONDS": "7",
            "GLMQ_CONVERSATION_SECONDS": "3600",
            "GLMQ_REDIS_TIMEOUT_SECONDS": "1",
            "GLMQ_RECONNECT_SECONDS": "2",
        }
    )
    assert settings == Settings(
        redis_url="rediss://:pw@cache:6380/2",
        namespace="clinic",
        model="THUDM/chatglm2-6b",
        state_dir=Path("/var/lib/glmq"),
        retention_seconds=60.5,
        idempotency_seconds=7,
        conversation_seconds=3600,
        redis_timeout_seconds=1,
        reconnect_seconds=2,
    )
    assert settings.keys.request("r") == "{clinic}:request:r"


def test_the_state_directory_follows_xdg() -> None:
    assert Settings.from_environ({"XDG_STATE_HOME": "/state"}).state_dir == Path("/state/glmq")


def test_an_empty_variable_is_an_unset_one() -> None:
    settings = Settings.from_environ({"HOME": "/h", "REDIS_URL": "", "GLMQ_MODEL": "", "GLMQ_NAMESPACE": ""})
    assert settings == Settings(state_dir=Path("/h/.local/state/glmq"))


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("REDIS_URL", "localhost:6379", "Use redis://host:port/db"),
        ("REDIS_URL", "http://cache", "Use redis://host:port/db"),
        ("GLMQ_NAMESPACE", "a:b", "letters, digits"),
        ("GLMQ_NAMESPACE", "{a}", "letters, digits"),
        ("GLMQ_NAMESPACE", "x" * 129, "at most 128"),
        ("GLMQ_MODEL", "chat glm", "letters, digits"),
        ("GLMQ_RETENTION_SECONDS", "ten minutes", "Give seconds, such as 600"),
        ("GLMQ_RETENTION_SECONDS", "0", "Use 0.001 to"),
        ("GLMQ_RETENTION_SECONDS", "nan", "Use 0.001 to"),
        ("GLMQ_RETENTION_SECONDS", "inf", "Use 0.001 to"),
        ("GLMQ_IDEMPOTENCY_SECONDS", "-1", "Use 0.001 to"),
        ("GLMQ_CONVERSATION_SECONDS", "0", "Use 0.001 to"),
        ("GLMQ_REDIS_TIMEOUT_SECONDS", "x", "Give seconds"),
        ("GLMQ_RECONNECT_SECONDS", "1e12", "Use 0.001 to"),
        ("GLMQ_MAX_QUEUED", "many", "Give a number"),
        ("GLMQ_MAX_QUEUED_TOKENS", "-1", "Use 0 (none) or more"),
        ("GLMQ_TENANT_MAX_QUEUED", "1.5", "Give a number"),
        ("GLMQ_TENANT_MAX_QUEUED_TOKENS", "-5", "Use 0 (none) or more"),
        ("GLMQ_TENANT_MAX_RUNNING", "-1", "Use 0 (none) or more"),
        ("GLMQ_AGEING_SECONDS", "0", "Use 0.001 to"),
        ("GLMQ_AGEING_CLAIMS", "x", "Give a number"),
    ],
)
def test_a_bad_value_names_its_variable_and_the_remedy(name: str, value: str, remedy: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        Settings.from_environ({"HOME": "/h", name: value})
    assert caught.value.name == name
    assert str(caught.value).startswith(f"{name}: ")
    assert remedy in str(caught.value)


def test_a_password_in_a_bad_url_is_not_shown() -> None:
    with pytest.raises(InvalidSetting) as caught:
        Settings.from_environ({"HOME": "/h", "REDIS_URL": "rdis://:s3cret@host/0"})
    assert "s3cret" not in str(caught.value)
