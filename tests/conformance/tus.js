// tus-js-client: whole, stopped and resumed from an address that was stored, in parts side by side.
import { createReadStream } from "node:fs";
import { FileUrlStorage, Upload } from "tus-js-client";

import { ask, found, headers, http } from "./asking.js";

const endpoint = http.replace("/graphql", "/uploads");
const results = {};

/** What was asked and answered, once all is sent; `options` may stop it before. */
async function send({ id, file }, options) {
  const told = [];
  await new Promise((resolve, reject) => {
    const upload = new Upload(createReadStream(file), {
      endpoint,
      headers,
      metadata: { upload: id },
      retryDelays: [0, 50],
      storeFingerprintForResuming: false,
      onAfterResponse: (request, response) => {
        const at = request.getHeader("Upload-Offset");
        told.push(`${request.getMethod()}${at === undefined ? "" : ` at ${at}`}: ${response.getStatus()}`);
      },
      onError: reject,
      onSuccess: resolve,
      ...options?.(() => upload, resolve),
    });
    if (options?.start) options.start(upload).catch(reject);
    else upload.start();
  });
  return told;
}

{
  const upload = await ask("create", "whole", 3_000_000);
  results.whole = await send(upload);
  results.again = await send(upload);
  const named = await ask("create", "named", 300_000);
  results.named = await send(named, () => ({ endpoint: undefined, uploadUrl: named.url }));
  results.withFirstBytes = await send(await ask("create", "first", 300_000), () => ({ uploadDataDuringCreation: true }));
  results.overridden = await send(await ask("create", "overridden", 300_000), () => ({ overridePatchMethod: true }));
  results.empty = await send(await ask("create", "empty", 0));
}
{
  const upload = await ask("create", "stopped", 5_000_000);
  const urlStorage = new FileUrlStorage(`${upload.file}.urls`);
  const stored = { chunkSize: 1_000_000, urlStorage, storeFingerprintForResuming: true };
  results.stopped = await send(upload, (made, resolve) => ({
    ...stored,
    onChunkComplete: (size, accepted) => accepted === 2_000_000 && made().abort().then(resolve),
  }));
  const resume = () => stored;
  resume.start = async (made) => {
    const [previous] = await made.findPreviousUploads();
    results.stored = new URL(previous.uploadUrl).pathname === new URL(upload.url).pathname;
    made.resumeFromPreviousUpload(previous);
    made.start();
  };
  results.resumed = await send(upload, resume);
}
{
  const upload = await ask("create", "parallel", 4_000_003);
  const told = await send(upload, () => ({ parallelUploads: 4, metadataForPartialUploads: { upload: upload.id } }));
  results.parallel = told.sort();
}
{
  const upload = await ask("create", "terminated", 3_000_000);
  results.terminated = await send(upload, (made, resolve) => ({
    chunkSize: 1_000_000,
    onChunkComplete: (size, accepted) => accepted === 1_000_000 && made().abort(true).then(resolve),
  }));
}
found(results);
