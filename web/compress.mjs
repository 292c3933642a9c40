// Beside each built file its compressed forms, where they are smaller: the server sends them as they are.
import { readFile, readdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { brotliCompress, constants, gzip } from 'node:zlib';

const BUILT = new URL('../src/http/static/graphiql', import.meta.url).pathname;
const WORTH_IT = 500; // bytes
const { BROTLI_PARAM_QUALITY, BROTLI_PARAM_SIZE_HINT } = constants;
const FORMS = {
  // Quality 11 makes them 8 % smaller, and the build 10 s longer.
  br: (bytes) =>
    promisify(brotliCompress)(bytes, {
      params: { [BROTLI_PARAM_QUALITY]: 9, [BROTLI_PARAM_SIZE_HINT]: bytes.length },
    }),
  gz: (bytes) => promisify(gzip)(bytes, { level: 9 }),
};

const entries = await readdir(BUILT, { recursive: true, withFileTypes: true });
await Promise.all(
  entries
    .filter((entry) => entry.isFile())
    .map(async (entry) => {
      const path = join(entry.parentPath ?? entry.path, entry.name);
      const bytes = await readFile(path);
      if (bytes.length < WORTH_IT) return;
      for (const [suffix, compress] of Object.entries(FORMS)) {
        const made = await compress(bytes);
        if (made.length < bytes.length) await writeFile(`${path}.${suffix}`, made);
      }
    }),
);
