-- What all scripts share; put in front of each of them. Names of keys are those of producer/contract/keys.py.
--
-- KEYS[1] is the prefix `{namespace}:`. It stands for all keys of the deployment, which share its hash tag: which of them a script touches,
-- it often learns only while it runs. Times are Redis' own, in ms.

local prefix = KEYS[1]

local function request_key(id) return prefix .. 'request:' .. id end
local function events_key(id) return prefix .. 'events:' .. id end
local function queue_key(model) return prefix .. 'queue:' .. model end
local function running_key(worker) return prefix .. 'running:' .. worker end
local function worker_key(worker) return prefix .. 'worker:' .. worker end
local function conversation_key(name) return prefix .. 'conversation:' .. name end
local function turns_key(name) return prefix .. 'turns:' .. name end
local leases_key = prefix .. 'leases'
local dead_key = prefix .. 'dead'
local rejected_key = prefix .. 'rejected'
local conversations_key = prefix .. 'conversations'
local workers_key = prefix .. 'workers'

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- A submission is refused at the door.
local function count_rejected(reason)
  redis.call('HINCRBY', rejected_key, reason, 1)
end

-- Lines for each reader; a reader gets all of a script's lines in one message.
local pushes = {}

-- One event at the end of a request's stream. `previous` is the id of the entry before it: a reader that has not seen that one has a gap.
local function append(id, previous, entry, event, readers)
  redis.call('XADD', events_key(id), entry, 'event', event)
  for reader in string.gmatch(readers or '', '[^,]+') do
    local lines = pushes[reader]
    if not lines then
      lines = {}
      pushes[reader] = lines
    end
    lines[#lines + 1] = id .. '\t' .. previous .. '\t' .. entry .. '\t' .. event
  end
end

local function publish_pushes()
  for reader, lines in pairs(pushes) do
    redis.call('PUBLISH', prefix .. 'push:' .. reader, table.concat(lines, '\n'))
  end
end

-- Queued again or for the first time. The score orders by priority, then by the time of submit in units of 10 µs, which stays exact in a double.
local function enqueue(id, model, priority, submitted_10us)
  redis.call('ZADD', queue_key(model), tonumber(priority) * 5e14 + submitted_10us, id)
end

-- A request that nobody knows yet enters the queue. Answers the time, in ms.
local function create_request(id, digest, model, tenant, priority, request, retention)
  local time = redis.call('TIME')
  local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
  redis.call('HSET', request_key(id), 'state', 'queued', 'request', request, 'digest', digest, 'model', model, 'tenant', tenant,
    'priority', priority, 'attempt', 0, 'count', 0, 'last', '0-0', 'submitted', now, 'retention', retention)
  enqueue(id, model, priority, tonumber(time[1]) * 100000 + math.floor(tonumber(time[2]) / 10))
  return now
end

-- Whether this request will still end by itself; false also for one that is not known (any more).
local function is_live(id)
  local state = id and redis.call('HGET', request_key(id), 'state')
  return state == 'queued' or state == 'running'
end

-- While an answer is in progress the conversation does not expire.
local function hold_conversation(name)
  redis.call('PERSIST', conversation_key(name))
  redis.call('PERSIST', turns_key(name))
  redis.call('ZADD', conversations_key, '+inf', name)
end

-- Its lifetime begins anew. Others whose lifetime is over are not counted any more.
local function keep_conversation(name, now)
  local lifetime = tonumber(redis.call('HGET', conversation_key(name), 'lifetime'))
  redis.call('PEXPIRE', conversation_key(name), lifetime)
  redis.call('PEXPIRE', turns_key(name), lifetime)
  redis.call('ZREMRANGEBYSCORE', conversations_key, '-inf', now)
  redis.call('ZADD', conversations_key, now + lifetime, name)
end

local function drop_conversation(name)
  redis.call('DEL', conversation_key(name), turns_key(name))
  redis.call('ZREM', conversations_key, name)
end

-- The answer is a turn if it is complete.
local function end_answer(id, name, state, event, now)
  local key = conversation_key(name)
  redis.call('HDEL', key, 'busy')
  if state == 'done' then
    local own = redis.call('HMGET', request_key(id), 'request', 'memory')
    local memory = own[2] and cjson.decode(own[2]) or {question_tokens = 0}
    local finished = cjson.decode(event)
    redis.call('RPUSH', turns_key(name), cjson.encode({query = cjson.decode(own[1]).query, answer = finished.text, request_id = id,
      time = now, tokens = memory.question_tokens + finished.usage.completion_tokens}))
    redis.call('HSET', key, 'updated', now)
    if memory.context_len then
      redis.call('HSET', key, 'context_len', memory.context_len)
    end
  elseif redis.call('EXISTS', turns_key(name)) == 0 then
    drop_conversation(name)
    return
  end
  keep_conversation(name, now)
end

-- The answer is the conversation's summary if that has not changed meanwhile. Of all folds only the last one's request is kept: they repeat
-- what the conversation says, and must be gone when it is forgotten.
local function end_fold(id, name, state, event)
  local key = conversation_key(name)
  local fields = redis.call('HMGET', key, 'covered', 'folded')
  local memory = redis.call('HGET', request_key(id), 'memory')
  memory = memory and cjson.decode(memory)
  redis.call('HDEL', key, 'folding')
  redis.call('HSET', key, 'folded', id)
  if fields[2] then
    redis.call('DEL', request_key(fields[2]), events_key(fields[2]))
  end
  if state == 'done' and memory and memory.first == tonumber(fields[1] or 0) then
    local finished = cjson.decode(event)
    redis.call('HSET', key, 'summary', finished.text, 'summary_tokens', finished.usage.completion_tokens, 'covered', memory.last)
    redis.call('HDEL', key, 'fold_failures')
  else
    redis.call('HINCRBY', key, 'fold_failures', 1)
  end
end

-- The last event; whoever calls has checked that the request may end now.
local function end_request(id, state, event, now)
  local key = request_key(id)
  local fields = redis.call('HMGET', key, 'attempt', 'count', 'last', 'readers', 'retention', 'worker', 'model', 'conversation')
  local entry = fields[2] .. '-' .. (tonumber(fields[1]) + 1)
  append(id, fields[3], entry, event, fields[4])
  redis.call('HSET', key, 'state', state, 'last', entry, 'ended', now)
  redis.call('HDEL', key, 'cancel', 'readers')
  if fields[8] then
    -- A conversation that does not wait for this request takes nothing from it: it was forgotten, say.
    local waits = redis.call('HMGET', conversation_key(fields[8]), 'busy', 'folding')
    if waits[1] == id then
      end_answer(id, fields[8], state, event, now)
    elseif waits[2] == id then
      end_fold(id, fields[8], state, event)
    end
  end
  redis.call('ZREM', queue_key(fields[7]), id)
  redis.call('ZREM', leases_key, id)
  if fields[6] and fields[6] ~= '' then
    redis.call('SREM', running_key(fields[6]), id)
  end
  redis.call('PEXPIRE', key, fields[5])
  redis.call('PEXPIRE', events_key(id), fields[5])
end

-- A request ends cancelled while no worker has it: the answer is what its stream has. `template` is a Finished event to fill in.
local function end_cancelled(id, template, now)
  local fields = redis.call('HMGET', request_key(id), 'attempt', 'count', 'submitted', 'claimed')
  local event = cjson.decode(template)
  local texts = {}
  for _, item in ipairs(redis.call('XRANGE', events_key(id), '-', '+')) do
    local earlier = cjson.decode(item[2][2])
    if earlier.type == 'token' then
      texts[#texts + 1] = table.concat(earlier.texts)
    elseif earlier.type == 'started' then
      event.usage.prompt_tokens = earlier.prompt_tokens
    end
  end
  event.text = table.concat(texts)
  event.attempts = tonumber(fields[1])
  event.usage.completion_tokens = tonumber(fields[2])
  event.timings.queue_seconds = ((tonumber(fields[4]) or now) - tonumber(fields[3])) / 1000
  if fields[4] then
    event.timings.total_seconds = (now - tonumber(fields[4])) / 1000
  end
  end_request(id, 'cancelled', cjson.encode(event), now)
end

-- Somebody does not want the answer any more. Answers the state before, or false. `template` is a Finished event to fill in.
-- A queued request ends here; a running one is ended by its worker, which hears of it now on its control channel, or with its
-- next emit or renewal if that message is lost.
local function cancel_request(id, template)
  local fields = redis.call('HMGET', request_key(id), 'state', 'worker')
  if fields[1] == 'queued' then
    end_cancelled(id, template, now_ms())
  elseif fields[1] == 'running' then
    redis.call('HSET', request_key(id), 'cancel', 1)
    redis.call('PUBLISH', prefix .. 'control:' .. fields[2], 'cancel ' .. id)
  end
  return fields[1]
end

-- Running → queued, at its old place; whoever claims it goes on from its last token. If a cancellation is asked for, it ends instead.
local function requeue(id, template)
  local key = request_key(id)
  local fields = redis.call('HMGET', key, 'worker', 'model', 'priority', 'submitted', 'cancel')
  if fields[5] then
    end_cancelled(id, template, now_ms())
    return
  end
  redis.call('HSET', key, 'state', 'queued', 'worker', '')
  redis.call('ZREM', leases_key, id)
  redis.call('SREM', running_key(fields[1]), id)
  enqueue(id, fields[2], fields[3], tonumber(fields[4]) * 100)
end
