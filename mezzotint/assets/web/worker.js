/* Networks and the sampling loop, beside the page's own thread: the page answers while a network computes. */
import * as ort from "./onnxruntime/ort.wasm.bundle.min.js";
import { normal } from "./noise.js";
import { advance, begin, combine, psnr } from "./sampler.js";

const ARRAYS = { int64: BigInt64Array, int32: Int32Array, float32: Float32Array, float64: Float64Array };
const sessions = new Map();
let page = null, goOn = null;

const say = (kind, content, moved = []) => self.postMessage({ kind, ...content }, moved);

/** The bytes of a file beside the page. `came` gets the number that arrived. */
const fetched = async (file, came) => {
  const answer = await fetch(new URL(file, self.location.href));
  if (!answer.ok) throw new Error(`${file}: the server answered ${answer.status}`);
  const parts = [], reader = answer.body.getReader();
  let size = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    size += value.length;
    came(value.length);
  }
  const bytes = new Uint8Array(size);
  let place = 0;
  for (const part of parts) {
    bytes.set(part, place);
    place += part.length;
  }
  return bytes;
};

const load = async (data) => {
  page = data;
  let loaded = 0;
  const came = (count) => say("loading", { loaded: (loaded += count), total: page.bytes });
  const files = new Map(); // precisions may share one
  const bytesOf = async (file) => files.get(file) ?? files.set(file, await fetched(file, came)).get(file);
  ort.env.logLevel = "error";
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = (await fetched(page.wasm, came)).buffer;
  for (const [name, network] of Object.entries(page.networks)) {
    const externalData = [];
    for (const { path, file } of network.data) externalData.push({ path, data: await bytesOf(file) });
    // Level 0: activations of 4-bit layers are not rounded, as in runtime/session.py.
    const extra = { session: { qdq_matmulnbits_accuracy_level: "0" } };
    const options = { executionProviders: ["wasm"], logSeverityLevel: 3, externalData, extra };
    sessions.set(name, await ort.InferenceSession.create(await bytesOf(network.file), options));
  }
  say("ready", {});
};

/** The numbers of a text in base64, little-endian as in every browser. */
const decoded = (text, type) => new ARRAYS[type](Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);

/** `halves` are arrays of one row each; every one of them is repeated `batch` times. */
const repeated = (halves, batch) => {
  const row = halves[0].length, all = new halves[0].constructor(row * batch * halves.length);
  halves.forEach((half, h) => { for (let i = 0; i < batch; i++) all.set(half, (h * batch + i) * row); });
  return all;
};

/** The inputs of a run that do not change from call to call: those of the chosen row of each condition. */
const conditions = (choice, batch, guided) => Object.fromEntries((page.conditions?.inputs ?? []).map((input) => {
  const { name, type, size, rows, shared, unconditional } = input, length = size.reduce((a, b) => a * b, 1);
  const chosen = decoded(rows, type).slice(choice * length, (choice + 1) * length);
  if (shared !== null) return [name, new ort.Tensor(type, chosen, shared ? [1, ...size] : [])];
  const halves = guided ? [unconditional === undefined ? chosen : decoded(unconditional, type), chosen] : [chosen];
  return [name, new ort.Tensor(type, repeated(halves, batch), [batch * halves.length, ...size])];
}));

/** The network's prediction for x, and the milliseconds that it took. Under guidance the call has both halves. */
const predicted = async (call, x, batch, given, guidance) => {
  const network = page.networks[call.network], { inputs } = page, guided = guidance !== undefined;
  const { type, shape } = network.timestep, width = guided ? 2 * batch : batch;
  const sizes = shape.map((size) => size ?? width), count = sizes.reduce((a, b) => a * b, 1);
  const time = ARRAYS[type].from({ length: count }, () => (type === "int64" ? BigInt(call.time) : call.time));
  const feeds = {
    [inputs.sample]: new ort.Tensor("float32", guided ? repeated([x, x], 1) : x, [width, ...page.sample]),
    [inputs.timestep]: new ort.Tensor(type, time, sizes),
    ...given,
  };
  const start = performance.now();
  const found = await sessions.get(call.network).run(feeds, [inputs.output]);
  const taken = performance.now() - start, output = found[inputs.output].data;
  return [guided ? combine(output, guidance) : output, taken];
};

/** Sample `count` images by each model from the same noise, one call of each in turn. */
const sample = async ({ run, seed, count, deployment, choice, models }) => {
  const { solvers } = page.deployments[deployment], size = page.sample.reduce((a, b) => a * b, 1);
  const batch = page.batch ?? count; // a graph of a fixed batch size computes images that are not shown
  const start = normal(seed, 0, batch, size);
  const states = Object.fromEntries(models.map((model) => [model, begin(solvers[model], start)]));
  const { calls: { length: calls }, guidance } = solvers[models[0]];
  const given = conditions(choice, batch, guidance !== undefined);
  for (let index = 0; index < calls; index++) {
    let drawn = null;
    const noise = () => (drawn ??= normal(seed, index + 1, batch, size));
    const times = {}, images = {};
    // Who goes first changes, so that neither model always finds the caches of the other one.
    for (const model of index % 2 ? [...models].reverse() : models) {
      const call = solvers[model].calls[index];
      const [output, time] = await predicted(call, states[model].x, batch, given, guidance);
      states[model] = advance(call, states[model], output, size, noise);
      times[model] = time;
      images[model] = states[model].x.slice(0, count * size);
    }
    const last = index === calls - 1, between = models.length === 2;
    const decibels = last && between ? psnr(images[models[1]], images[models[0]], size) : null;
    say("step", { run, index, calls, times, images, decibels }, Object.values(images).map((image) => image.buffer));
    // The page answers each call but the last, when it has drawn the images: so a click on Stop is never overtaken.
    if (!last && !(await new Promise((answered) => { goOn = answered; }))) return say("stopped", { run });
  }
  return say("done", { run });
};

self.onmessage = async ({ data }) => {
  try {
    if (data.kind === "load") await load(data.page);
    else if (data.kind === "sample") await sample(data);
    else goOn(data.kind === "next");
  } catch (error) {
    say("failed", { words: String(error?.message ?? error) });
  }
};
