-- What a worker needs to build the prompt of a request that belongs to a conversation.
-- ARGV: id of the request, how many turns at most, how many bytes of turns at most,
--       'tail' (the last turns) or 'head' (from the first one that the summary does not cover)
-- Answers {what an earlier attempt kept, or false; fields of the conversation (name, value, ...); number of turns; index of the first
-- turn that follows; turns}. What was kept decides which turns follow: those from its `first` on, to its `last` or `num_turns`.

local id, max_turns, max_bytes, end_of = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local own = redis.call('HMGET', request_key(id), 'conversation', 'memory')
local conversation, kept = own[1], own[2]
if not conversation then
  return {false, {}, 0, 0, {}}
end
local fields = redis.call('HGETALL', conversation_key(conversation))
local num_turns = redis.call('LLEN', turns_key(conversation))
if kept then
  local memory = cjson.decode(kept)
  local last = memory.last or memory.num_turns
  local turns = {}
  if memory.first < last then
    turns = redis.call('LRANGE', turns_key(conversation), memory.first, last - 1)
  end
  return {kept, fields, num_turns, memory.first, turns}
end

-- In steps, so that neither a conversation of short turns takes many calls nor one of long turns much memory.
local step = 16
local chosen, bytes = {}, 0
if end_of == 'head' then
  local first = tonumber(redis.call('HGET', conversation_key(conversation), 'covered') or 0)
  local at = first
  while at < num_turns do
    for _, turn in ipairs(redis.call('LRANGE', turns_key(conversation), at, at + step - 1)) do
      bytes = bytes + #turn
      if #chosen == max_turns or (bytes > max_bytes and #chosen > 0) then
        return {false, fields, num_turns, first, chosen}
      end
      chosen[#chosen + 1] = turn
    end
    at = at + step
  end
  return {false, fields, num_turns, first, chosen}
end

local newest_first = {}
local at = num_turns
while at > 0 and bytes <= max_bytes and #newest_first < max_turns do
  local turns = redis.call('LRANGE', turns_key(conversation), math.max(at - step, 0), at - 1)
  for i = #turns, 1, -1 do
    bytes = bytes + #turns[i]
    if bytes > max_bytes or #newest_first == max_turns then
      break
    end
    newest_first[#newest_first + 1] = turns[i]
  end
  at = at - step
end
for i = #newest_first, 1, -1 do
  chosen[#chosen + 1] = newest_first[i]
end
return {false, fields, num_turns, num_turns - #chosen, chosen}
