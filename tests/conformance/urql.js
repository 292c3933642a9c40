// urql: subscriptions over its own fetch exchange, and over graphql-ws.
import { Client, fetchExchange, gql, subscriptionExchange } from "@urql/core";
import { createClient } from "graphql-ws";
import { WebSocket } from "ws";

import { WATCH, ask, collector, found, headers, http, stateOf, ws } from "./asking.js";

const media = [];
async function noting(input, init) {
  const response = await fetch(input, init);
  media.push(response.headers.get("content-type").split(";")[0]);
  return response;
}
const base = { url: http, fetch: noting, fetchOptions: { headers }, preferGetMethod: false };
const results = {};

async function watched(client) {
  const id = await ask("put");
  const events = collector();
  // At the end it tells the last answer once more, and that there is no next.
  client.subscription(gql(WATCH), { id }).subscribe((result) => events.push(result.hasNext ? stateOf(result) : "complete"));
  await events.until(1);
  await ask("become", id, "RUNNING");
  await events.until(2);
  await ask("become", id, "SUCCEEDED");
  return await events.until(4);
}
const viewer = gql("{ viewer { login } }");

{
  const client = new Client({ ...base, exchanges: [fetchExchange], fetchSubscriptions: true });
  results.query = (await client.query(viewer, {})).data.viewer.login;
  results.get = (await new Client({ ...base, preferGetMethod: "force", exchanges: [fetchExchange] }).query(viewer, {})).data.viewer.login;
  results.error = (await client.query(gql("{ nothing }"), {})).error.graphQLErrors[0].extensions.code;
  results.mutation = (
    await client.mutation(gql(`mutation { createModel(input: { owner: "ada", name: "urql" }) { model { fullName } } }`), {})
  ).data.createModel.model.fullName;
  results.streamed = await watched(client);
  const failed = collector();
  client.subscription(gql(WATCH), { id: "none" }).subscribe((result) => failed.push(result.error.graphQLErrors[0].extensions.code));
  [results.foreign] = await failed.until(1);
}
{
  const socket = createClient({ url: ws, connectionParams: headers, webSocketImpl: WebSocket });
  const forwardSubscription = (request) => ({
    subscribe: (sink) => ({ unsubscribe: socket.subscribe({ ...request, query: request.query || "" }, sink) }),
  });
  const client = new Client({ ...base, exchanges: [fetchExchange, subscriptionExchange({ forwardSubscription })] });
  results.socket = await watched(client);
  results.queryBeside = (await client.query(viewer, {})).data.viewer.login;
}
results.media = media;
found(results);
