// Relay's runtime with the ids of its compiler.
import { requests, found } from "./noting.js";
import { fetchQuery } from "relay-runtime";

import { environment } from "./client.js";
import query from "./src/__generated__/TrendingQuery.graphql.js";

const data = await fetchQuery(environment, query, { first: 1 }).toPromise();
found({ names: data.models.nodes.map((node) => node.fullName), requests: requests() });
