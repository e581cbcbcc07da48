-- A request to fold a conversation's next turns into its summary enters the queue, unless one is on its way.
-- ARGV: id, digest, model, tenant, priority, request, retention in ms, name of the conversation, turns that the summary covers,
--       tokens that it will take, by estimate
-- Answers 1, or 0 if there is nothing to do: a fold is in progress, the summary covers more by now, or the conversation is gone.

local id, conversation = ARGV[1], ARGV[8]
local key = conversation_key(conversation)
local fields = redis.call('HMGET', key, 'id', 'covered', 'folding')
if not fields[1] or (fields[2] or '0') ~= ARGV[9] or is_live(fields[3]) or redis.call('EXISTS', request_key(id)) == 1 then
  return 0
end
create_request(id, ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7], ARGV[10])
redis.call('HSET', request_key(id), 'conversation', conversation)
redis.call('HSET', key, 'folding', id)
return 1
