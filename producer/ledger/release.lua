-- A worker hands a request back: running → queued, at its old place. The next claim goes on from its last token.
-- ARGV: id, attempt, Finished event to fill in
-- Answers 1, or -1 if fenced. If a cancellation is asked for, it ends instead.

local id, attempt, cancelled = ARGV[1], ARGV[2], ARGV[3]
local fields = redis.call('HMGET', request_key(id), 'state', 'attempt')
if fields[1] ~= 'running' or fields[2] ~= attempt then
  return -1
end
requeue(id, cancelled)
call_workers()
publish_pushes()
return 1
