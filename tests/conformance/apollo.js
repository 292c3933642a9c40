// Apollo Client: queries over HTTP, by their text and by its hash, subscriptions over graphql-ws.
import { ApolloClient, ApolloLink, HttpLink, InMemoryCache, gql } from "@apollo/client";
import { PersistedQueryLink } from "@apollo/client/link/persisted-queries";
import { GraphQLWsLink } from "@apollo/client/link/subscriptions";
import { OperationTypeNode } from "graphql";
import { createClient } from "graphql-ws";
import { createHash } from "node:crypto";
import { WebSocket } from "ws";

import { WATCH, ask, collector, found, headers, http, stateOf, ws } from "./asking.js";

const media = [];
async function noting(input, init) {
  const response = await fetch(input, init);
  media.push(response.headers.get("content-type").split(";")[0]);
  return response;
}
const link = new HttpLink({ uri: http, headers, fetch: noting });
const socket = new GraphQLWsLink(createClient({ url: ws, connectionParams: headers, webSocketImpl: WebSocket }));
const isSubscription = ({ operationType }) => operationType === OperationTypeNode.SUBSCRIPTION;
const make = (first) => new ApolloClient({ link: ApolloLink.split(isSubscription, socket, first), cache: new InMemoryCache() });
const results = {};

const client = make(link);
results.query = (await client.query({ query: gql`query Viewer { viewer { login } }` })).data.viewer.login;
results.mutation = (
  await client.mutate({
    mutation: gql`mutation { createModel(input: { owner: "ada", name: "apollo" }) { model { fullName } } }`,
  })
).data.createModel.model.fullName;
results.error = await client
  .query({ query: gql`query Nothing { nothing }` })
  .catch((error) => error.errors[0].extensions.code);
{
  const sha256 = (text) => createHash("sha256").update(text).digest("hex");
  const persisted = make(new PersistedQueryLink({ sha256 }).concat(link));
  results.persisted = (await persisted.query({ query: gql`query Hashed { viewer { login id } }` })).data.viewer.login;
}
{
  const id = await ask("put");
  const events = collector();
  client.subscribe({ query: gql(WATCH), variables: { id } }).subscribe({
    next: (result) => events.push(result.error ? result.error.message : stateOf(result)),
    error: (error) => events.push(String(error)),
    complete: () => events.push("complete"),
  });
  await events.until(1);
  await ask("become", id, "RUNNING");
  await events.until(2);
  await ask("become", id, "SUCCEEDED");
  results.states = await events.until(4);
}
results.media = media;
found(results);
