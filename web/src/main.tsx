import './workers';
import 'graphiql/style.css';
import '@graphiql/plugin-explorer/style.css';
import './page.css';

import { explorerPlugin } from '@graphiql/plugin-explorer';
import { GraphiQL } from 'graphiql';
import { createRoot } from 'react-dom/client';

import { examples } from './examples';
import { fetcher } from './fetcher';
import { takeToken } from './token';

const token = takeToken();
const headers = token === null ? undefined : JSON.stringify({ Authorization: `Bearer ${token}` }, null, 2);

// Headers are never kept: a token would outlive the browser tab that it was given to. For the same
// reason there is no history plugin, which stores the headers of each operation.
createRoot(document.getElementById('page')!).render(
  <GraphiQL
    fetcher={fetcher}
    plugins={[explorerPlugin()]}
    defaultTabs={examples}
    defaultHeaders={headers}
    defaultEditorToolsVisibility="headers"
    shouldPersistHeaders={false}
  >
    <GraphiQL.Logo>modelharbor</GraphiQL.Logo>
  </GraphiQL>,
);
