-- A worker hands a request back: running → queued, at its old place. The next claim goes on from its last token.
-- ARGV: id, attempt, Finished event to fill in, worker ('': not to be checked)
-- Answers 1, or -1 if fenced. If a cancellation is asked for, it ends instead.

local id, cancelled = ARGV[1], ARGV[3]
if not is_held(id, ARGV[2], ARGV[4]) then
  return -1
end
requeue(id, cancelled)
call_workers()
publish_pushes()
return 1
