-- A reader does not want to hear of a request any more.
-- ARGV: reader, id
-- Answers 1 if it was a reader of it.

local reader, key = ARGV[1], request_key(ARGV[2])
local kept, found = {}, 0
for other in string.gmatch(redis.call('HGET', key, 'readers') or '', '[^,]+') do
  if other == reader then
    found = 1
  else
    kept[#kept + 1] = other
  end
end
if found == 1 then
  redis.call('HSET', key, 'readers', table.concat(kept, ','))
end
return found
