-- A dead letter is not needed any more: it expires like any request that has ended.
-- ARGV: id
-- Answers the state of the request, or nil for an unknown id. One that is no dead letter stays as it is.

local state = redis.call('HGET', request_key(ARGV[1]), 'state')
if redis.call('ZSCORE', dead_key, ARGV[1]) then
  drop_dead(ARGV[1])
end
return state
