// graphql-ws, without a token, where only published operations run.
import { found } from "./noting.js";
import { createClient } from "graphql-ws";
import { WebSocket } from "ws";

const [url, id, sha256Hash] = process.argv.slice(2);
const client = createClient({ url, webSocketImpl: WebSocket });
const extensions = { persistedQuery: { version: 1, sha256Hash } };

function once(payload) {
  return new Promise((resolve) => {
    let last;
    const error = (problems) => resolve(problems[0].extensions.code);
    client.subscribe(payload, { next: (value) => (last = value.data.models.nodes), error, complete: () => resolve(last) });
  });
}
found({
  id: await once({ query: "", documentId: id }),
  hash: await once({ query: "", extensions }),
  prefixed: await once({ query: "", documentId: `sha256:${sha256Hash}` }),
  unknown: await once({ query: "", documentId: "unknown" }),
  text: await once({ query: "{ models { nodes { fullName } } }" }),
  kept: await once({ query: "{ models { nodes { fullName } } }", extensions }),
});
