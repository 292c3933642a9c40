// urql with the ids of graphql-codegen, whose output is TypeScript: the documents without their types.
import { requests, found } from "./noting.js";
import { readFile, writeFile } from "node:fs/promises";

import { client } from "./client.js";

const lines = (await readFile("src/gql/graphql.ts", "utf8")).split("\n");
const documents = lines.filter((line) => /^export const \w+Document = /.test(line));
await writeFile("documents.js", documents.map((line) => line.replace(/ as unknown as .*/, ";")).join("\n"));
const { TrendingDocument } = await import("./documents.js");

const { data } = await client.query(TrendingDocument, { first: 1 });
const results = { names: data.models.nodes.map((node) => node.fullName), requests: requests() };
const { error } = await client.query("query Other { version }", {});
results.other = error.message;
found(results);
