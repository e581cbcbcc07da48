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
local leases_key = prefix .. 'leases'
local workers_key = prefix .. 'workers'

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
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

-- The last event; whoever calls has checked that the request may end now.
local function end_request(id, state, event, now)
  local key = request_key(id)
  local fields = redis.call('HMGET', key, 'attempt', 'count', 'last', 'readers', 'retention', 'worker', 'model')
  local entry = fields[2] .. '-' .. (tonumber(fields[1]) + 1)
  append(id, fields[3], entry, event, fields[4])
  redis.call('HSET', key, 'state', state, 'last', entry, 'ended', now)
  redis.call('HDEL', key, 'cancel', 'readers')
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
