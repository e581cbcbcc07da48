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
local conversations_key = prefix .. 'conversations'
local workers_key = prefix .. 'workers'

-- So many dead letters are kept; the oldest make room.
local MAX_DEAD = 1000
-- So many lost attempts are told of, the last ones.
local MAX_LOSSES = 20

-- A Finished event to fill in, for pieces that end with their document.
local CANCELLED = '{"version":1,"type":"finished","reason":"cancelled","text":"","usage":{"prompt_tokens":0},"timings":{"queue_seconds":0}}'

local function piece_id(document, level, number)
  return document .. '.' .. level .. '.' .. number
end

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- A submission is refused at the door, or has expired in the queue.
local function rejected_key(model) return prefix .. 'rejected:' .. model end
local function count_rejected(model, reason)
  redis.call('HINCRBY', rejected_key(model), reason, 1)
end

-- Lines for each reader; a reader gets all of a script's lines in one message.
local pushes = {}

-- Ending a request may end those that wait for it, and those that it waits for.
local end_request, cancel_request

-- One event at the end of a request's stream. `previous` is the id of the entry before it: a reader that has not seen that one has a gap.
local function append(id, previous, entry, event, readers)
  redis.call('XADD', events_key(id), entry, 'event', event)
  if not readers then
    return
  end
  local line = id .. '\t' .. previous .. '\t' .. entry .. '\t' .. event
  if pushes[readers] then -- the usual case: one reader, and not its first line
    table.insert(pushes[readers], line)
    return
  end
  for reader in string.gmatch(readers, '[^,]+') do
    pushes[reader] = pushes[reader] or {}
    table.insert(pushes[reader], line)
  end
end

local function publish_pushes()
  for reader, lines in pairs(pushes) do
    redis.call('PUBLISH', prefix .. 'push:' .. reader, table.concat(lines, '\n'))
  end
end

-- Where an event that comes with no token goes: behind the stream's last entry, `last`, and at `number` at least.
local function entry_after(last, count, number)
  local index, last_number = string.match(last, '^(%d+)-(%d+)$')
  if index == count and tonumber(last_number) >= number then
    number = tonumber(last_number) + 1
  end
  return count .. '-' .. string.format('%d', number)
end

-- There is work of which no ticket tells.
local function call_workers()
  for _, worker in ipairs(redis.call('ZRANGE', workers_key, 0, -1)) do
    redis.call('PUBLISH', prefix .. 'control:' .. worker, 'look')
  end
end

-- The queue's order and what it counts: queue.lua.
local enqueue, leave_queue, leave_running, end_usage

-- Whether this request will still end by itself; false also for one that is not known (any more).
local function is_live(id)
  local state = id and redis.call('HGET', request_key(id), 'state')
  return state == 'queued' or state == 'running' or state == 'waiting'
end

-- While an answer is in progress the conversation does not expire.
local function hold_conversation(name)
  redis.call('PERSIST', conversation_key(name))
  redis.call('PERSIST', turns_key(name))
  redis.call('ZADD', conversations_key, '+inf', name)
end

-- A request is to make the conversation's next turn.
local function begin_answer(id, name, conversation_id, tenant, model, lifetime, now)
  local key = conversation_key(name)
  redis.call('HSETNX', key, 'created', now)
  redis.call('HSET', key, 'id', conversation_id, 'tenant', tenant, 'model', model, 'lifetime', lifetime, 'updated', now, 'busy', id)
  hold_conversation(name)
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
  if fields[2] and fields[2] ~= id then
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

-- How far a document's last level of pieces is.
local function append_progress(id, level, done, total)
  local key = request_key(id)
  local fields = redis.call('HMGET', key, 'count', 'last', 'readers')
  local entry = entry_after(fields[2], fields[1], 1)
  append(id, fields[2], entry, cjson.encode({version = 1, type = 'progress', level = level, done = done, total = total}), fields[3])
  redis.call('HSET', key, 'last', entry)
end

