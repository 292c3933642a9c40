// graphql-ws, the client that the protocol comes from.
import { createClient } from "graphql-ws";
import { createHash } from "node:crypto";
import { WebSocket } from "ws";

import { WATCH, ask, collector, found, headers, stateOf, ws } from "./asking.js";

const results = {};
const options = { url: ws, connectionParams: headers, webSocketImpl: WebSocket, retryWait: async () => {} };

function once(client, payload) {
  return new Promise((resolve, reject) => {
    let last;
    client.subscribe(payload, { next: (value) => (last = value), error: reject, complete: () => resolve(last) });
  });
}
const code = (promise) => promise.then((value) => value, (error) => (Array.isArray(error) ? error[0].extensions.code : error.code));

{
  // From what stands to the end, beside queries, a mutation and what fails.
  const pongs = collector();
  const client = createClient({ ...options, keepAlive: 20, on: { pong: (received) => received && pongs.push(1) } });
  const id = await ask("put");
  const events = collector();
  const watching = new Promise((resolve, reject) =>
    client.subscribe({ query: WATCH, variables: { id } }, { next: events.push, error: reject, complete: resolve }),
  );
  await events.until(1);
  results.query = await once(client, { query: "{ viewer { login } }" });
  const made = await once(client, {
    query: `mutation { createModel(input: { owner: "ada", name: "by-socket" }) { model { fullName } userErrors { code } } }`,
  });
  results.mutation = made.data.createModel;
  results.together = await Promise.all([1, 2, 3].map(() => once(client, { query: "{ __typename }" })));
  results.syntax = await code(once(client, { query: "{" }));
  results.invalid = await code(once(client, { query: "{ nothing }" }));
  const query = `query ByHash { viewer { login } } # ${id}`;
  const sha256Hash = createHash("sha256").update(query).digest("hex");
  const extensions = { persistedQuery: { version: 1, sha256Hash } };
  results.unknown = await code(once(client, { query: "", extensions }));
  results.kept = await once(client, { query, extensions });
  results.known = await once(client, { query: "", extensions });
  results.documentId = await once(client, { query: "", documentId: `sha256:${sha256Hash}` });
  await ask("become", id, "RUNNING");
  await events.until(2);
  await ask("become", id, "SUCCEEDED");
  await watching;
  results.states = events.values.map(stateOf);
  await pongs.until(1);
  await client.dispose();
}
{
  // Cut off, it comes back by itself; the payload is sent anew, with the cursor that was put into it.
  const retries = [];
  const client = createClient({ ...options, on: { connecting: (isRetry) => retries.push(isRetry) } });
  const id = await ask("put");
  const events = collector();
  const variables = { id };
  const next = (answer) => {
    variables.after = answer.data.jobProgress.cursor;
    events.push(answer);
  };
  const watching = new Promise((resolve, reject) =>
    client.subscribe({ query: WATCH, variables }, { next, error: reject, complete: resolve }),
  );
  await events.until(1);
  await ask("cut");
  await ask("become", id, "RUNNING", "RETRYING", "RUNNING");
  await events.until(4);
  await ask("cut");
  await ask("become", id, "SUCCEEDED");
  await watching;
  results.resumed = events.values.map(stateOf);
  results.retries = retries;
}
{
  // How it closes: the code of each breach.
  const closed = (more, act = () => {}) =>
    new Promise((resolve) => {
      const client = createClient({
        ...options,
        retryAttempts: 0,
        lazy: false,
        onNonLazyError: () => {},
        ...more,
        on: { connected: (socket) => act(client, socket), closed: (event) => resolve(event.code), ...more.on },
      });
    });
  const subscribe = (id) => JSON.stringify({ id, type: "subscribe", payload: { query: "{ __typename }" } });
  class Legacy extends WebSocket {
    constructor(url) {
      super(url, "graphql-ws");
    }
  }
  results.closed = {
    badToken: await closed({ connectionParams: { authorization: "Bearer mh_wrong" } }),
    malformed: await closed({}, (_, socket) => socket.send("[]")),
    early: await closed({ on: { opened: (socket) => socket.send(subscribe("1")) } }),
    late: await closed({ connectionParams: () => new Promise(() => {}) }),
    twice: await closed({}, (_, socket) => socket.send('{"type":"connection_init"}')),
    legacy: await closed({ webSocketImpl: Legacy }),
    sameId: await closed({ generateID: () => "same" }, (client) => {
      for (const _ of [1, 2]) {
        client.subscribe({ query: "subscription { jobs { cursor } }" }, { next() {}, error() {}, complete() {} });
      }
    }),
  };
}
found(results);
