import { defineConfig } from 'vite';

// The server sends the same page at /graphiql and, to browsers, at /graphql: addresses are absolute.
export default defineConfig({
  root: 'src',
  base: '/graphiql/',
  publicDir: false,
  worker: { format: 'es' },
  build: {
    outDir: '../../src/http/static/graphiql',
    emptyOutDir: true,
    target: 'es2022',
    modulePreload: { polyfill: false },
    reportCompressedSize: false,
    // Packages mark what runs where for servers that render React, which this is not.
    rolldownOptions: { checks: { moduleLevelDirective: false } },
    // Monaco alone is past the default, and is loaded once and kept.
    chunkSizeWarningLimit: 5000,
  },
});
