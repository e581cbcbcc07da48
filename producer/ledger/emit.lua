-- The new events of all requests of one flush.
-- ARGV: one text, a line for each event: id, attempt, tokens emitted before it, index of its last token (both -1: a Started), event; tabs
--       between; then the worker ('': not to be checked). One text, because packing 1,280 arguments costs the worker more than everything else in this call.
-- Answers a code each:
--    1  written
--    0  was written before: this is the retry of a call whose answer was lost
--   -1  fenced: the request is not running any more, or not with this attempt
--   -2  in the stream (now or before), and a cancellation is asked for
--   -3  out of step: it does not follow the stream's last token, or a token came before its attempt's Started

local worker = ARGV[2]
local codes = {}
for id, attempt, before, index, event in string.gmatch(ARGV[1], '([^\t]*)\t([^\t]*)\t([^\t]*)\t([^\t]*)\t([^\n]*)\n') do
  local key = request_key(id)
  local fields = redis.call('HMGET', key, 'state', 'attempt', 'count', 'last', 'started', 'cancel', 'readers', 'worker')
  local count, started = fields[3], fields[5]
  local code
  if fields[1] ~= 'running' or fields[2] ~= attempt or (worker ~= '' and fields[8] ~= worker) then
    code = -1
  elseif index == '-1' then
    if started == attempt then
      code = 0
    else
      local entry = entry_after(fields[4], count, tonumber(attempt))
      append(id, fields[4], entry, event, fields[7])
      redis.call('HSET', key, 'last', entry, 'started', attempt)
      code = 1
    end
  elseif tonumber(index) <= tonumber(count) then
    code = 0
  elseif before ~= count or started ~= attempt then
    code = -3
  else
    local entry = index .. '-0'
    append(id, fields[4], entry, event, fields[7])
    redis.call('HSET', key, 'last', entry, 'count', index)
    code = 1
  end
  if code >= 0 and fields[6] then
    code = -2
  end
  codes[#codes + 1] = code
end
publish_pushes()
return codes
