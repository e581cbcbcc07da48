-- Requests whose worker has let their lease run out go back to the queue, at their old place; the next claim goes on from their last token.
-- ARGV: how many at most, Finished event to fill in, attempts in a row that may be lost without a new token,
--       ms of silence after which a worker that does not listen to its control channel either is dead, and its leases end at once (0: never)
-- What waits beyond its deadline ends.
-- Answers their ids. The worker that had them finds out by its next call, which is fenced once somebody has claimed them.
-- One that was lost too often becomes a dead letter instead.

local now, silent_ms = now_ms(), tonumber(ARGV[4])

-- Whoever is killed loses its connections in the same moment. One that is only slow, or cut off, still has them, and the whole lease.
if silent_ms > 0 then
  for _, worker in ipairs(redis.call('ZRANGEBYSCORE', workers_key, '-inf', now - silent_ms)) do
    if redis.call('PUBSUB', 'NUMSUB', prefix .. 'control:' .. worker)[2] == 0 then
      for _, id in ipairs(redis.call('SMEMBERS', running_key(worker))) do
        redis.call('ZADD', leases_key, 'XX', now, id)
      end
    end
  end
end

local reaped = redis.call('ZRANGEBYSCORE', leases_key, '-inf', now, 'LIMIT', 0, ARGV[1])
for _, id in ipairs(reaped) do
  local fields = redis.call('HMGET', request_key(id), 'state', 'worker')
  if fields[1] ~= 'running' then
    redis.call('ZREM', leases_key, id)
  elseif lose_attempt(id, 'its worker ' .. fields[2] .. ' fell silent', tonumber(ARGV[3]), false, ARGV[2]) then
    requeue(id, ARGV[2])
  end
end
if reaped[1] then
  call_workers()
end
end_expired(100, now)
publish_pushes()
return reaped
