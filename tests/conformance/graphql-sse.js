// graphql-sse, in distinct connections mode.
import { createClient } from "graphql-sse";

import { WATCH, ask, codeOf, found, headers, http, stateOf, collector } from "./asking.js";

const client = createClient({ url: http, headers, retryAttempts: 3, retry: async () => {} });
const results = {};
async function all(payload) {
  const answers = [];
  for await (const answer of client.iterate(payload)) answers.push(answer);
  return answers;
}

results.query = await all({ query: "{ viewer { login } }" });
results.syntax = (await all({ query: "{" })).map(codeOf);
results.invalid = (await all({ query: "{ nothing }" })).map(codeOf);
results.foreign = (await all({ query: WATCH, variables: { id: "none" } })).map(codeOf);
{
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
  await ask("become", id, "RUNNING");
  await events.until(2);
  await ask("cut");
  await ask("become", id, "SUCCEEDED");
  await watching;
  results.states = events.values.map(stateOf);
}
{
  const id = await ask("put");
  const events = collector();
  const abort = client.subscribe({ query: WATCH, variables: { id } }, { next: events.push, error() {}, complete() {} });
  await events.until(1);
  const before = await ask("members");
  abort();
  results.members = [before, await ask("members", 0)];
}
found(results);
