// Offers requests at a fixed rate, whatever the answers take; prints one line of JSON.
//
// node pace.js URL FILE RATE CONNECTIONS SECONDS: the lines of the file are the bodies of requests.
// A connection that waits longer than its turn allows would hide the requests that it did not send: they
// are counted with the time that they would have waited.

import { readFileSync } from "node:fs";

import autocannon from "autocannon";

const [url, file, ...numbers] = process.argv.slice(2);
const [rate, connections, seconds] = numbers.map(Number);
const bodies = readFileSync(file, "utf8").trimEnd().split("\n");
const interval = (connections / rate) * 1000; // milliseconds between the turns of a connection
const times = [];
let clients = 0;

const run = autocannon({
  url,
  connections,
  overallRate: rate,
  duration: seconds,
  timeout: 10,
  method: "POST",
  headers: { "content-type": "application/json" },
  requests: [{ body: bodies[0] }],
  // Each connection has bodies of its own: what is under way at one time is not all the same.
  setupClient(client) {
    const own = bodies.filter((_, index) => index % connections === clients % Math.min(connections, bodies.length));
    clients += 1;
    client.setRequests(own.map((body) => ({ body })));
  },
  verifyBody: (body) => body.startsWith('{"data":') && !body.includes('"errors":'),
});
run.on("response", (client, status, bytes, milliseconds) => {
  for (let time = milliseconds; time > 0; time -= interval) {
    times.push(time);
  }
});

const told = await run;
times.sort((one, other) => one - other);
const at = (share) => times[Math.min(times.length - 1, Math.floor(times.length * share))] ?? 0;
console.log(
  JSON.stringify({
    requests_per_second: told.requests.total / told.duration,
    p50: at(0.5),
    p95: at(0.95),
    p99: at(0.99),
    errors: told.errors + told.non2xx + told.mismatches,
  }),
);
