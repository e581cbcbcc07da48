-- A request that cannot even be queued, because its body is invalid: its stream has one event, the reason.
-- ARGV: id, digest, model, tenant, body as it came, Failed event, retention in ms
-- Answers 1, or 0 if the id is known already.

local id, digest, model, tenant, request, event, retention =
  ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
if redis.call('EXISTS', request_key(id)) == 1 then
  return 0
end
local now = now_ms()
redis.call('HSET', request_key(id), 'state', 'queued', 'request', request, 'digest', digest, 'model', model,
  'tenant', tenant, 'priority', 0, 'attempt', 0, 'count', 0, 'last', '0-0', 'submitted', now, 'retention', retention)
end_request(id, 'failed', event, now)
return 1
