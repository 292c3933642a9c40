import analytics from './examples/analytics.graphql?raw';
import createModel from './examples/create-model.graphql?raw';
import createUploads from './examples/create-uploads.graphql?raw';
import facets from './examples/facets.graphql?raw';
import model from './examples/model.graphql?raw';
import search from './examples/search.graphql?raw';
import trending from './examples/trending.graphql?raw';
import viewer from './examples/viewer.graphql?raw';
import watchJobs from './examples/watch-jobs.graphql?raw';

const ids = JSON.stringify({ model: '', version: '' }, null, 2);
const now = new Date();
const lately = { from: new Date(now.getTime() - 90 * 24 * 3600 * 1000), to: now };

/** What the tabs hold at the first visit, in their order. */
export const examples = [
  { query: trending },
  { query: model },
  { query: search },
  { query: facets },
  { query: analytics, variables: JSON.stringify(lately, null, 2) },
  { query: createModel },
  { query: createUploads, variables: ids },
  { query: viewer },
  { query: watchJobs },
];
