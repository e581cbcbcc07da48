-- Somebody does not want the answer any more.
-- ARGV: id, Finished event to fill in
-- Answers the state before, or nil for an unknown id. A queued request ends here; a running one is ended by its worker, which hears of it now
-- on its control channel, or with its next emit or renewal if that message is lost.

local id, cancelled = ARGV[1], ARGV[2]
local fields = redis.call('HMGET', request_key(id), 'state', 'worker')
if fields[1] == 'queued' then
  end_cancelled(id, cancelled, now_ms())
  publish_pushes()
elseif fields[1] == 'running' then
  redis.call('HSET', request_key(id), 'cancel', 1)
  redis.call('PUBLISH', prefix .. 'control:' .. fields[2], 'cancel ' .. id)
end
return fields[1]
