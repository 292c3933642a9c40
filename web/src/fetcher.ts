import type { Fetcher } from '@graphiql/toolkit';
import { getOperationAST } from 'graphql';

import { follow } from './live';

const ENDPOINT = '/graphql';

/** One POST for one operation, a WebSocket for a subscription; what goes wrong on the way is told in one sentence. */
export const fetcher: Fetcher = async (operation, options) => {
  const asked = options?.documentAST && getOperationAST(options.documentAST, operation.operationName);
  if (asked?.operation === 'subscription') return follow(ENDPOINT, operation, options?.headers);
  const request = new Request(ENDPOINT, {
    method: 'POST',
    headers: {
      'content-type': 'application/json',
      accept: 'application/graphql-response+json, application/json',
      ...options?.headers,
    },
    body: JSON.stringify(operation),
  });
  let response: Response;
  try {
    response = await fetch(request);
  } catch {
    throw new Error(`${ENDPOINT} does not answer. Is the server still running?`);
  }
  try {
    return await response.json();
  } catch {
    throw new Error(`${ENDPOINT} answered ${response.status} without JSON.`);
  }
};
