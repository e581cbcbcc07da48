-- A new request enters the queue.
-- ARGV: id, digest of the body, model, tenant, priority, request, ms until the deadline (0: none), retention in ms,
--       idempotency key ('': none), how long to remember it in ms, name of the conversation ('': none), its id, its lifetime in ms
-- Answers {1 new | 0 known before | -1 the id or the idempotency key belongs to another body, id of the request}, or
-- {-2, id of the request that is being answered in the conversation}.
-- Admission bounds will be checked here, between the two. What is refused is counted by its reason.

local id, digest, model, tenant, priority, request = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local deadline, retention, idempotency_key, idempotency_ms = tonumber(ARGV[7]), ARGV[8], ARGV[9], ARGV[10]
local conversation, conversation_id, lifetime = ARGV[11], ARGV[12], ARGV[13]
local key = request_key(id)

-- The answer about an id or an idempotency key that is known.
local function known_before(known_digest, known_id)
  if known_digest == digest then
    return {0, known_id}
  end
  count_rejected(model, 'idempotency_conflict')
  return {-1, known_id}
end

local known = redis.call('HGET', key, 'digest')
if known then
  return known_before(known, id)
end
local record_key = prefix .. 'idempotency:' .. tenant .. ':' .. idempotency_key
if idempotency_key ~= '' then
  local record = redis.call('GET', record_key)
  if record then
    local known_id, known_digest = string.match(record, '^(%S+) (%S+)$')
    return known_before(known_digest, known_id)
  end
end
if conversation ~= '' then
  local busy = redis.call('HGET', conversation_key(conversation), 'busy')
  if is_live(busy) then
    count_rejected(model, 'conversation_busy')
    return {-2, busy}
  end
end

if idempotency_key ~= '' then
  redis.call('SET', record_key, id .. ' ' .. digest, 'PX', idempotency_ms)
end
local now = create_request(id, digest, model, tenant, priority, request, retention)
if deadline > 0 then
  redis.call('HSET', key, 'deadline', now + deadline)
end
if conversation ~= '' then
  redis.call('HSET', key, 'conversation', conversation)
  redis.call('HSETNX', conversation_key(conversation), 'created', now)
  redis.call('HSET', conversation_key(conversation), 'id', conversation_id, 'tenant', tenant, 'model', model, 'lifetime', lifetime,
    'updated', now, 'busy', id)
  hold_conversation(conversation)
end
return {1, id}
