// Apollo Server with its response cache: answers are kept for MAX_AGE seconds, in its own cache (30 MiB in
// memory). What a mutation changes it is not told: its documentation leaves old answers to their age.

import { ApolloServer } from "@apollo/server";
import { ApolloServerPluginCacheControl } from "@apollo/server/plugin/cacheControl";
import responseCache from "@apollo/server-plugin-response-cache";
import { startStandaloneServer } from "@apollo/server/standalone";

import { connect, makeContext, schema } from "./schema.js";

const database = await connect();
const server = new ApolloServer({
  schema,
  introspection: false,
  plugins: [
    ApolloServerPluginCacheControl({
      defaultMaxAge: Number(process.env.MAX_AGE),
      calculateHttpHeaders: false,
    }),
    // The package is CommonJS.
    (responseCache.default ?? responseCache)(),
  ],
});
await startStandaloneServer(server, {
  listen: { host: "127.0.0.1", port: Number(process.argv[2]) },
  context: async () => makeContext(database),
});
