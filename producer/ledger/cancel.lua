-- Somebody does not want the answer any more.
-- ARGV: id, Finished event to fill in
-- Answers the state before, or nil for an unknown id.

local state = cancel_request(ARGV[1], ARGV[2])
publish_pushes()
return state
