-- A worker's engine died, and with it the attempt at a request.
-- ARGV: id, attempt, how often it was lost in this attempt before, what happened, attempts in a row that may be lost without a new token,
--       whether the worker keeps the request to try it alone (1 or 0), whether it was alone in the engine (1 or 0), Finished event to fill in,
--       worker ('': not to be checked)
-- Answers 2 if the worker keeps it, 1 if it went back to the queue, 0 if it has ended (a dead letter, or cancelled), -1 if fenced.

local id, attempt, num_before, what, max_attempts = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5])
local keeps, is_trial, cancelled = ARGV[6] == '1', ARGV[7] == '1', ARGV[8]
if not is_held(id, attempt, ARGV[9]) then
  return -1
end
local num_losses = 0
local losses = redis.call('HGET', request_key(id), 'losses')
for _, loss in ipairs(losses and cjson.decode(losses) or {}) do
  num_losses = num_losses + (loss.attempt == tonumber(attempt) and 1 or 0)
end
if num_losses > num_before then
  -- The retry of a call whose answer was lost.
  return 2
end
local code = 0
-- Among others it may be innocent: only a trial is the end of one that is kept for it.
if lose_attempt(id, what, keeps and not is_trial and math.huge or max_attempts, is_trial, cancelled) then
  if keeps then
    code = 2
  else
    requeue(id, cancelled)
    call_workers()
    code = 1
  end
end
publish_pushes()
return code
