-- A new request enters the queue.
-- ARGV: id, digest of the body, model, tenant, priority, request, ms until the deadline (0: none), retention in ms,
--       idempotency key ('': none), how long to remember it in ms, name of the conversation ('': none), its id, its lifetime in ms,
--       tokens that it will take, by estimate, and the bounds (0: none): requests in the queue, their tokens, requests of one tenant, their tokens
-- Answers {1 new | 0 known before | -1 the id or the idempotency key belongs to another body, id of the request}, or
-- {-2, id of the request that is being answered in the conversation}, {-3, reason, ms after which to try again, what is full, its bound}, or
-- {-4, ms that it would wait before its turn}. What is refused leaves a count of its reason and, if it shall come back, its place in the line.

local id, digest, model, tenant, priority, request = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local deadline, retention, idempotency_key, idempotency_ms = tonumber(ARGV[7]), ARGV[8], ARGV[9], ARGV[10]
local conversation, conversation_id, lifetime = ARGV[11], ARGV[12], ARGV[13]
local tokens = tonumber(ARGV[14])
local key = request_key(id)

-- Those who were refused are told when there will be room for them, one behind the other, and not all the same moment. That only holds if nobody else takes
-- the room first: while somebody has such a promise, this part of a bound is for those who come back, known by tenant and digest.
local KEPT_ROOM = 0.1
-- Nobody is told a longer time, and beyond it nothing is promised.
local HORIZON_MS = 60000
-- A promise holds from somewhat before its time to somewhat after it: clients round.
local EARLY_MS, LATE_MS = 50, 2000
-- No rate is believed that was measured for less than this.
local LEAST_MEASURED_MS = 1000

-- The answer about an id or an idempotency key that is known.
local function known_before(known_digest, known_id)
  if known_digest == digest then
    return {0, known_id}
  end
  count_rejected(model, 'idempotency_conflict')
  return {-1, known_id}
end

local known = redis.call('HGET', key, 'digest')
if known then
  return known_before(known, id)
end
local record_key = prefix .. 'idempotency:' .. tenant .. ':' .. idempotency_key
if idempotency_key ~= '' then
  local record = redis.call('GET', record_key)
  if record then
    local known_id, known_digest = string.match(record, '^(%S+) (%S+)$')
    return known_before(known_digest, known_id)
  end
end
if conversation ~= '' then
  local busy = redis.call('HGET', conversation_key(conversation), 'busy')
  if is_live(busy) then
    count_rejected(model, 'conversation_busy')
    return {-2, busy}
  end
end

local now = now_ms()

-- Tokens that leave the queue in a ms, from the fields drained, drained_ms and drained_at; nil: nothing is known of it.
local function drain_rate(drained, drained_ms, drained_at)
  drained = tonumber(drained) or 0
  if drained > 0 then
    return drained / math.max(tonumber(drained_ms) + math.max(now - tonumber(drained_at), 0), LEAST_MEASURED_MS)
  end
end

-- One of two bounds: the model's and the tenant's. Answers ms after which there is room for this request, and what is full and its bound; nil if there is room now.
-- `used` and `bound` are {requests, tokens}.
local function wait_for_room(line, used, bound, rate, waiting_since)
  local size = {1, tokens}
  local function over(which, share)
    -- What is larger than the whole queue may be alone in it.
    if bound[which] <= 0 or used[which] == 0 then
      return 0
    end
    return math.max(used[which] + size[which] - math.floor(bound[which] * share), 0)
  end
  if over(1, 1 - KEPT_ROOM) == 0 and over(2, 1 - KEPT_ROOM) == 0 then
    return nil
  end
  redis.call('ZREMRANGEBYSCORE', line, '-inf', '(' .. (now - LATE_MS))
  local name = tenant .. '|' .. digest
  local due = tonumber(redis.call('ZSCORE', line, name) or nil)
  local last = redis.call('ZRANGE', line, -1, -1, 'WITHSCORES')[2]
  local is_next = not last or (due and (due <= now + EARLY_MS or redis.call('ZRANGE', line, 0, 0)[1] == name))
  local share = is_next and 1 or 1 - KEPT_ROOM
  local over_requests, over_tokens = over(1, share), over(2, share)
  if over_requests == 0 and over_tokens == 0 then
    if due then
      redis.call('ZREM', line, name)
    end
    return nil
  end
  local need = math.max(over(1, 1) * used[2] / used[1], over(2, 1))
  if not due or due <= now + EARLY_MS then
    if rate then
      -- Who comes back in time and finds no room is first in the line again; who is new is last.
      due = math.max(now + need / rate, not due and last and tonumber(last) + tokens / rate or 0)
    else
      -- As long again as it has waited so far, and not everybody at the same moment.
      local spread = 1 + tonumber(string.sub(digest, 1, 4), 16) / 65536
      due = now + math.min(math.max(now - waiting_since, 1000), HORIZON_MS / 2) * spread
    end
    if due - now <= HORIZON_MS and (deadline == 0 or due - now <= deadline) then
      redis.call('ZADD', line, math.floor(due), name)
      redis.call('PEXPIRE', line, HORIZON_MS + LATE_MS)
    end
  end
  local wait = math.min(math.max(math.ceil(due - now), EARLY_MS), HORIZON_MS)
  if over_requests > 0 then
    return wait, 'requests', bound[1]
  end
  return wait, 'tokens', bound[2]
