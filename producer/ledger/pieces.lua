-- What has become of a document's pieces.
-- ARGV: id, level, number of its pieces
-- Answers the last event of each, or nil where there is none.

local id, level = ARGV[1], tonumber(ARGV[2])
local events = {}
for number = 1, tonumber(ARGV[3]) do
  local entry = redis.call('XREVRANGE', events_key(piece_id(id, level, number)), '+', '-', 'COUNT', 1)[1]
  events[number] = entry and entry[2][2] or false
end
return events
