-- What the prompt of a request consists of is kept with it, so that a later attempt builds the same.
-- ARGV: id, attempt, memory (JSON), worker ('': not to be checked)
-- Answers what is kept (an earlier attempt may have been faster), or nil if fenced.

local key = request_key(ARGV[1])
local fields = redis.call('HMGET', key, 'state', 'attempt', 'worker')
if fields[1] ~= 'running' or fields[2] ~= ARGV[2] or (ARGV[4] ~= '' and fields[3] ~= ARGV[4]) then
  return false
end
redis.call('HSETNX', key, 'memory', ARGV[3])
return redis.call('HGET', key, 'memory')
