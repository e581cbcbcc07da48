-- What a deployment does now.
-- ARGV: model, ms after which a silent worker is forgotten
-- Answers {queued requests of the model, running requests, {worker, ms since its last sign of life, {field, value, ...}} each}.

local now = now_ms()
redis.call('ZREMRANGEBYSCORE', workers_key, '-inf', '(' .. (now - tonumber(ARGV[2])))
local workers = {}
local seen = redis.call('ZRANGE', workers_key, 0, -1, 'WITHSCORES')
for i = 1, #seen, 2 do
  workers[#workers + 1] = {seen[i], now - tonumber(seen[i + 1]), redis.call('HGETALL', worker_key(seen[i]))}
end
return {redis.call('ZCARD', queue_key(ARGV[1])), redis.call('ZCARD', leases_key), workers}