-- A piece has ended, and its document, if that still waits, is one piece further, or ends as the piece did.
local function end_piece(id, document, state, event, now)
  local key = request_key(document)
  local fields = redis.call('HMGET', key, 'state', 'levels', 'left', 'model', 'priority', 'submitted')
  if fields[1] ~= 'waiting' then
    return
  end
  if state == 'cancelled' then
    cancel_request(document, CANCELLED)
    return
  end
  local ended = cjson.decode(event)
  if state ~= 'done' then
    end_request(document, 'failed', cjson.encode({version = 1, type = 'failed', code = ended.code,
      message = 'Its piece ' .. id .. ' failed: ' .. ended.message}), now)
    return
  end
  -- A piece may have been too long for the worker that took it, and so a document itself.
  local usage = ended.usage
  redis.call('HINCRBY', key, 'pieces', 1 + (usage.pieces or 0))
  redis.call('HINCRBY', key, 'piece_prompt_tokens', usage.prompt_tokens + (usage.piece_prompt_tokens or 0))
  redis.call('HINCRBY', key, 'piece_completion_tokens', usage.completion_tokens + (usage.piece_completion_tokens or 0))
  local left = tonumber(fields[3]) - 1
  redis.call('HSET', key, 'left', left)
  local level, total = 0, 0
  for number in string.gmatch(fields[2], '%d+') do
    level, total = level + 1, tonumber(number)
  end
  append_progress(document, level, total - left, total)
  if left == 0 then
    redis.call('HSET', key, 'state', 'queued')
    enqueue(document, fields[4], fields[5], tonumber(fields[6]) * 100)
    call_workers()
  end
end

-- A document has ended: nobody needs its pieces any more. Results are kept as long as its own.
local function end_pieces(id, levels, retention)
  local level = 0
  for total in string.gmatch(levels, '%d+') do
    level = level + 1
    for number = 1, tonumber(total) do
      local piece = piece_id(id, level, number)
      if is_live(piece) then
        cancel_request(piece, CANCELLED)
      else
        redis.call('PEXPIRE', request_key(piece), retention)
        redis.call('PEXPIRE', events_key(piece), retention)
      end
    end
  end
end

-- A dead letter is not kept for somebody to look at any more: it expires like any request that has ended.
local function drop_dead(id)
  redis.call('ZREM', dead_key, id)
  local retention = redis.call('HGET', request_key(id), 'retention')
  if retention then
    redis.call('PEXPIRE', request_key(id), retention)
    redis.call('PEXPIRE', events_key(id), retention)
  end
end

-- A request is a dead letter from now on, and does not expire.
local function keep_dead(id, now)
  redis.call('PERSIST', request_key(id))
  redis.call('PERSIST', events_key(id))
  redis.call('ZADD', dead_key, now, id)
  for _, oldest in ipairs(redis.call('ZRANGE', dead_key, 0, -MAX_DEAD - 1)) do
    drop_dead(oldest)
  end
end

-- The last event; whoever calls has checked that the request may end now.
function end_request(id, state, event, now)
  local key = request_key(id)
  local fields = redis.call('HMGET', key, 'attempt', 'count', 'last', 'readers', 'retention', 'worker', 'model', 'conversation',
    'document', 'levels', 'tenant', 'priority', 'tokens', 'deadline', 'charged')
  local entry = entry_after(fields[3], fields[2], tonumber(fields[1]) + 1)
  append(id, fields[3], entry, event, fields[4])
  redis.call('HSET', key, 'state', state, 'last', entry, 'ended', now)
  redis.call('HDEL', key, 'cancel', 'readers', 'charged')
  if fields[8] then
    -- A conversation that does not wait for this request takes nothing from it: it was forgotten, say.
    local waits = redis.call('HMGET', conversation_key(fields[8]), 'busy', 'folding')
    if waits[1] == id then
      end_answer(id, fields[8], state, event, now)
    elseif waits[2] == id then
      end_fold(id, fields[8], state, event)
    end
  end
  local was_running = leave_running(id, fields[7], fields[11])
  if was_running or leave_queue(id, fields[7], fields[11], fields[12], fields[13], fields[14]) then
    end_usage(fields[7], fields[11], fields[12], tonumber(fields[13]), fields[15], event, fields[2], was_running, now)
  end
  if fields[6] and fields[6] ~= '' then
    redis.call('SREM', running_key(fields[6]), id)
  end
  if fields[10] then
    end_pieces(id, fields[10], fields[5])
  end
  if fields[9] then
    end_piece(id, fields[9], state, event, now)
  end
  if state == 'dead' then
    keep_dead(id, now)
  elseif not is_live(fields[9]) then
    -- The document reads the results of its pieces when all of them are there.
    redis.call('PEXPIRE', key, fields[5])
    redis.call('PEXPIRE', events_key(id), fields[5])
  end
end

-- A request ends cancelled while no worker has it: the answer is what its stream has. `template` is a Finished event to fill in.
local function end_cancelled(id, template, now)
  local fields = redis.call('HMGET', request_key(id), 'attempt', 'count', 'submitted', 'claimed', 'pieces', 'piece_prompt_tokens',
    'piece_completion_tokens', 'levels')
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
  local _, num_levels = string.gsub(fields[8] or '', '%d+', '')
  event.attempts = tonumber(fields[1]) - num_levels
  event.usage.completion_tokens = tonumber(fields[2])
  event.usage.pieces = tonumber(fields[5]) or 0
  event.usage.piece_prompt_tokens = tonumber(fields[6]) or 0
  event.usage.piece_completion_tokens = tonumber(fields[7]) or 0
  event.timings.queue_seconds = ((tonumber(fields[4]) or now) - tonumber(fields[3])) / 1000
  if fields[4] then
    event.timings.total_seconds = (now - tonumber(fields[4])) / 1000
  end
  end_request(id, 'cancelled', cjson.encode(event), now)
