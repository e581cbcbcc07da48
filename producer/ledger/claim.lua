-- A worker takes the most urgent request, of equally urgent ones the oldest.
-- ARGV: model, worker, lease in ms, Failed event for a request whose deadline passed in the queue
-- Answers {1, id, attempt, request, ms in the queue before the first claim, ms until the deadline (-1: none), events so far,
--          ms since submit, {pieces of each level so far, and of them all: number, prompt tokens, completion tokens;
--          the document that it is a piece of; attempts in a row that brought no token}},
-- {0} when there is no work, {2} when it only cleared away requests whose time was over: call again.
-- An attempt limit and fair shares between tenants will be decided here.

local model, worker, lease, too_late = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local now = now_ms()

-- Bounded, so that a thousand requests past their deadline do not stop the server for long.
for _ = 1, 100 do
  local id = redis.call('ZRANGE', queue_key(model), 0, 0)[1]
  if not id then
    publish_pushes()
    return {0}
  end
  local key = request_key(id)
  local fields = redis.call('HMGET', key, 'state', 'attempt', 'deadline', 'submitted', 'request', 'count')
  local deadline = tonumber(fields[3])
  if fields[1] ~= 'queued' then
    redis.call('ZREM', queue_key(model), id)
  elseif deadline and deadline <= now then
    count_rejected(model, 'deadline_exceeded')
    end_request(id, 'failed', too_late, now)
  else
    local attempt = tonumber(fields[2]) + 1
    redis.call('ZREM', queue_key(model), id)
    redis.call('HSET', key, 'state', 'running', 'attempt', attempt, 'worker', worker)
    redis.call('HSETNX', key, 'claimed', now)
    redis.call('ZADD', leases_key, now + lease, id)
    redis.call('SADD', running_key(worker), id)
    local waited = tonumber(redis.call('HGET', key, 'claimed')) - tonumber(fields[4])
    local events = {}
    if fields[6] ~= '0' then
      events = redis.call('XRANGE', events_key(id), '-', '+')
    end
    publish_pushes()
    return {1, id, attempt, fields[5], waited, deadline and deadline - now or -1, events, now - tonumber(fields[4]),
      redis.call('HMGET', key, 'levels', 'pieces', 'piece_prompt_tokens', 'piece_completion_tokens',
        'document', 'failures')}
  end
end
publish_pushes()
return {2}
