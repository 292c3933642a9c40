import createModel from './examples/create-model.graphql?raw';
import facets from './examples/facets.graphql?raw';
import model from './examples/model.graphql?raw';
import search from './examples/search.graphql?raw';
import trending from './examples/trending.graphql?raw';
import viewer from './examples/viewer.graphql?raw';
import watchJobs from './examples/watch-jobs.graphql?raw';

/** What the tabs hold at the first visit, in their order. */
export const examples = [trending, model, search, facets, createModel, viewer, watchJobs];
