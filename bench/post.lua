-- Posts the lines of a file, each a GraphQL request in JSON, one after the other and again from the
-- first; at the end prints one line of JSON. wrk runs it with one thread: one order, the same always.

local bodies, place, threads = {}, 0, {}

function setup(thread)
  table.insert(threads, thread)
end

function init(arguments)
  for line in io.lines(arguments[1]) do
    table.insert(bodies, wrk.format("POST", nil, { ["Content-Type"] = "application/json" }, line))
  end
  wrong = 0
end

function request()
  place = place % #bodies + 1
  return bodies[place]
end

-- An answer with errors begins with them.
function response(status, headers, body)
  if status == 200 and body:sub(1, 8) ~= '{"data":' then
    wrong = wrong + 1
  end
end

function done(summary, latency, requests)
  local errors = summary.errors
  local wrong = 0
  for _, thread in ipairs(threads) do
    wrong = wrong + thread:get("wrong")
  end
  print(string.format(
    'RESULT {"requests": %d, "microseconds": %d, "p50": %d, "p95": %d, "p99": %d, '
      .. '"refused": %d, "broken": %d, "late": %d, "wrong": %d}',
    summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(95), latency:percentile(99),
    errors.status, errors.connect + errors.read + errors.write, errors.timeout, wrong
  ))
end
