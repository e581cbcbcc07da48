"""Ledgers that are broken on purpose: each is the real one with one text replaced. The machine must find every one of them."""

from __future__ import annotations

from typing import Final

from tests.producer.ledger.model_check.server import Substitution

MUTANTS: Final = {
    # Fencing.
    "an old attempt can write": Substitution(
        "if fields[1] ~= 'running' or fields[2] ~= attempt or (worker ~= '' and fields[8] ~= worker) then",
        "if fields[1] ~= 'running' then",
    ),
    "a claim does not raise the attempt": Substitution(
        "local attempt, claimed = tonumber(fields[2]) + 1,",
        "local attempt, claimed = math.max(tonumber(fields[2]), 1),",
    ),
    "an old attempt can release and renew": Substitution(
        "return fields[1] == 'running' and fields[2] == attempt and",
        "return fields[1] == 'running' and",
        seed=101,
    ),
    "an end is written whatever the state": Substitution(
        "elseif fields[1] ~= 'running' or (worker ~= '' and fields[4] ~= worker) then",
        "elseif false then",
    ),
    "a claim that the server lost can be made by two": Substitution(
        "or (worker ~= '' and fields[8] ~= worker) then", "then", seed=101
    ),
    # Streams.
    "a token that was written before is written again": Substitution(
        "elseif tonumber(index) <= tonumber(count) then", "elseif tonumber(index) < tonumber(count) then"
    ),
    "tokens need not follow one another": Substitution(
        "elseif before ~= count or started ~= attempt then", "elseif started ~= attempt then"
    ),
    "a push does not name the entry before it": Substitution(
        "local line = id .. '\\t' .. previous ..", "local line = id .. '\\t' .. entry .."
    ),
    "an end is written although tokens are missing": Substitution(
        "elseif count ~= '' and fields[5] ~= count then", "elseif false then"
    ),
    "a dead letter that is queued again keeps its end": Substitution(
        "if ended then\n  redis.call('XDEL'", "if false then\n  redis.call('XDEL'"
    ),
    # Leases and the queue.
    "a lease outlives its request's run": Substitution(
        "if redis.call('ZREM', leases_key, id) == 0 then", "if not redis.call('ZSCORE', leases_key, id) then"
    ),
    "what is given back is in no queue": Substitution(
        "  redis.call('SREM', running_key(fields[1]), id)\n"
        "  enqueue(id, fields[2], fields[3], tonumber(fields[4]) * 100)",
        "  redis.call('SREM', running_key(fields[1]), id)",
    ),
    "a worker keeps what it has given back": Substitution(
        "  redis.call('SREM', running_key(fields[1]), id)\n"
        "  enqueue(id, fields[2], fields[3], tonumber(fields[4]) * 100)",
        "  enqueue(id, fields[2], fields[3], tonumber(fields[4]) * 100)",
    ),
    "a cancellation is forgotten when the worker dies": Substitution(
        "  if fields[5] then\n    end_cancelled(id, template, now_ms())", "  if false then\n"
    ),
    "losses without a token are not counted": Substitution(
        "failures = failures + more", "failures = failures"
    ),
    # Order and shares.
    "nobody is charged": Substitution("(charged and 0 or tokens / (settings.weight or 1))", "0"),
    "a second attempt is charged again": Substitution(
        "(charged and 0 or tokens / (settings.weight or 1))", "tokens / (settings.weight or 1)"
    ),
    "a tenant at its limit is never freed": Substitution(
        "  if fields[2] then\n    free_tenant(model, tenant)\n  end\n", ""
    ),
    "tokens that left the queue are still counted": Substitution(
        "  redis.call('HINCRBY', usage, 'queued_tokens', -tokens)\n", ""
    ),
    "tenants have no limit": Substitution(
        "local limit, running = settings.max_running or max_running,", "local limit, running = 0,"
    ),
    "nothing that waits long is ever brought forward": Substitution(
        "ageing_claims > 0 and num_claims >= ageing_claims then", "false then"
    ),
    "whoever was away has saved up time": Substitution("time = math.max(time, least_time(model))\n", "\n"),
    "what waits beyond its deadline is begun": Substitution(
        "  if fields[1] == 'queued' then\n      count_rejected", "  if false then\n      count_rejected"
    ),
    # Conversations.
    "two answers at a time": Substitution(
        "  if is_live(busy) then\n    count_rejected(model", "  if false then\n    count_rejected(model"
    ),
    "an answer becomes a turn of whatever conversation": Substitution(
        "if waits[1] == id then", "if true then"
    ),
    "a prompt is chosen anew by each attempt": Substitution(
        "redis.call('HSETNX', key, 'memory', ARGV[3])", "redis.call('HSET', key, 'memory', ARGV[3])"
    ),
    "a late fold replaces a newer summary": Substitution(
        "memory and memory.first == tonumber(fields[1] or 0) then", "memory then"
    ),
    "a conversation expires while an answer is in progress": Substitution(
        "  redis.call('PERSIST', conversation_key(name))\n", ""
    ),
    # Documents.
    "a piece counts twice": Substitution(
        "'pieces', 1 + (usage.pieces or 0))", "'pieces', 2 + (usage.pieces or 0))"
    ),
    "a document goes on before its last piece": Substitution("if left == 0 then", "if left <= 1 then"),
    "the pieces of a document that has ended go on": Substitution(
        "if is_live(piece) then\n        cancel_request(piece, CANCELLED)", "if is_live(piece) then\n"
    ),
}
