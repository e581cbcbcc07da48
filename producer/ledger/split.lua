-- A worker has cut a document into pieces: they enter the queue, and the document waits for them without a worker.
-- ARGV: id, attempt, level of the pieces (1: of the text itself), their priority, worker ('': not to be checked), then of each its request and the tokens that it will take, by estimate
-- Answers {1}, {0} if this attempt did so before (a retry whose first answer was lost), {-1} if fenced, {-2} if a cancellation is asked for,
--         {-3, id} if a piece's id is taken by another request.

local id, attempt, level, priority, worker = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
local key = request_key(id)
local fields = redis.call('HMGET', key, 'state', 'attempt', 'cancel', 'levels', 'model', 'tenant', 'retention', 'worker', 'deadline',
  'tokens', 'charged', 'priority')
local levels = fields[4] or ''
local _, num_levels = string.gsub(levels, '%d+', '')
if fields[2] == attempt and fields[1] == 'waiting' and num_levels == level then
  return {0}
elseif fields[2] ~= attempt or fields[1] ~= 'running' or num_levels ~= level - 1 or (worker ~= '' and worker ~= fields[8]) then
  return {-1}
elseif fields[3] then
  return {-2}
end
local total = (#ARGV - 5) / 2
for number = 1, total do
  local piece = piece_id(id, level, number)
  if redis.call('EXISTS', request_key(piece)) == 1 then
    return {-3, piece}
  end
end
for number = 1, total do
  local piece = piece_id(id, level, number)
  create_request(piece, '', fields[5], fields[6], priority, ARGV[4 + 2 * number], fields[7], ARGV[5 + 2 * number], fields[9], number)
  redis.call('HSET', request_key(piece), 'document', id)
end
redis.call('HSET', key, 'state', 'waiting', 'worker', '', 'levels', levels == '' and total or levels .. ',' .. total, 'left', total)
redis.call('HDEL', key, 'failures', 'charged')
-- The work is its pieces' from here on, and what is left of its own is a prompt of their summaries.
settle(fields[5], fields[6], fields[12], fields[11], 0)
redis.call('HSET', key, 'tokens', math.min(tonumber(fields[10]), MAX_REDUCED_TOKENS))
leave_running(id, fields[5], fields[6])
redis.call('SREM', running_key(fields[8]), id)
append_progress(id, level, 0, total)
call_workers()
publish_pushes()
return {1}
