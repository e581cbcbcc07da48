-- A worker is alive: its leases last longer, and what it says of itself is kept.
-- ARGV: worker, lease in ms, lifetime in ms of what it says, number of strings in that, these strings (field, value, ...),
--       then id and attempt of each request that it holds
-- Answers {ids that are not its own any more, ids that are to be cancelled}.

local worker, lease, lifetime, num_about = ARGV[1], tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
local now = now_ms()
local lost, cancelled = {}, {}
if num_about > 0 then
  redis.call('HSET', worker_key(worker), unpack(ARGV, 5, 4 + num_about))
  redis.call('PEXPIRE', worker_key(worker), lifetime)
end
redis.call('ZADD', workers_key, now, worker)
-- Those that were killed: whoever calls the workers need not call them.
redis.call('ZREMRANGEBYSCORE', workers_key, '-inf', '(' .. (now - tonumber(lifetime)))
for i = 5 + num_about, #ARGV, 2 do
  local id, attempt = ARGV[i], ARGV[i + 1]
  if is_held(id, attempt, worker) then
    redis.call('ZADD', leases_key, now + lease, id)
    if redis.call('HEXISTS', request_key(id), 'cancel') == 1 then
      cancelled[#cancelled + 1] = id
    end
  else
    lost[#lost + 1] = id
  end
end
return {lost, cancelled}
