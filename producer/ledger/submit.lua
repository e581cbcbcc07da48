-- A new request enters the queue.
-- ARGV: id, digest of the body, model, tenant, priority, request, ms until the deadline (0: none), retention in ms,
--       idempotency key ('': none), how long to remember it in ms
-- Answers {1 new | 0 known before | -1 the id or the idempotency key belongs to another body, id of the request}.
-- Admission bounds will be checked here, between the two.

local id, digest, model, tenant, priority, request = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local deadline, retention, idempotency_key, idempotency_ms = tonumber(ARGV[7]), ARGV[8], ARGV[9], ARGV[10]
local key = request_key(id)

local known = redis.call('HGET', key, 'digest')
if known then
  return {known == digest and 0 or -1, id}
end
if idempotency_key ~= '' then
  local record_key = prefix .. 'idempotency:' .. tenant .. ':' .. idempotency_key
  local record = redis.call('GET', record_key)
  if record then
    local known_id, known_digest = string.match(record, '^(%S+) (%S+)$')
    return {known_digest == digest and 0 or -1, known_id}
  end
  redis.call('SET', record_key, id .. ' ' .. digest, 'PX', idempotency_ms)
end

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
redis.call('HSET', key, 'state', 'queued', 'request', request, 'digest', digest, 'model', model, 'tenant', tenant,
  'priority', priority, 'attempt', 0, 'count', 0, 'last', '0-0', 'submitted', now, 'retention', retention)
if deadline > 0 then
  redis.call('HSET', key, 'deadline', now + deadline)
end
enqueue(id, model, priority, tonumber(time[1]) * 100000 + math.floor(tonumber(time[2]) / 10))
return {1, id}
