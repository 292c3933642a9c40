// Notes each request: its method, whether a text or only a name goes with it, and the status of its answer.
const before = globalThis.fetch;
const noted = [];
globalThis.self = globalThis; // as in a browser, where urql's exchange looks for `crypto`

/** While it is 2, requests say that it is the version of their hashes. */
export const protocol = { version: 1 };

globalThis.fetch = async (input, init = {}) => {
  const { method = "GET" } = init;
  let url = String(input);
  let { body } = init;
  if (protocol.version === 2) {
    url = url.replace("%22version%22%3A1", "%22version%22%3A2");
    body = body?.replace('"version":1', '"version":2');
  }
  const response = await before(url, { ...init, body });
  const text = method === "GET" ? new URL(url).searchParams.get("query") : JSON.parse(body).query;
  noted.push(`${method} ${text ? "text" : "name"} ${response.status}`);
  return response;
};

/** Those since the last call. */
export const requests = () => noted.splice(0);

export function found(results) {
  console.log(JSON.stringify(results));
  process.exit(0);
}
