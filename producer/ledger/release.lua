-- A worker hands a request back: running → queued, at its old place. The next claim goes on from its last token.
-- ARGV: id, attempt, Finished event to fill in
-- Answers 1, or -1 if fenced. If a cancellation is asked for, it ends instead.

local id, attempt, cancelled = ARGV[1], ARGV[2], ARGV[3]
local key = request_key(id)
local fields = redis.call('HMGET', key, 'state', 'attempt', 'worker', 'model', 'priority', 'submitted', 'cancel')
if fields[1] ~= 'running' or fields[2] ~= attempt then
  return -1
end
if fields[7] then
  end_cancelled(id, cancelled, now_ms())
  publish_pushes()
  return 1
end
redis.call('HSET', key, 'state', 'queued', 'worker', '')
redis.call('ZREM', leases_key, id)
redis.call('SREM', running_key(fields[3]), id)
enqueue(id, fields[4], fields[5], tonumber(fields[6]) * 100)
return 1
