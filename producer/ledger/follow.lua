-- A reader wants the events of requests, those so far and, while they live, those to come.
-- ARGV: reader ('': only those so far), then id and entry id to read after, of each request
-- Answers {state, id of its last entry, events after that entry} each, or nil for an unknown id.

local reader = ARGV[1]
local answers = {}
for i = 2, #ARGV, 2 do
  local id, after = ARGV[i], ARGV[i + 1]
  local key = request_key(id)
  local fields = redis.call('HMGET', key, 'state', 'last', 'readers')
  local state, readers = fields[1], fields[3] or ''
  if state then
    if reader ~= '' and (state == 'queued' or state == 'running' or state == 'waiting')
      and not string.find(',' .. readers .. ',', ',' .. reader .. ',', 1, true) then
      redis.call('HSET', key, 'readers', readers == '' and reader or readers .. ',' .. reader)
    end
    answers[#answers + 1] = {state, fields[2], redis.call('XRANGE', events_key(id), '(' .. after, '+')}
  else
    answers[#answers + 1] = false
  end
end
return answers
