-- What is set for a tenant changes, and it may run at once what it may run now.
-- ARGV: tenant, settings that change (JSON; '': all go back to the defaults), models that the tenant uses
-- Answers what is set now (JSON).

local tenant, changes = ARGV[1], ARGV[2]
local settings = '{}'
if changes == '' then
  redis.call('HDEL', tenants_key, tenant)
else
  local set = settings_of(tenant)
  for name, value in pairs(cjson.decode(changes)) do
    set[name] = value
  end
  settings = next(set) and cjson.encode(set) or settings
  redis.call('HSET', tenants_key, tenant, settings)
end
for i = 3, #ARGV do
  if redis.call('HEXISTS', usage_key(ARGV[i], tenant), 'held') == 1 then
    free_tenant(ARGV[i], tenant)
  end
end
return settings
