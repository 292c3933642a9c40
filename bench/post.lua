-- Sends the lines of a file, each `METHOD path body`, one after the other and again from the first; at
-- the end prints one line of JSON. wrk runs it with one thread: one order, the same always.
--
-- Arguments: the file; how a right answer begins, or nothing for those of GraphQL; for how many seconds
-- to send, and over how many connections. With these two, sending begins when the server has had time to
-- accept the connections (some accept one at a time between requests), what was sent is waited for, and
-- wrk ends when all of it is answered: no work of the server is left uncounted. Without them, wrk ends
-- when its duration is over.

local ffi = require("ffi")
ffi.cdef [[
  struct moment { long seconds; long nanoseconds; };
  int clock_gettime(int clock, struct moment *found);
  int getpid(void);
  int kill(int pid, int signal);
]]
local MONOTONIC, INTERRUPT = 1, 2
local ACCEPTED, NEVER = 300, 3600 * 1000 -- milliseconds

local lines, place, threads = {}, 0, {}
local found = ffi.new("struct moment")
local begins, until_then

local function now()
  ffi.C.clock_gettime(MONOTONIC, found)
  return tonumber(found.seconds) + tonumber(found.nanoseconds) / 1e9
end

local function is_over()
  return until_then ~= nil and first ~= nil and now() >= until_then
end

function setup(thread)
  table.insert(threads, thread)
end

function init(arguments)
  for line in io.lines(arguments[1]) do
    local method, path, body = line:match("^(%S+) (%S+) ?(.*)$")
    local headers = { ["Content-Type"] = body ~= "" and "application/json" or nil }
    table.insert(lines, wrk.format(method, path, headers, body ~= "" and body or nil))
  end
  begins = arguments[2] ~= "" and arguments[2] or '{"data":'
  seconds = tonumber(arguments[3])
  wrong, sent, answered, first, last = 0, -1, 0, nil, nil -- wrk takes one request to look at it
  opening = tonumber(arguments[4]) or 0
  if seconds then
    function delay()
      if opening > 0 then
        opening = opening - 1
        return ACCEPTED
      end
      return is_over() and NEVER or 0
    end
  end
end

function request()
  sent = sent + 1
  if sent == 1 then
    first = now()
    until_then = seconds and first + seconds
  end
  place = place % #lines + 1
  return lines[place]
end

-- `"errors":` with plain quotes is a key, wherever it stands: in a text they are escaped.
function response(status, headers, body)
  answered = answered + 1
  if status == 200 and (body:sub(1, #begins) ~= begins or body:find('"errors":', 1, true)) then
    wrong = wrong + 1
  end
  if is_over() then
    last = now()
    if answered == sent then
      ffi.C.kill(ffi.C.getpid(), INTERRUPT)
    end
  end
end

function done(summary, latency, requests)
  local errors = summary.errors
  local wrong, microseconds, unanswered = 0, summary.duration, 0
  for _, thread in ipairs(threads) do
    wrong = wrong + thread:get("wrong")
    if thread:get("last") then
      microseconds = (thread:get("last") - thread:get("first")) * 1e6
      unanswered = thread:get("sent") - thread:get("answered")
    end
  end
  print(string.format(
    'RESULT {"requests": %d, "microseconds": %d, "p50": %d, "p95": %d, "p99": %d, '
      .. '"refused": %d, "broken": %d, "late": %d, "wrong": %d, "unanswered": %d}',
    summary.requests, microseconds,
    latency:percentile(50), latency:percentile(95), latency:percentile(99),
    errors.status, errors.connect + errors.read + errors.write, errors.timeout, wrong, unanswered
  ))
end
