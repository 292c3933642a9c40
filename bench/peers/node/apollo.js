// Apollo Server, standalone, as its documentation sets it up for production (NODE_ENV=production).

import { ApolloServer } from "@apollo/server";
import { startStandaloneServer } from "@apollo/server/standalone";

import { connect, makeContext, schema } from "./schema.js";

const database = await connect();
const server = new ApolloServer({ schema, introspection: false });
await startStandaloneServer(server, {
  listen: { host: "127.0.0.1", port: Number(process.argv[2]) },
  context: async () => makeContext(database),
});
