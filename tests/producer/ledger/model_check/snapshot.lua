-- What the ledger has in Redis, in one answer.
-- ARGV: the keys to read, without their prefix; none: all there are
-- Answers {{name of the key without its prefix, type, content} each, {key, ms at which it expires, ...}, messages published since the last time}.

local names = ARGV
if #ARGV == 0 then
  names = {}
  for _, key in ipairs(server.call('KEYS', KEYS[1] .. '*')) do
    local name = string.sub(key, #KEYS[1] + 1)
    if string.sub(name, 1, 5) ~= 'test:' then
      names[#names + 1] = name
    end
  end
end
local found = {}
for _, name in ipairs(names) do
  local key = KEYS[1] .. name
  local kind = server.call('TYPE', key).ok
  if kind ~= 'none' then
    local content
    if kind == 'hash' then
      content = server.call('HGETALL', key)
    elseif kind == 'stream' then
      content = server.call('XRANGE', key, '-', '+')
    elseif kind == 'zset' then
      content = server.call('ZRANGE', key, 0, -1, 'WITHSCORES')
    elseif kind == 'set' then
      content = server.call('SMEMBERS', key)
    elseif kind == 'list' then
      content = server.call('LRANGE', key, 0, -1)
    else
      content = server.call('GET', key)
    end
    found[#found + 1] = {name, kind, content}
  end
end
local expiries = server.call('ZRANGE', expiries_key, 0, -1, 'WITHSCORES')
local published = server.call('LRANGE', published_key, 0, -1)
server.call('DEL', published_key)
return {found, expiries, published}
