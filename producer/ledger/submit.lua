-- A new request enters the queue.
-- ARGV: id, digest of the body, model, tenant, priority, request, ms until the deadline (0: none), retention in ms,
--       idempotency key ('': none), how long to remember it in ms, name of the conversation ('': none), its id, its lifetime in ms,
--       tokens that it will take, by estimate, and the bounds (0: none): requests in the queue, their tokens, requests of one tenant, their tokens
-- Answers {1 new | 0 known before | -1 the id or the idempotency key belongs to another body, id of the request}, or
-- {-2, id of the request that is being answered in the conversation}, {-3, reason, ms after which to try again, what is full, its bound}, or
-- {-4, ms that it would wait before its turn, ms after which to try again}. What is refused leaves a count of its reason and, if it shall come back, its place in the line.

local id, digest, model, tenant, priority, request = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local deadline, retention, idempotency_key, idempotency_ms = tonumber(ARGV[7]), ARGV[8], ARGV[9], ARGV[10]
local conversation, conversation_id, lifetime = ARGV[11], ARGV[12], ARGV[13]
local tokens = tonumber(ARGV[14])
local key = request_key(id)

-- Those who were refused stand in a line, known by tenant and digest: each is told when those before it and then itself will have found room, and not all the same
-- moment. Who comes back finds room when all who are left before it have some, too. Room that nobody of the line takes goes to others: beyond this part of a
-- bound they are let in whoever stands in the line.
local KEPT_ROOM = 0.1
-- Nobody is told a longer time, and whose turn is later does not stand in the line.
local HORIZON_MS = 60000
-- Nobody is told a shorter time.
local LEAST_MS = 50
-- Who has not come back so long after its time has left the line.
local LATE_MS = 2000
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

-- One of the bounds: the model's or, `whose` '|<tenant>', the tenant's. Answers ms after which there is room for this request, what is full, and its bound; nil if
-- there is room now. `used` and `bound` are {requests, tokens}.
local function wait_for_room(whose, used, bound, rate, waiting_since)
  local function over(which, each, num_ahead, share)
    -- What is larger than the whole queue may be alone in it.
    if bound[which] <= 0 or used[which] == 0 then
      return 0
    end
    return math.max(used[which] + (num_ahead + 1) * each - math.floor(bound[which] * share), 0)
  end
  if over(1, 1, 0, 1 - KEPT_ROOM) == 0 and over(2, tokens, 0, 1 - KEPT_ROOM) == 0 then
    return nil
  end
  local line, expected = prefix .. 'promised:' .. model .. whose, prefix .. 'expected:' .. model .. whose
  local name = tenant .. '|' .. digest
  for _, gone in ipairs(redis.call('ZRANGEBYSCORE', expected, '-inf', '(' .. (now - LATE_MS), 'LIMIT', 0, 100)) do
    redis.call('ZREM', expected, gone)
    redis.call('ZREM', line, gone)
  end
  local rank = redis.call('ZRANK', line, name)
  local num_ahead = rank or redis.call('ZCARD', line)
  local over_requests, over_tokens = over(1, 1, num_ahead, 1), over(2, tokens, num_ahead, 1)
  local wait
  if over_requests > 0 or over_tokens > 0 then
    if rate then
      wait = math.max(over_requests > 0 and over_requests * used[2] / used[1] or 0, over_tokens) / rate
    else
      -- As long again as it has waited so far, and not everybody at the same moment.
      local spread = 1 + tonumber(string.sub(digest, 1, 4), 16) / 65536
      wait = math.min(math.max(now - waiting_since, 1000), HORIZON_MS / 2) * spread
    end
    wait = math.max(math.ceil(wait), LEAST_MS)
  end
  if wait and wait <= HORIZON_MS and (deadline == 0 or wait <= deadline) then
    if not rank then
      redis.call('ZADD', line, now, name)
    end
    redis.call('ZADD', expected, now + wait, name)
    redis.call('PEXPIRE', line, HORIZON_MS + LATE_MS)
    redis.call('PEXPIRE', expected, HORIZON_MS + LATE_MS)
  elseif rank then
    redis.call('ZREM', line, name)
    redis.call('ZREM', expected, name)
  end
  if wait then
    wait = math.min(wait, HORIZON_MS)
    if over_requests > 0 then
      return wait, 'requests', bound[1]
    end
    return wait, 'tokens', bound[2]
  end
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
  local wait, what, bound = wait_for_room('', {num_queued, total}, {tonumber(ARGV[15]), tonumber(ARGV[16])}, rate, tonumber(load[13]) or now)
  local reason = 'queue_full'
  local own_wait, own_what, own_bound = wait_for_room('|' .. tenant, {tonumber(usage[1]) or 0, tonumber(usage[2]) or 0},
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
  -- As if there were a bound on what may go before it. Its own tokens are no part of that.
  local too_late = wait_for_room('', {0, ahead - tokens}, {0, rate * deadline}, rate, now)
  if too_late then
    count_rejected(model, 'deadline_unmeetable')
    return {-4, math.max(math.ceil(ahead / rate), deadline), too_late}
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
