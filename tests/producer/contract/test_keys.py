"""Names of keys: one slot of a cluster, and no two that meet."""

from __future__ import annotations

from redis.crc import key_slot

from producer.contract.keys import Keys


def test_all_keys_of_a_deployment_share_one_slot() -> None:
    keys = Keys("shop")
    names = [
        keys.prefix,
        keys.request("r"),
        keys.events("r"),
        keys.queue("m"),
        keys.leases,
        keys.running("w"),
        keys.idempotency("t", "a}b{c"),
        keys.worker("w"),
        keys.workers,
        keys.push("p"),
        keys.control("w"),
    ]
    assert {key_slot(name.encode()) for name in names} == {key_slot(b"shop")}
    assert len(set(names)) == len(names)


def test_a_colon_in_an_idempotency_key_cannot_reach_another_tenant() -> None:
    assert Keys().idempotency("a:b", "c") != Keys().idempotency("a", "b:c")
