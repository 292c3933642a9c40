import type { FetcherParams } from '@graphiql/toolkit';
import type { FormattedExecutionResult } from 'graphql';
import { createClient } from 'graphql-ws';

type Values = Record<string, unknown>;
const FORBIDDEN = 4403; // the token is not valid: it will not be a second later

/**
 * The events of a subscription, until it is complete or `return` ends it. Each has a socket of its
 * own: the headers, which a browser cannot give to a WebSocket, are said when it begins.
 */
export function follow(
  endpoint: string,
  operation: FetcherParams,
  headers: Record<string, unknown> = {},
): AsyncIterableIterator<FormattedExecutionResult<Values, Values>> {
  const url = new URL(endpoint, location.href);
  url.protocol = url.protocol === 'https:' ? 'wss:' : 'ws:';
  const client = createClient({
    url: url.href,
    connectionParams: headers,
    shouldRetry: (reason) => !(reason instanceof CloseEvent && reason.code === FORBIDDEN),
  });
  const { query, variables, operationName } = operation;
  const events = client.iterate<Values, Values>({ query, variables, operationName });
  return {
    [Symbol.asyncIterator]() {
      return this;
    },
    next: () =>
      events.next().catch((reason: unknown) => {
        throw told(endpoint, reason);
      }),
    return: () => events.return!(),
  };
}

/** Errors of GraphQL stay as they are; why a socket was closed becomes a sentence. */
function told(endpoint: string, reason: unknown): unknown {
  if (reason instanceof CloseEvent && reason.reason) {
    return new Error(`${endpoint} closed the socket (${reason.code}): ${reason.reason}`);
  }
  if (reason instanceof Event) {
    return new Error(`${endpoint} does not answer over WebSocket. Is the server still running?`);
  }
  return reason;
}
