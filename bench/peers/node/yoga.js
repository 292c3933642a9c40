// GraphQL Yoga with graphql-jit: documents are parsed, validated and compiled once.

import { createServer } from "node:http";

import { useGraphQlJit } from "@envelop/graphql-jit";
import { createYoga } from "graphql-yoga";

import { connect, makeContext, schema } from "./schema.js";

const database = await connect();
const yoga = createYoga({
  schema,
  context: () => makeContext(database),
  graphiql: false,
  landingPage: false,
  logging: false,
  multipart: false,
  plugins: [useGraphQlJit()],
});
createServer(yoga).listen(Number(process.argv[2]), "127.0.0.1");
