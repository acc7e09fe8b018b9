/* The sampling loop over a list of scalars for each network call, which mezzotint/web/scalars.py writes; the formulas
   are in runtime/sampling/steps.py. Arrays are float32, and each operation rounds to float32, as numpy does it. */

/** The sum of weight * array over [[name, weight], ...]. */
const sum = (row, arrays, length) => {
  const total = new Float32Array(length);
  row.forEach(([name, weight], term) => {
    const array = arrays[name], factor = Math.fround(weight);
    if (term === 0) for (let i = 0; i < length; i++) total[i] = array[i] * factor;
    else for (let i = 0; i < length; i++) total[i] += Math.fround(array[i] * factor);
  });
  return total;
};

/** The output without the quantization noise that was measured: scale * output - shift of its channel. */
const corrected = (output, { scale, shift }, size) => {
  const fixed = new Float32Array(output.length), pixels = size / shift.length, factor = Math.fround(scale);
  for (let i = 0; i < output.length; i++) {
    fixed[i] = Math.fround(output[i] * factor) - Math.fround(shift[Math.floor((i % size) / pixels)]);
  }
  return fixed;
};

/** The guided prediction from the output of both halves, the unconditional one first: runtime/sampling/guidance.py. */
export const combine = (output, scale) => {
  const length = output.length / 2, guided = new Float32Array(length), factor = Math.fround(scale);
  for (let i = 0; i < length; i++) {
    guided[i] = Math.fround(Math.fround(output[length + i] - output[i]) * factor) + output[i];
  }
  return guided;
};

/** The state before the first call, from standard normal noise. */
export const begin = (solver, noise) => ({ x: solver.start === 1 ? noise : sum([["x", solver.start]], { x: noise }, noise.length) });

/** The state after a call, from the state before it and the network's output for its x; `size` numbers are one image.
    `noise()` is called where the sampler adds noise. */
export const advance = (call, state, output, size, noise) => {
  const out = call.correction ? corrected(output, call.correction, size) : output;
  const arrays = { ...state, out }, length = out.length;
  if (call.image) {
    const limit = Math.fround(call.clip), image = sum(call.image, arrays, length);
    for (let i = 0; i < length; i++) image[i] = Math.min(limit, Math.max(-limit, image[i]));
    arrays.image = image;
  }
  const after = {};
  for (const [name, row] of call.rows) after[name] = sum(row, arrays, length);
  if (call.noise > 0) {
    const normal = noise(), factor = Math.fround(call.noise), x = after.x;
    for (let i = 0; i < length; i++) x[i] += Math.fround(normal[i] * factor);
  }
  return after;
};

/** The peak signal to noise ratio of each image against the reference, in decibels, both clipped to -1 .. 1. */
export const psnr = (reference, images, size) => {
  const clip = (value) => Math.min(1, Math.max(-1, value));
  const found = [];
  for (let start = 0; start < images.length; start += size) {
    let error = 0;
    for (let i = start; i < start + size; i++) error += (clip(images[i]) - clip(reference[i])) ** 2;
    found.push(10 * Math.log10((4 * size) / error));
  }
  return found;
};
