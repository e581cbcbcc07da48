-- The order of the queue, what each tenant uses, and how fast the queue drains; put in front of each script, behind ledger.lua.
--
-- Who goes first: the most urgent priority; in it the tenant that has had the fewest tokens for its weight (its virtual time); of that tenant the oldest
-- request. `shares` has all of it in one sorted set: a member `<priority>|<tenant>` for each tenant with something in the queue at that priority, by priority and
-- then by virtual time. Tenants with as much running as they may have are not in it until something of theirs ends.

-- Scores are below 2^53, so that virtual times (in tokens) stay exact to one.
local PRIORITY = 5e14
-- What a tenant has used is forgotten so long after it has nothing here.
local IDLE_TENANT_MS = 3600000
-- The drain rate is that of about the last minute in which something waited.
local DRAIN_MS = 60000
-- A document that comes back from its pieces has at most a prompt of such a length.
local MAX_REDUCED_TOKENS = 4096

-- A Failed event, for requests that nobody will begin.
local TOO_LATE = '{"version":1,"type":"failed","code":"deadline_exceeded","message":"Its deadline passed while it waited in the queue. '
  .. 'Give it more time, a more urgent priority, or the model more workers."}'

local function shares_key(model) return prefix .. 'shares:' .. model end
local function load_key(model) return prefix .. 'load:' .. model end
local function usage_key(model, tenant) return prefix .. 'usage:' .. model .. '|' .. tenant end
local function queued_key(model, priority, tenant) return prefix .. 'queued:' .. priority .. ':' .. model .. '|' .. tenant end
local deadlines_key = prefix .. 'deadlines'
local tenants_key = prefix .. 'tenants'

-- What was set for a tenant: weight, max_running, max_queued, max_queued_tokens, where they differ from the defaults.
local function settings_of(tenant)
  local text = redis.call('HGET', tenants_key, tenant)
  return text and cjson.decode(text) or {}
end

local function share_score(priority, time)
  -- The bound is reached after years at the lowest weight; beyond it tenants are equal.
  return priority * PRIORITY + math.min(math.floor(time), PRIORITY - 1)
end

