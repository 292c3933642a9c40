// Apollo Client with the ids of its manifest; what is not in that is not sent at all.
import { requests, found } from "./noting.js";
import { gql } from "@apollo/client";

import { client } from "./client.js";
import { TRENDING } from "./src/operations.js";

const { data } = await client.query({ query: TRENDING, variables: { first: 1 } });
const results = { names: data.models.nodes.map((node) => node.fullName), requests: requests() };
results.other = await client.query({ query: gql`query Other { version }` }).catch((error) => error.message);
results.none = requests();
found(results);
