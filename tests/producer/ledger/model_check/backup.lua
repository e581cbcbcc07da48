-- Puts all keys aside, or back as they were.
-- ARGV: save or restore

local saved = KEYS[1] .. 'test:saved:'
if ARGV[1] == 'save' then
  for _, key in ipairs(server.call('KEYS', saved .. '*')) do
    server.call('DEL', key)
  end
  for _, key in ipairs(server.call('KEYS', KEYS[1] .. '*')) do
    server.call('COPY', key, saved .. string.sub(key, #KEYS[1] + 1))
  end
else
  for _, key in ipairs(server.call('KEYS', KEYS[1] .. '*')) do
    if string.sub(key, 1, #saved) ~= saved then
      server.call('DEL', key)
    end
  end
  for _, key in ipairs(server.call('KEYS', saved .. '*')) do
    server.call('COPY', key, KEYS[1] .. string.sub(key, #saved + 1))
  end
end
