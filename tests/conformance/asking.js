// What the scripts here share: the test that started them moves jobs when asked, line by line.
import { createInterface } from "node:readline";

export const [http, ws, token] = process.argv.slice(2);
export const headers = { authorization: `Bearer ${token}` };
export const WATCH = `subscription Watch($id: ID!, $after: Cursor, $rate: Float = 50) {
  jobProgress(id: $id, after: $after, maxRateHz: $rate) {
    cursor job { id state progress { current } }
  }
}`;

const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();

/** `put` answers a job's id; `become` takes id and states; `cut` ends all connections. */
export async function ask(what, ...values) {
  console.log(JSON.stringify({ ask: what, values }));
  return JSON.parse((await lines.next()).value);
}

export function found(results) {
  console.log(JSON.stringify({ found: results }));
  process.exit(0);
}

export const stateOf = (answer) => answer.data.jobProgress.job.state;
export const codeOf = (answer) => answer.errors[0].extensions.code;

/** Resolves when `count` values were pushed. */
export function collector() {
  const values = [];
  let look = () => {};
  return {
    values,
    push(value) {
      values.push(value);
      look();
    },
    until: (count) =>
      new Promise((resolve) => {
        look = () => values.length >= count && resolve(values);
        look();
      }),
  };
}
