// Two models on one feed in turns, in onnxruntime-node or onnxruntime-web; see javascript.py.

const BLOCK_MS = 10; // a block of calls takes this or longer: browsers round their clocks to 0.1 ms
const WARM_UP = 0.3; // share of the seconds that finding the length of a block takes, and compiling hot code
const MIN_ROUNDS = 5;
const ARRAYS = {
  float32: Float32Array, float64: Float64Array, float16: Uint16Array, bool: Uint8Array,
  int8: Int8Array, uint8: Uint8Array, int16: Int16Array, uint16: Uint16Array,
  int32: Int32Array, uint32: Uint32Array, int64: BigInt64Array, uint64: BigUint64Array,
};

// job: {threads, seconds, providers, feed: {name: {type, dims, data in base64}}}
// clock: milliseconds; in node the CPU time of the process, which other processes do not change
// Returns {times: seconds per call, one row [first, second] per round, outputs: of each model}.
export async function race(ort, models, job, clock = () => performance.now()) {
  const options = { executionProviders: job.providers, intraOpNumThreads: job.threads };
  const sessions = [];
  for (const model of models) sessions.push(await ort.InferenceSession.create(model, options));
  const feed = Object.fromEntries(
    Object.entries(job.feed).map(([name, { type, dims, data }]) => {
      const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
      return [name, new ort.Tensor(type, new ARRAYS[type](bytes.buffer), dims)];
    }),
  );
  const outputs = [];
  for (const session of sessions) outputs.push(encode(await session.run(feed)));

  let fastest = Infinity; // seconds
  let repeats = 1;
  for (const start = performance.now(); ; ) {
    for (const session of sessions) {
      fastest = Math.min(fastest, await block(session, feed, repeats, clock));
    }
    repeats = Math.max(1, Math.ceil(BLOCK_MS / 1e3 / Math.max(fastest, 1e-7)));
    if (performance.now() - start >= WARM_UP * job.seconds * 1e3) break;
  }
  const times = [];
  for (const start = performance.now(); ; ) {
    const round = [0, 0];
    const order = times.length % 2 ? [1, 0] : [0, 1];
    for (const i of order) round[i] = await block(sessions[i], feed, repeats, clock);
    times.push(round);
    if (times.length >= MIN_ROUNDS && performance.now() - start >= job.seconds * 1e3) break;
  }
  return { times, outputs };
}

async function block(session, feed, repeats, clock) {
  const start = clock();
  for (let i = 0; i < repeats; i++) await session.run(feed);
  return (clock() - start) / 1e3 / repeats;
}

function encode(results) {
  return Object.fromEntries(
    Object.entries(results).map(([name, { type, dims, data }]) => {
      const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
      let text = "";
      for (const byte of bytes) text += String.fromCharCode(byte);
      return [name, { type, dims, data: btoa(text) }];
    }),
  );
}
