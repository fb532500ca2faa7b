-- Look a value up; if there is none that is valid, hand out the right to compute it.
-- KEYS: value, lease   ARGV: token ('': want no lease), lease_ms, prefix of tags, etag of a value to ignore ('': none),
--                            new tag version, tags to be made if missing...
-- A value starts with a line of "tag=version" words; it is valid while every tag still has that version. The versions
-- are random, not counted: a tag that was evicted makes its values miss and can never make an old one valid again.
-- Returns {1, value, pttl} for a value; {2, "tag=version ..."} when the lease is ours; {3, pttl} when somebody else
-- computes; {0} when there is no value and no lease was wanted.
local value = redis.call('GET', KEYS[1])
if value then
  local head = string.match(value, '^([^\n]*)\n') or ''
  for tag, version in string.gmatch(head, '(%S+)=(%S+)') do
    if redis.call('GET', ARGV[3] .. tag) ~= version then value = false break end
  end
  if value and (ARGV[4] == '' or string.sub(value, #head + 2, #head + 1 + #ARGV[4]) ~= ARGV[4]) then
    return {1, value, redis.call('PTTL', KEYS[1])}
  end
end
if ARGV[1] == '' then return {0} end
if not redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', ARGV[2]) then return {3, redis.call('PTTL', KEYS[2])} end
local words = {}
for i = 6, #ARGV do
  local key = ARGV[3] .. ARGV[i]
  redis.call('SET', key, ARGV[5], 'NX')
  words[#words + 1] = ARGV[i] .. '=' .. redis.call('GET', key)
end
return {2, table.concat(words, ' ')}