end

-- Somebody does not want the answer any more. Answers the state before, or false. `template` is a Finished event to fill in.
-- A queued request ends here, and so does a document that waits for its pieces, with all of them; a running one is ended by its worker, which hears of it now on its control channel, or with its
-- next emit or renewal if that message is lost.
function cancel_request(id, template)
  local fields = redis.call('HMGET', request_key(id), 'state', 'worker')
  if fields[1] == 'queued' or fields[1] == 'waiting' then
    end_cancelled(id, template, now_ms())
  elseif fields[1] == 'running' then
    redis.call('HSET', request_key(id), 'cancel', 1)
    redis.call('PUBLISH', prefix .. 'control:' .. fields[2], 'cancel ' .. id)
  end
  return fields[1]
end

-- An attempt is over, and the request is not. Answers how many attempts in a row have brought no new token; `more` is what this one adds to
-- them if it brought none.
local function count_failures(id, more)
  local key = request_key(id)
  local fields = redis.call('HMGET', key, 'count', 'count_before', 'failures')
  local failures = tonumber(fields[3]) or 0
  if tonumber(fields[1]) > (tonumber(fields[2]) or 0) then
    failures = 0
    redis.call('HSET', key, 'count_before', fields[1])
  else
    failures = failures + more
  end
  if failures ~= (tonumber(fields[3]) or 0) then
    redis.call('HSET', key, 'failures', failures)
  end
  return failures
end

-- Too many attempts were lost. A fold is no letter: it is asked for again after a later turn.
local function die(id, failures, what)
  local now = now_ms()
  local is_fold = cjson.decode(redis.call('HGET', request_key(id), 'request')).kind == 'fold'
  end_request(id, is_fold and 'failed' or 'dead', cjson.encode({version = 1, type = 'failed', code = 'dead_letter',
    message = failures .. ' attempts in a row were lost without a new token; at the last one ' .. what .. '. `glmq dead show ' .. id
      .. '` tells of each, `glmq dead retry ' .. id .. '` tries again from the last token.'}), now)
end

-- A running request's attempt is lost: `what` happened to its worker or engine. It becomes a dead letter if that was one attempt too many, and ends if
-- a cancellation is asked for (`template` as in requeue). `is_trial`: it ran alone, so that it counts whatever it brought.
-- Answers whether the request still lives; the caller decides where.
local function lose_attempt(id, what, max_attempts, is_trial, template)
  local key = request_key(id)
  local fields = redis.call('HMGET', key, 'worker', 'attempt', 'count', 'cancel', 'losses')
  if fields[4] then
    end_cancelled(id, template, now_ms())
    return false
  end
  local losses = fields[5] and cjson.decode(fields[5]) or {}
  losses[#losses + 1] = {time = now_ms(), attempt = tonumber(fields[2]), worker = fields[1], tokens = tonumber(fields[3]), what = what}
  if #losses > MAX_LOSSES then
    table.remove(losses, 1)
  end
  redis.call('HSET', key, 'losses', cjson.encode(losses))
  if is_trial then
    redis.call('HSET', key, 'count_before', fields[3])
  end
  local failures = count_failures(id, 1)
  if failures >= max_attempts then
    die(id, failures, what)
    return false
  end
  return true
end

-- Whether this attempt at a request is this worker's ('': anybody's). The number alone does not say so when Redis has come back without its last
-- writes, a claim among them, and another worker has made that claim, too.
local function is_held(id, attempt, worker)
  local fields = redis.call('HMGET', request_key(id), 'state', 'attempt', 'worker')
  return fields[1] == 'running' and fields[2] == attempt and (worker == '' or fields[3] == worker)
end

-- Running → queued, at its old place; whoever claims it goes on from its last token. If a cancellation is asked for, it ends instead.
local function requeue(id, template)
  local key = request_key(id)
  local fields = redis.call('HMGET', key, 'worker', 'model', 'priority', 'submitted', 'cancel', 'tenant')
  if fields[5] then
    end_cancelled(id, template, now_ms())
    return
  end
  count_failures(id, 0)
  redis.call('HSET', key, 'state', 'queued', 'worker', '')
  leave_running(id, fields[2], fields[6])
  redis.call('SREM', running_key(fields[1]), id)
  enqueue(id, fields[2], fields[3], tonumber(fields[4]) * 100)
end
