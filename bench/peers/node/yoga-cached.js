// GraphQL Yoga with graphql-jit and @envelop/response-cache, as Yoga wraps it: answers are kept for MAX_AGE
// seconds, and leave the cache when a mutation answers with a `Model` of the same id.

import { createServer } from "node:http";

import { useGraphQlJit } from "@envelop/graphql-jit";
import { createInMemoryCache, useResponseCache } from "@graphql-yoga/plugin-response-cache";
import { createYoga } from "graphql-yoga";

import { connect, makeContext, schema } from "./schema.js";

const ANSWERS = 10_000; // kept at most; its default of 1,000 would throw away what is still asked for

const database = await connect();
const yoga = createYoga({
  schema,
  context: () => makeContext(database),
  graphiql: false,
  landingPage: false,
  logging: false,
  multipart: false,
  plugins: [
    useGraphQlJit(),
    useResponseCache({
      session: () => null, // the same for everybody
      ttl: Number(process.env.MAX_AGE) * 1000,
      cache: createInMemoryCache({ max: ANSWERS }),
      includeExtensionMetadata: true, // says of each answer whether it comes from the cache
    }),
  ],
});
createServer(yoga).listen(Number(process.argv[2]), "127.0.0.1");
