-- Requests whose worker has let their lease run out go back to the queue, at their old place; the next claim goes on from their last token.
-- ARGV: how many at most, Finished event to fill in
-- Answers their ids. The worker that had them finds out by its next call, which is fenced once somebody has claimed them.

local reaped = redis.call('ZRANGEBYSCORE', leases_key, '-inf', now_ms(), 'LIMIT', 0, ARGV[1])
for _, id in ipairs(reaped) do
  if redis.call('HGET', request_key(id), 'state') == 'running' then
    requeue(id, ARGV[2])
  else
    redis.call('ZREM', leases_key, id)
  end
end
publish_pushes()
return reaped
