-- A worker takes the request whose turn it is (queue.lua).
-- ARGV: model, worker, lease in ms, requests of a tenant that may run at a time (0: no limit), ms of waiting from which a less urgent request is aged,
--       and once in how many claims such a one goes first (0: never)
-- Answers {1, id, attempt, request, ms in the queue before the first claim, ms until the deadline (-1: none), events so far,
--          ms since submit, {pieces of each level so far, and of them all: number, prompt tokens, completion tokens;
--          the document that it is a piece of; attempts in a row that brought no token}},
-- {0} when there is no work that may run now, {2} when it only cleared away what was in the way: call again.

local model, worker, lease, max_running = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local ageing_ms, ageing_claims = tonumber(ARGV[5]), tonumber(ARGV[6])
local now = now_ms()
local shares, load = shares_key(model), load_key(model)

-- Of the priorities less urgent than this one, that whose oldest request has waited longest, if that is too long. Its tenants take their turns.
local function aged_member(priority)
  local oldest, found
  for other = priority + 1, 9 do
    local first, last = string.format('%.0f', other * PRIORITY), string.format('(%.0f', (other + 1) * PRIORITY)
    local head = redis.call('ZRANGEBYSCORE', queue_key(model), first, last, 'WITHSCORES', 'LIMIT', 0, 1)
    local submitted = head[2] and (tonumber(head[2]) - other * PRIORITY) / 100
    if submitted and now - submitted > ageing_ms and submitted < (oldest or now) then
      local member = redis.call('ZRANGEBYSCORE', shares, first, last, 'LIMIT', 0, 1)[1]
      if member then
        oldest, found = submitted, member
      end
    end
  end
  return found
end

-- Bounded, so that a thousand requests past their deadline, or a thousand tenants at their limits, do not stop the server for long.
if end_expired(100, now) == 100 then
  publish_pushes()
  return {2}
end
for _ = 1, 100 do
  local member = redis.call('ZRANGE', shares, 0, 0)[1]
  if not member then
    publish_pushes()
    return {0}
  end
  local num_claims = tonumber(redis.call('HGET', load, 'claims') or 0) + 1
  if ageing_claims > 0 and num_claims >= ageing_claims then
    num_claims = 0
    member = aged_member(tonumber(string.sub(member, 1, 1))) or member
  end
  local priority, tenant = tonumber(string.sub(member, 1, 1)), string.sub(member, 3)
  local usage = usage_key(model, tenant)
  local used = redis.call('HMGET', usage, 'time', 'running', 'queued', 'queued_tokens')
  local settings = settings_of(tenant)
  local limit, running = settings.max_running or max_running, tonumber(used[2]) or 0
  local own_queue = queued_key(model, priority, tenant)
  local id = not (limit > 0 and running >= limit) and redis.call('ZPOPMIN', own_queue)[1]
  local key = id and request_key(id)
  local fields = id and redis.call('HMGET', key, 'state', 'attempt', 'deadline', 'submitted', 'request', 'count', 'claimed', 'tokens', 'charged',
    'levels', 'pieces', 'piece_prompt_tokens', 'piece_completion_tokens', 'document', 'failures')
  if limit > 0 and running >= limit then
    hold_tenant(model, tenant)
  elseif not id then
    redis.call('ZREM', shares, member)
  elseif fields[1] ~= 'queued' then
    redis.call('ZREM', queue_key(model), id)
  else
    local tokens, charged = tonumber(fields[8]), fields[9]
    redis.call('ZREM', queue_key(model), id)
    local deadline = tonumber(fields[3])
    if deadline then
      redis.call('ZREM', deadlines_key, id)
    end

    local attempt, claimed = tonumber(fields[2]) + 1, tonumber(fields[7]) or now
    redis.call('HSET', key, 'state', 'running', 'attempt', attempt, 'worker', worker, 'claimed', claimed, 'charged', charged or tokens)
    redis.call('ZADD', leases_key, now + lease, id)
    redis.call('SADD', running_key(worker), id)

    -- An attempt after the first one goes on with what was charged for already.
    local time, queued = tonumber(used[1]) + (charged and 0 or tokens / (settings.weight or 1)), tonumber(used[3]) - 1
    redis.call('HSET', usage, 'time', time, 'running', running + 1, 'queued', queued, 'queued_tokens', tonumber(used[4]) - tokens)
    redis.call('HSET', load, 'claims', num_claims, 'tokens:' .. priority, tonumber(redis.call('HGET', load, 'tokens:' .. priority)) - tokens)
    local left_at_priority = redis.call('ZCARD', own_queue)
    if left_at_priority == 0 then
      redis.call('ZREM', shares, member)
      if queued == 0 and redis.call('EXISTS', shares) == 0 then
        -- Where the next one begins that has something in the queue.
        redis.call('HSET', load, 'time', math.max(time, tonumber(redis.call('HGET', load, 'time') or 0)))
      end
    end
    if queued > 0 then
      if limit > 0 and running + 1 >= limit then
        hold_tenant(model, tenant)
      elseif not charged then
        reorder(model, tenant, time, priority, queued)
      end
    end

    local events = {}
    if fields[6] ~= '0' then
      events = redis.call('XRANGE', events_key(id), '-', '+')
    end
    publish_pushes()
    return {1, id, attempt, fields[5], claimed - tonumber(fields[4]), deadline and deadline - now or -1, events, now - tonumber(fields[4]),
      {fields[10], fields[11], fields[12], fields[13], fields[14], fields[15]}}
  end
end
publish_pushes()
return {2}
