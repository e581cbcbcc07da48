-- How far a request is.
-- ARGV: id
-- Answers {fields of its hash (name, value, ...), its place in the queue (-1: not queued)}; no fields for an unknown id.

local key = request_key(ARGV[1])
local place = -1
if redis.call('HGET', key, 'state') == 'queued' then
  place = redis.call('ZRANK', queue_key(redis.call('HGET', key, 'model')), ARGV[1]) or -1
end
return {redis.call('HGETALL', key), place}