-- The least virtual time of all tenants that have something in the queue; if there is none, where the last one was when there was nothing left.
local function least_time(model)
  local least
  local from = '-inf'
  while true do
    local head = redis.call('ZRANGEBYSCORE', shares_key(model), from, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
    if not head[1] then
      return least or tonumber(redis.call('HGET', load_key(model), 'time') or 0)
    end
    local priority = math.floor(tonumber(head[2]) / PRIORITY)
    local time = tonumber(head[2]) - priority * PRIORITY
    least = least and math.min(least, time) or time
    from = string.format('%.0f', (priority + 1) * PRIORITY)
  end
end

-- The tenant's virtual time has changed: so has its place at each priority at which it waits. `queued` is how much it has in the queue; most have all of it at
-- one `priority`.
local function reorder(model, tenant, time, priority, queued)
  if redis.call('ZCARD', queued_key(model, priority, tenant)) == queued then
    redis.call('ZADD', shares_key(model), 'XX', share_score(priority, time), priority .. '|' .. tenant)
    return
  end
  local args = {}
  for each = 0, 9 do
    args[2 * each + 1] = share_score(each, time)
    args[2 * each + 2] = each .. '|' .. tenant
  end
  redis.call('ZADD', shares_key(model), 'XX', unpack(args))
end

-- The tenant may not run more for now: what it has in the queue stays there, and nobody looks at it.
local function hold_tenant(model, tenant)
  local members = {}
  for priority = 0, 9 do
    members[priority + 1] = priority .. '|' .. tenant
  end
  redis.call('HSET', usage_key(model, tenant), 'held', 1)
  redis.call('ZREM', shares_key(model), unpack(members))
end

-- It may run something again; the next claim decides how much.
local function free_tenant(model, tenant)
  local key = usage_key(model, tenant)
  redis.call('HDEL', key, 'held')
  local fields = redis.call('HMGET', key, 'time', 'queued')
  if (tonumber(fields[2]) or 0) == 0 then
    return
  end
  for priority = 0, 9 do
    if redis.call('EXISTS', queued_key(model, priority, tenant)) == 1 then
      redis.call('ZADD', shares_key(model), share_score(priority, tonumber(fields[1])), priority .. '|' .. tenant)
    end
  end
  -- Their tickets have found no work.
  call_workers()
end

-- A request waits, at its place.
local function place(id, model, tenant, priority, submitted_10us, tokens, deadline)
  redis.call('ZADD', queue_key(model), tonumber(priority) * PRIORITY + submitted_10us, id)
  redis.call('ZADD', queued_key(model, priority, tenant), submitted_10us, id)
  if deadline then
    redis.call('ZADD', deadlines_key, deadline, id)
  end
  redis.call('HINCRBY', load_key(model), 'tokens:' .. priority, tokens)
  if redis.call('ZCARD', queue_key(model)) == 1 then
    redis.call('HSET', load_key(model), 'drained_at', now_ms())
  end
  local usage = usage_key(model, tenant)
  local fields = redis.call('HMGET', usage, 'time', 'queued', 'queued_tokens', 'running', 'held')
  local time, queued = tonumber(fields[1]) or 0, tonumber(fields[2]) or 0
  if queued == 0 then
    -- Nobody saves up time by not using any.
    time = math.max(time, least_time(model))
    redis.call('HSET', usage, 'time', time, 'queued', 1, 'queued_tokens', tokens, 'drained_at', now_ms())
    if (tonumber(fields[4]) or 0) == 0 then
      redis.call('PERSIST', usage)
    end
  else
    redis.call('HSET', usage, 'queued', queued + 1, 'queued_tokens', tonumber(fields[3]) + tokens)
  end
  if not fields[5] then
    redis.call('ZADD', shares_key(model), share_score(priority, time), priority .. '|' .. tenant)
  end
end

-- Queued again.
function enqueue(id, model, priority, submitted_10us)
  local fields = redis.call('HMGET', request_key(id), 'tenant', 'tokens', 'deadline')
  place(id, model, fields[1], priority, submitted_10us, tonumber(fields[2]), fields[3])
end

-- A request that nobody knows yet enters the queue. Answers the time, in ms.
-- `tokens`: what it will take, prompt and answer, by estimate. `deadline`: in ms, or nil.
-- `behind`: its place among those that the same script creates, whose time is the same.
local function create_request(id, digest, model, tenant, priority, request, retention, tokens, deadline, behind)
  local time = redis.call('TIME')
  local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
  tokens = math.max(1, math.floor(tonumber(tokens)))
  local fields = {'state', 'queued', 'request', request, 'digest', digest, 'model', model, 'tenant', tenant, 'priority', priority, 'attempt', 0,
    'count', 0, 'last', '0-0', 'submitted', now, 'retention', retention, 'tokens', tokens}
  if deadline then
    fields[#fields + 1] = 'deadline'
    fields[#fields + 1] = deadline
  end
  redis.call('HSET', request_key(id), unpack(fields))
  place(id, model, tenant, priority, tonumber(time[1]) * 100000 + math.floor(tonumber(time[2]) / 10) + (behind or 0), tokens, deadline)
  return now
end

-- What a tenant has used is kept for a while after it has nothing here any more.
local function forget_idle(usage, queued, running)
  if queued == 0 and running == 0 then
    redis.call('PEXPIRE', usage, IDLE_TENANT_MS)
  end
end

-- A request does not wait any more, for whatever reason. Answers false, and does nothing, if it did not.
function leave_queue(id, model, tenant, priority, tokens, deadline)
  if redis.call('ZREM', queue_key(model), id) == 0 then
    return false
  end
  local queued_at_priority = queued_key(model, priority, tenant)
  redis.call('ZREM', queued_at_priority, id)
  if deadline then
    redis.call('ZREM', deadlines_key, id)
  end
  redis.call('HINCRBY', load_key(model), 'tokens:' .. priority, -tokens)
  local usage = usage_key(model, tenant)
  redis.call('HINCRBY', usage, 'queued_tokens', -tokens)
  local queued = redis.call('HINCRBY', usage, 'queued', -1)
  if redis.call('EXISTS', queued_at_priority) == 0 then
    redis.call('ZREM', shares_key(model), priority .. '|' .. tenant)
  end
  forget_idle(usage, queued, tonumber(redis.call('HGET', usage, 'running') or 0))
  return true
end

-- A request does not run any more, for whatever reason. Answers false, and does nothing, if it did not.
function leave_running(id, model, tenant)
  if redis.call('ZREM', leases_key, id) == 0 then
    return false
  end
  local usage = usage_key(model, tenant)
  local running = redis.call('HINCRBY', usage, 'running', -1)
  local fields = redis.call('HMGET', usage, 'queued', 'held')
  if fields[2] then
    free_tenant(model, tenant)
  end
  forget_idle(usage, tonumber(fields[1]) or 0, running)
  return true
end

-- Fields of a load or a usage that say how fast it drains, with one more answer that has ended while others waited: `tokens`, an estimate like that of what
-- waits, have made room. Counted in ends, not in claims, because those that fill free slots say nothing of how fast slots become free.
local function drained(fields, tokens, now)
  local elapsed = math.max(now - (tonumber(fields[3]) or now), 0)
  local kept = math.exp(-elapsed / DRAIN_MS)
  return 'drained', (tonumber(fields[1]) or 0) * kept + tokens, 'drained_ms', (tonumber(fields[2]) or 0) * kept + elapsed, 'drained_at', now
end

-- The estimate `charged`, by which the tenant was charged at a request's first claim, gives way to what the request used, in tokens.
local function settle(model, tenant, priority, charged, used)
  local usage = usage_key(model, tenant)
  local fields = redis.call('HMGET', usage, 'time', 'queued', 'used')
  local time = math.max(tonumber(fields[1]) + (used - tonumber(charged)) / (settings_of(tenant).weight or 1), 0)
  redis.call('HSET', usage, 'time', time, 'used', (tonumber(fields[3]) or 0) + used)
  if tonumber(fields[2]) > 0 then
    reorder(model, tenant, time, priority, tonumber(fields[2]))
  end
end

-- A request has ended that ran or waited. `charged` may be false. `event` is its last one, `count` the number of its answer's tokens.
function end_usage(model, tenant, priority, tokens, charged, event, count, was_running, now)
  if charged then
    local used = tonumber(string.match(event, '"prompt_tokens":(%d+)'))
    if used then
      used = used + tonumber(count)
    else
      -- A failure does not say how long the prompt was. Without a token it was nobody's work.
      used = tonumber(count) > 0 and tokens or 0
    end
    settle(model, tenant, priority, charged, used)
  end
  if was_running and redis.call('EXISTS', queue_key(model)) == 1 then
    local load, usage = load_key(model), usage_key(model, tenant)
    redis.call('HSET', load, drained(redis.call('HMGET', load, 'drained', 'drained_ms', 'drained_at'), tokens, now))
    local fields = redis.call('HMGET', usage, 'drained', 'drained_ms', 'drained_at', 'queued')
    if tonumber(fields[4]) > 0 then
      redis.call('HSET', usage, drained(fields, tokens, now))
    end
  end
end

-- Ends what waited beyond its deadline, `at_most` requests. Answers how many.
local function end_expired(at_most, now)
  local expired = redis.call('ZRANGEBYSCORE', deadlines_key, '-inf', now, 'LIMIT', 0, at_most)
  for _, id in ipairs(expired) do
    local fields = redis.call('HMGET', request_key(id), 'state', 'model')
    if fields[1] == 'queued' then
      count_rejected(fields[2], 'deadline_exceeded')
      end_request(id, 'failed', TOO_LATE, now)
    else
      redis.call('ZREM', deadlines_key, id)
    end
  end
  return #expired
end
