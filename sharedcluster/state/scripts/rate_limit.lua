-- GCRA: the key holds the theoretical arrival time of the next event, in microseconds of Redis's clock.
-- KEYS: limit   ARGV: interval between events in us, tolerance in us (interval * limit), cost in events, take 0|1
-- Returns {allowed 0|1, remaining, retry_after_us (-1: the cost can never be had), reset_after_us}.
local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]
local interval, tolerance, cost = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local tat = math.max(tonumber(redis.call('GET', KEYS[1]) or '0'), now)
local next_tat = tat + interval * cost
local allow_at = next_tat - tolerance
if allow_at > now then
  local retry = allow_at - now
  if interval * cost > tolerance then retry = -1 end
  return {0, math.floor((tolerance - (tat - now)) / interval + 0.000001), math.ceil(retry), math.ceil(tat - now)}
end
if ARGV[4] == '1' then
  redis.call('SET', KEYS[1], string.format('%.0f', next_tat), 'PX', math.max(1, math.ceil((next_tat - now) / 1000)))
else
  next_tat = tat
end
return {1, math.floor((tolerance - (next_tat - now)) / interval + 0.000001), 0, math.ceil(next_tat - now)}
