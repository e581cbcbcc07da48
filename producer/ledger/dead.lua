-- One page of the dead letters, the latest first.
-- ARGV: place to go on from, how many to look at
-- Answers {place of the next page (-1: this was the last), {id, fields (name, value, ...)} each}.

local at, number = tonumber(ARGV[1]), tonumber(ARGV[2])
local found = {}
local ids = redis.call('ZREVRANGE', dead_key, at, at + number - 1)
for _, id in ipairs(ids) do
  local fields = redis.call('HGETALL', request_key(id))
  if #fields > 0 then
    found[#found + 1] = {id, fields}
  end
end
return {#ids < number and -1 or at + number, found}
