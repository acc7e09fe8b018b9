/* The page: choices, progress, images while they are denoised, and what was measured. Sampling is in worker.js. */
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const [channels, height, width] = data.sample;
const LARGEST_SEED = 2n ** 63n - 1n;
const worker = new Worker("worker.js", { type: "module" });
const run = { number: 0, stopping: false, models: [], times: {} };

/* What the last run gave, for programs and for the browser's console: images by model, each Float32Array
   [count, C, H, W], the milliseconds of each call, and the decibels of each image. */
window.mezzotint = { state: "loading", result: null };

// Noise that flickers is motion: whoever prefers less sees the images when they are done, unless the box is checked.
if (matchMedia("(prefers-reduced-motion: reduce)").matches) at("live").checked = false;

const tell = (state, words) => {
  window.mezzotint.state = state;
  document.body.dataset.state = state;
  at("status").textContent = words;
};
/** Show how much is done; the words are on the page and are the bar's text, and are not announced at each call. */
const progress = (share, words) => {
  at("progress").value = share;
  at("progress").setAttribute("aria-valuetext", words);
  at("call").textContent = words;
};
const busy = (is) => {
  at("start").disabled = is;
  at("stop").disabled = !is;
  for (const field of at("choices").querySelectorAll("input:not(#live), select")) field.disabled = is;
};
const median = (numbers) => {
  const sorted = [...numbers].sort((a, b) => a - b), middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
};
const milliseconds = (time) => `${time.toFixed(time < 10 ? 1 : 0)} ms`;
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
const total = (numbers) => numbers.reduce((a, b) => a + b, 0);

/** The numbers of the form, or null after a complaint beside it. */
const choices = () => {
  const seed = at("seed").value.trim(), count = Number(at("count").value);
  const wrongSeed = !/^\d{1,19}$/.test(seed) || BigInt(seed) > LARGEST_SEED;
  const wrongCount = !Number.isInteger(count) || count < 1 || count > data.most;
  for (const [id, wrong] of [["seed", wrongSeed], ["count", wrongCount]]) at(id).setAttribute("aria-invalid", String(wrong));
  at("complaint").textContent = wrongSeed
    ? `The seed is a whole number from 0 to ${LARGEST_SEED}.`
    : wrongCount ? `The number of images is from 1 to ${data.most}.` : "";
  if (wrongSeed || wrongCount) at(wrongSeed ? "seed" : "count").focus();
  const beside = at("beside")?.checked ?? false;
  const models = Object.keys(data.models).filter((model) => model === "bundle" || beside);
  return wrongSeed || wrongCount ? null : { seed, count, deployment: Number(at("deployment").value), choice: Number(at("condition")?.value ?? 0), models };
};

/** Empty canvases for `count` images of a model. */
const place = (model, count) => {
  const words = (i) => `image ${i + 1} of ${count}, ${data.models[model].label}`;
  at(`images-${model}`).replaceChildren(...Array.from({ length: count }, (_, i) => {
    const canvas = document.createElement("canvas");
    Object.assign(canvas, { width, height });
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", words(i));
    return canvas;
  }));
};

/** Draw images in -1 .. 1, float32 [count, 1 or 3, H, W]. */
const draw = (model, images) => {
  const area = height * width;
  [...at(`images-${model}`).children].forEach((canvas, i) => {
    const context = canvas.getContext("2d"), pixels = context.createImageData(width, height);
    for (let p = 0; p < area; p++) {
      for (let c = 0; c < 3; c++) {
        const value = images[(i * channels + (channels === 3 ? c : 0)) * area + p];
        pixels.data[4 * p + c] = Math.round((Math.min(1, Math.max(-1, value)) + 1) * 127.5);
      }
      pixels.data[4 * p + 3] = 255;
    }
    context.putImageData(pixels, 0, 0);
  });
};

const measured = () => {
  for (const model of run.models) {
    const cells = at(`row-${model}`).querySelectorAll("[data-cell]");
    cells[0].textContent = milliseconds(median(run.times[model]));
    cells[1].textContent = `${(total(run.times[model]) / 1000).toFixed(1)} s`;
  }
};

/** How the two models compare after a run: their speed by the medians, and the decibels between their images. */
const compared = (decibels) => {
  if (run.models.length < 2) return "";
  const [mine, exact] = run.models.map((model) => median(run.times[model]));
  const db = (value) => (Number.isFinite(value) ? `${value.toFixed(1)} dB` : "no difference");
  const speed = `A call of the bundle's network is ${(exact / mine).toFixed(2)}x as fast as one of the float network.`;
  const shown = decibels ? ` PSNR between their images: ${db(median(decibels))} median, ${db(Math.min(...decibels))} lowest.` : "";
  return speed + shown;
};

const start = () => {
  const chosen = choices();
  if (!chosen) return;
  run.number += 1;
  run.stopping = false;
  run.models = chosen.models;
  run.times = Object.fromEntries(chosen.models.map((model) => [model, []]));
  for (const model of Object.keys(data.models)) {
    at(`model-${model}`).hidden = !chosen.models.includes(model);
    at(`row-${model}`).querySelectorAll("[data-cell]").forEach((cell) => { cell.textContent = "–"; });
    place(model, chosen.models.includes(model) ? chosen.count : 0);
  }
  at("compared").textContent = "";
  progress(0, "");
  window.mezzotint.result = null;
  busy(true);
  at("stop").focus();
  tell("sampling", "Sampling.");
  worker.postMessage({ kind: "sample", run: run.number, ...chosen });
};

const end = (state, words) => {
  const focused = document.activeElement === at("stop");
  busy(false);
  if (focused) at("start").focus();
  tell(state, words);
};

const heard = {
  loading: ({ loaded, total: all }) => progress(loaded / all, `${megabytes(loaded)} of ${megabytes(all)} loaded`),
  ready: () => {
    progress(0, "");
    end("ready", "Ready.");
  },
  step: ({ index, calls, times, images, decibels }) => {
    const last = index === calls - 1;
    for (const model of run.models) {
      run.times[model].push(times[model]);
      if (last || at("live").checked) draw(model, images[model]);
    }
    const taken = run.models.map((model) => `${data.models[model].label} ${milliseconds(times[model])}`).join(", ");
    progress((index + 1) / calls, `call ${index + 1} of ${calls}: ${taken}`);
    measured();
    if (last) {
      at("compared").textContent = compared(decibels);
      window.mezzotint.result = { images, times: run.times, decibels };
    } else worker.postMessage({ kind: run.stopping ? "stop" : "next" });
  },
  stopped: () => end("stopped", `Stopped after ${run.times[run.models[0]].length} network calls.`),
  done: () => end("done", `Done: ${run.times[run.models[0]].length} network calls of each model.`),
  failed: ({ words }) => {
    end("failed", "This did not work.");
    at("start").disabled = !window.mezzotint.loaded;
    at("complaint").textContent = words;
  },
};

worker.onmessage = ({ data: message }) => {
  if (message.run !== undefined && message.run !== run.number) return;
  if (message.kind === "ready") window.mezzotint.loaded = true;
  heard[message.kind](message);
};
worker.onerror = (event) => heard.failed({ words: event.message || "The worker of this page could not be started." });
at("choices").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!at("start").disabled) start();
});
at("stop").addEventListener("click", () => {
  run.stopping = true; // the answer to the call that runs now
  tell("sampling", "Stopping after this call.");
});
tell("loading", "Loading the networks.");
worker.postMessage({ kind: "load", page: data });
