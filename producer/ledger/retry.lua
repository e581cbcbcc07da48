-- A dead letter is queued again, under its id, and goes on from its last token. Its deadline does not count any more.
-- ARGV: id, lifetime in ms of the conversation that it begins
-- Answers {1}, {0, state} if it is no dead letter, {-1, id of the request that is being answered in its conversation},
--         {-2, id of the document of which it is a piece: that has ended}; nil for an unknown id.

local id, lifetime = ARGV[1], ARGV[2]
local key = request_key(id)
local fields = redis.call('HMGET', key, 'state', 'conversation', 'document', 'model', 'priority', 'submitted', 'request', 'count', 'tenant')
if not fields[1] then
  return false
elseif fields[1] ~= 'dead' then
  return {0, fields[1]}
elseif fields[3] then
  return {-2, fields[3]}
end
local name = fields[2]
if name then
  local busy = redis.call('HGET', conversation_key(name), 'busy')
  if is_live(busy) then
    return {-1, busy}
  end
  begin_answer(id, name, cjson.decode(fields[7]).conversation_id, fields[9], fields[4], lifetime, now_ms())
end
-- Its end comes off the stream. `last` stays: ids only rise, and a reader that has not seen an entry reads the stream.
local ended = redis.call('XREVRANGE', events_key(id), '+', '-', 'COUNT', 1)[1]
if ended then
  redis.call('XDEL', events_key(id), ended[1])
end
redis.call('ZREM', dead_key, id)
redis.call('HDEL', key, 'ended', 'deadline', 'failures')
redis.call('HSET', key, 'state', 'queued', 'worker', '', 'count_before', fields[8])
redis.call('PERSIST', key)
redis.call('PERSIST', events_key(id))
enqueue(id, fields[4], fields[5], tonumber(fields[6]) * 100)
call_workers()
return {1}
