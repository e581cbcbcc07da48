-- The worker's last word about a request.
-- ARGV: id, attempt, state (done, cancelled, failed), Finished or Failed event, worker and tokens that the stream must have ('': not to be checked)
-- A piece of a document that fails for the first time goes back to the queue instead, and is gone on with from its last token.
-- Answers 1, 2 if it went back, 0 if this attempt ended it so before (a retry whose first answer was lost), -1 if fenced,
-- -3 if the stream has other tokens: Redis has come back without its last writes.

local id, attempt, state, event = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local worker, count = ARGV[5], ARGV[6]
local fields = redis.call('HMGET', request_key(id), 'state', 'attempt', 'retried', 'worker', 'count')
if fields[2] ~= attempt then
  return -1
elseif fields[1] == state then
  return 0
elseif fields[1] == 'queued' and fields[3] == attempt then
  return 2
elseif fields[1] ~= 'running' or (worker ~= '' and fields[4] ~= worker) then
  return -1
elseif count ~= '' and fields[5] ~= count then
  return -3
end
if state == 'failed' and redis.call('HEXISTS', request_key(id), 'document') == 1 and redis.call('HSETNX', request_key(id), 'retried', attempt) == 1 then
  requeue(id, CANCELLED)
  call_workers()
  publish_pushes()
  return 2
end
end_request(id, state, event, now_ms())
publish_pushes()
return 1
