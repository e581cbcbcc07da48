-- Put in front of a script: the test says what time it is, when keys expire, and hears what is published.
--
-- KEYS[2] is the time in µs. Keys that are to expire are noted in a sorted set and deleted by the first script that runs after their time, as
-- the server itself would have it. Published messages are kept in a list. Everything else is the server's own.

local server = redis
local clock_us = tonumber(KEYS[2])
local expiries_key = KEYS[1] .. 'test:expiries'
local published_key = KEYS[1] .. 'test:published'

local function delete(...)
  server.call('ZREM', expiries_key, ...)
  return server.call('DEL', ...)
end

for _, key in ipairs(server.call('ZRANGEBYSCORE', expiries_key, '-inf', math.floor(clock_us / 1000))) do
  delete(key)
end

local own_commands = {
  TIME = function()
    return {string.format('%d', math.floor(clock_us / 1000000)), string.format('%d', clock_us % 1000000)}
  end,
  PEXPIRE = function(key, ms, option)
    assert(option == nil, 'PEXPIRE with an option is not controlled')
    if server.call('EXISTS', key) == 0 then
      return 0
    elseif tonumber(ms) <= 0 then
      delete(key)
    else
      server.call('ZADD', expiries_key, math.floor(clock_us / 1000) + tonumber(ms), key)
    end
    return 1
  end,
  PERSIST = function(key)
    return server.call('ZREM', expiries_key, key)
  end,
  SET = function(key, value, option, ms, more)
    assert((option == nil or option == 'PX') and more == nil, 'SET with this option is not controlled')
    server.call('SET', key, value)
    server.call('ZREM', expiries_key, key)
    if option then
      server.call('ZADD', expiries_key, math.floor(clock_us / 1000) + tonumber(ms), key)
    end
    return {ok = 'OK'}
  end,
  DEL = delete,
  UNLINK = delete,
  PUBLISH = function(channel, message)
    server.call('RPUSH', published_key, string.sub(channel, #KEYS[1] + 1), message)
    return 0
  end,
}
for _, name in ipairs({'EXPIRE', 'EXPIREAT', 'PEXPIREAT', 'TTL', 'PTTL', 'GETEX', 'SETEX', 'PSETEX', 'HEXPIRE', 'HPEXPIRE', 'RENAME', 'COPY', 'GETDEL'}) do
  own_commands[name] = function()
    error(name .. ' is not controlled: add it to controlled_time.lua')
  end
end

local redis = setmetatable({
  call = function(command, ...)
    local own = own_commands[string.upper(command)]
    if own then
      return own(...)
    end
    return server.call(command, ...)
  end,
}, {__index = server})

