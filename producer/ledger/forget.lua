-- A conversation, and what the ledger still keeps of its requests, is deleted; what is in progress in it is cancelled.
-- ARGV: name, Finished event to fill in
-- Answers 1, or 0 if there is no such conversation.

local name, cancelled = ARGV[1], ARGV[2]
local fields = redis.call('HMGET', conversation_key(name), 'id', 'busy', 'folding', 'folded')
-- Dead letters do not expire, and one that was to begin the conversation has left nothing else of it.
local num_dead = 0
for _, id in ipairs(redis.call('ZRANGE', dead_key, 0, -1)) do
  if redis.call('HGET', request_key(id), 'conversation') == name then
    redis.call('DEL', request_key(id), events_key(id))
    redis.call('ZREM', dead_key, id)
    num_dead = num_dead + 1
  end
end
if not fields[1] then
  return num_dead > 0 and 1 or 0
end
local num_turns = redis.call('LLEN', turns_key(name))
-- From the latest turn back to where requests are not kept any more.
local at = num_turns
while at > 0 do
  local num_deleted = 0
  for _, turn in ipairs(redis.call('LRANGE', turns_key(name), math.max(at - 64, 0), at - 1)) do
    local id = cjson.decode(turn).request_id
    if not is_live(id) then
      num_deleted = num_deleted + redis.call('DEL', request_key(id), events_key(id))
    end
  end
  at = num_deleted > 0 and at - 64 or 0
end
-- What is live, under an id that was used before, ends below.
if fields[4] and not is_live(fields[4]) then
  redis.call('DEL', request_key(fields[4]), events_key(fields[4]))
end
drop_conversation(name)
for i = 2, 3 do
  if is_live(fields[i]) then
    -- Its reader is still told that it ends, and no more.
    redis.call('HSET', request_key(fields[i]), 'retention', 10000)
    cancel_request(fields[i], cancelled)
  end
end
publish_pushes()
return 1
