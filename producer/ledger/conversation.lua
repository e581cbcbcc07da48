-- A conversation, and a range of its turns.
-- ARGV: name, index of the first turn (negative: counted from the end), how many
-- Answers {fields (name, value, ...), number of turns, index of the first turn that follows, turns}; no fields: there is no such conversation.

local name, first, count = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local num_turns = redis.call('LLEN', turns_key(name))
if first < 0 then
  first = math.max(num_turns + first, 0)
end
local turns = {}
if count > 0 then
  turns = redis.call('LRANGE', turns_key(name), first, first + count - 1)
end
return {redis.call('HGETALL', conversation_key(name)), num_turns, first, turns}