end

-- Why this request cannot be accepted now, as the script answers it; nil if it can.
local function refusal()
  local load = redis.call('HMGET', load_key(model), 'tokens:0', 'tokens:1', 'tokens:2', 'tokens:3', 'tokens:4', 'tokens:5', 'tokens:6', 'tokens:7',
    'tokens:8', 'tokens:9', 'drained', 'drained_ms', 'drained_at')
  local num_queued = redis.call('ZCARD', queue_key(model))
  if num_queued == 0 then
    return nil
  end
  local usage = redis.call('HMGET', usage_key(model, tenant), 'queued', 'queued_tokens', 'drained', 'drained_ms', 'drained_at')
  local settings = settings_of(tenant)
  local total = 0
  for i = 1, 10 do
    load[i] = tonumber(load[i]) or 0
    total = total + load[i]
  end
  local rate = drain_rate(load[11], load[12], load[13])
  local line = prefix .. 'promised:' .. model
  local wait, what, bound = wait_for_room(line, {num_queued, total}, {tonumber(ARGV[15]), tonumber(ARGV[16])}, rate, tonumber(load[13]) or now)
  local reason = 'queue_full'
  local own_wait, own_what, own_bound = wait_for_room(line .. '|' .. tenant, {tonumber(usage[1]) or 0, tonumber(usage[2]) or 0},
    {settings.max_queued or tonumber(ARGV[17]), settings.max_queued_tokens or tonumber(ARGV[18])},
    drain_rate(usage[3], usage[4], usage[5]) or rate, tonumber(usage[5]) or now)
  if own_wait and own_wait > (wait or 0) then
    wait, what, bound, reason = own_wait, own_what, own_bound, 'tenant_queue_full'
  end
  if wait then
    count_rejected(model, reason)
    return {-3, reason, wait, what, bound}
  end
  if deadline == 0 or not rate then
    return nil
  end
  -- Before it go all that are more urgent and, of its own priority, what its tenant has there already and what the others may have meanwhile.
  local own = tonumber(priority)
  local ahead = 0
  for other = 0, own - 1 do
    ahead = ahead + load[other + 1]
  end
  local first, last = string.format('%.0f', own * PRIORITY), string.format('(%.0f', (own + 1) * PRIORITY)
  local num_equal = redis.call('ZCOUNT', queue_key(model), first, last)
  if num_equal > 0 then
    local num_own = redis.call('ZCARD', queued_key(model, priority, tenant))
    local num_others = redis.call('ZCOUNT', shares_key(model), first, last) - (num_own > 0 and 1 or 0)
    local weight = settings.weight or 1
    local equal = load[own + 1]
    ahead = ahead + math.min(equal, num_own * equal / num_equal * (weight + num_others) / weight)
  end
  if ahead / rate > deadline then
    count_rejected(model, 'deadline_unmeetable')
    return {-4, math.ceil(ahead / rate)}
  end
end

local refused = refusal()
if refused then
  return refused
end

if idempotency_key ~= '' then
  redis.call('SET', record_key, id .. ' ' .. digest, 'PX', idempotency_ms)
end
create_request(id, digest, model, tenant, priority, request, retention, tokens, deadline > 0 and now + deadline)
if conversation ~= '' then
  redis.call('HSET', key, 'conversation', conversation)
  begin_answer(id, conversation, conversation_id, tenant, model, lifetime, now)
end
return {1, id}
