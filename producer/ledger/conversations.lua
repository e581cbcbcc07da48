-- One page of the conversations, those with the latest turn first.
-- ARGV: beginning of their names ('': all), place to go on from, how many names to look at
-- Answers {place of the next page (-1: this was the last), {fields (name, value, ...), number of turns} each}.

local beginning, at, num_looked_at = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
redis.call('ZREMRANGEBYSCORE', conversations_key, '-inf', now_ms())
local found = {}
local names = redis.call('ZREVRANGE', conversations_key, at, at + num_looked_at - 1)
for _, name in ipairs(names) do
  if string.sub(name, 1, #beginning) == beginning then
    local fields = redis.call('HGETALL', conversation_key(name))
    if #fields > 0 then
      found[#found + 1] = {fields, redis.call('LLEN', turns_key(name))}
    end
  end
end
return {#names < num_looked_at and -1 or at + num_looked_at, found}
