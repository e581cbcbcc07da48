-- The worker's last word about a request.
-- ARGV: id, attempt, state (done, cancelled, failed), Finished or Failed event
-- Answers 1, 0 if this attempt ended it so before (a retry whose first answer was lost), -1 if fenced.

local id, attempt, state, event = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local fields = redis.call('HMGET', request_key(id), 'state', 'attempt')
if fields[2] ~= attempt then
  return -1
elseif fields[1] == state then
  return 0
elseif fields[1] ~= 'running' then
  return -1
end
end_request(id, state, event, now_ms())
publish_pushes()
return 1
