// Runs race.mjs in node: node in_node.mjs PACKAGE JOB RESULT MODEL MODEL
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { race } from "./race.mjs";

const [packagePath, jobPath, resultPath, ...models] = process.argv.slice(2);
let result;
try {
  const ort = createRequire(import.meta.url)(packagePath);
  const job = JSON.parse(readFileSync(jobPath));
  if (ort.env.wasm) ort.env.wasm.numThreads = job.threads;
  const usage = () => process.cpuUsage().user / 1e3 + process.cpuUsage().system / 1e3;
  result = await race(ort, models, job, job.threads === 1 ? usage : undefined);
} catch (error) {
  result = { error: String(error) };
}
writeFileSync(resultPath, JSON.stringify(result));
