-- What waits in a deployment, for those who watch it.
-- ARGV: model
-- Answers {queued requests of the model by priority (10 numbers), ms that the oldest of each priority has waited, running requests, of these those whose
-- lease has ended, conversations, dead letters, bytes in use, bytes allowed (0: no limit), {reason, number of refused submissions, ...}, {tokens that wait
-- of each priority, by estimate; tokens that left in the last measured time in which something waited, and that time in ms}}.

local now = now_ms()
local queue = queue_key(ARGV[1])
local queued, oldest = {}, {}
for priority = 0, 9 do
  local first, last = string.format('%.0f', priority * 5e14), string.format('(%.0f', (priority + 1) * 5e14)
  queued[priority + 1] = redis.call('ZCOUNT', queue, first, last)
  local head = redis.call('ZRANGEBYSCORE', queue, first, last, 'WITHSCORES', 'LIMIT', 0, 1)
  oldest[priority + 1] = head[2] and now - math.floor((tonumber(head[2]) - priority * 5e14) / 100) or 0
end
local info = redis.call('INFO', 'memory')
return {
  queued,
  oldest,
  redis.call('ZCARD', leases_key),
  redis.call('ZCOUNT', leases_key, '-inf', '(' .. now),
  redis.call('ZCOUNT', prefix .. 'conversations', now, '+inf'),
  redis.call('ZCARD', dead_key),
  tonumber(string.match(info, 'used_memory:(%d+)')) or 0,
  tonumber(string.match(info, 'maxmemory:(%d+)')) or 0,
  redis.call('HGETALL', rejected_key(ARGV[1])),
  redis.call('HMGET', load_key(ARGV[1]), 'tokens:0', 'tokens:1', 'tokens:2', 'tokens:3', 'tokens:4', 'tokens:5', 'tokens:6', 'tokens:7', 'tokens:8', 'tokens:9',
    'drained', 'drained_ms'),
}
