// Two models on one feed in turns, in onnxruntime-node or onnxruntime-web; see javascript.py.

const BLOCK_MS = 3; // a block of calls takes this or longer: browsers round their clocks
const WARM_UP = 0.3; // share of the seconds that finding the length of a block takes, and compiling hot code
const MIN_ROUNDS = 9;
const PATIENCE = 5; // rounds go on for so many times the seconds at most
const NARROW = 1.01; // upper over lower end of the interval that ends them before
const ARRAYS = {
  float32: Float32Array, float64: Float64Array, float16: Uint16Array, bool: Uint8Array,
  int8: Int8Array, uint8: Uint8Array, int16: Int16Array, uint16: Uint16Array,
  int32: Int32Array, uint32: Uint32Array, int64: BigInt64Array, uint64: BigUint64Array,
};

// job: {threads, seconds, providers, feed: {name: {type, dims, data in base64}},
//       external: of each model [{path: as the model names the file, data: where it is read}]}
// clock: milliseconds; in node the CPU time of the process, which other processes do not change
// Rounds go on for job.seconds, and then until the speed is known to NARROW.
// Returns {times: seconds per call, one row a round, outputs: of both models}. A row is [first,
// second, first again]: of a copy of the first model, as the speed of equal models shows what else
// moves a clock: where weights lie in memory, and other processes. Without it if it does not fit.
export async function race(ort, models, job, clock = () => performance.now()) {
  const options = { executionProviders: job.providers, intraOpNumThreads: job.threads };
  const open = (i) => ort.InferenceSession.create(models[i], { ...options, externalData: job.external[i] });
  const sessions = [];
  for (const i of models.keys()) sessions.push(await open(i));
  const feed = Object.fromEntries(
    Object.entries(job.feed).map(([name, { type, dims, data }]) => {
      const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
      return [name, new ort.Tensor(type, new ARRAYS[type](bytes.buffer), dims)];
    }),
  );
  const outputs = [];
  for (const session of sessions) outputs.push(encode(await session.run(feed)));
  const copy = await open(0).catch(() => null);
  if (copy) sessions.push(copy);

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
    const round = sessions.map(() => 0);
    // Each begins as often as any other, and none follows itself, which would find its caches warm.
    for (let turn = 0; turn < sessions.length; turn++) {
      const i = (times.length + turn) % sessions.length;
      round[i] = await block(sessions[i], feed, repeats, clock);
    }
    times.push(round);
    const share = (performance.now() - start) / 1e3 / job.seconds;
    if (times.length >= MIN_ROUNDS && share >= 1 && (share >= PATIENCE || isNarrow(times))) break;
  }
  return { times, outputs };
}

// Whether the median of the speeds lies in an interval of NARROW by 95 %, whatever their
// distribution: of n speeds in order it lies between those of rank n / 2 - sqrt(n) and
// n / 2 + sqrt(n).
function isNarrow(times) {
  const speeds = times.map(([first, second]) => first / second).sort((a, b) => a - b);
  const middle = (speeds.length - 1) / 2, reach = Math.sqrt(speeds.length);
  const low = speeds[Math.max(0, Math.floor(middle - reach))];
  const high = speeds[Math.min(speeds.length - 1, Math.ceil(middle + reach))];
  return high / low <= NARROW;
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
