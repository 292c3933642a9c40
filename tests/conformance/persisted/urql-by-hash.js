// urql by hash: unknown, known, and on a server that does not know the version.
import { protocol, requests, found } from "./noting.js";
import { gql } from "@urql/core";

import { client } from "./client.js";

const query = gql`query Names { models { nodes { fullName } } }`;
const names = async (document) =>
  (await client.query(document, {}, { requestPolicy: "network-only" })).data.models.nodes.map((node) => node.fullName);

const results = {};
results.unknown = [await names(query), requests()];
results.known = [await names(query), requests()];
protocol.version = 2;
results.unsupported = [await names(gql`query Others { models { nodes { fullName } } }`), requests()];
results.after = [await names(query), requests()];
found(results);
