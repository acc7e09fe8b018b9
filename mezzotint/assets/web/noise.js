/* The noise of runtime/streams.py: numpy's SeedSequence, PCG64 and float32 standard_normal, number for number.

   Each (seed, image, draw) has a generator of its own: draw 0 is an image's start, draw i + 1 the noise of call i. */

const MASK32 = 0xffffffffn, MASK64 = (1n << 64n) - 1n, MASK128 = (1n << 128n) - 1n;
const MULTIPLIER = 0x2360ed051fc65da44385df649fccf645n;

/** The words of 32 bits of a whole number, lowest first; 0 is one word. */
const words = (number) => {
  const found = [];
  for (let rest = BigInt(number); rest > 0n || !found.length; rest >>= 32n) found.push(Number(rest & MASK32));
  return found;
};

/** The eight words of SeedSequence(seed, spawn_key=key).generate_state(4, uint64). */
const seedWords = (seed, key) => {
  const entropy = words(seed);
  while (entropy.length < 4) entropy.push(0);
  for (const number of key) entropy.push(...words(number));
  let constant = 0x43b0d7e5;
  const hashed = (value) => {
    value = (value ^ constant) >>> 0;
    constant = Math.imul(constant, 0x931e8875) >>> 0;
    value = Math.imul(value, constant) >>> 0;
    return (value ^ (value >>> 16)) >>> 0;
  };
  const mixed = (x, y) => {
    const value = (Math.imul(x, 0xca01f9dd) - Math.imul(y, 0x4973f715)) >>> 0;
    return (value ^ (value >>> 16)) >>> 0;
  };
  const pool = entropy.slice(0, 4).map(hashed);
  for (let from = 0; from < 4; from++) {
    for (let to = 0; to < 4; to++) if (from !== to) pool[to] = mixed(pool[to], hashed(pool[from]));
  }
  for (const word of entropy.slice(4)) for (let to = 0; to < 4; to++) pool[to] = mixed(pool[to], hashed(word));
  constant = 0x8b51f9dd;
  return Array.from({ length: 8 }, (_, i) => {
    let value = (pool[i % 4] ^ constant) >>> 0;
    constant = Math.imul(constant, 0x58f38ded) >>> 0;
    value = Math.imul(value, constant) >>> 0;
    return (value ^ (value >>> 16)) >>> 0;
  });
};

/** A function that returns the next 32 random bits of numpy's PCG64: the low half of each 64 bits comes first. */
const generator = (seed, key) => {
  const seeds = seedWords(seed, key).map(BigInt);
  const [a, b, c, d] = [0, 2, 4, 6].map((i) => seeds[i] | (seeds[i + 1] << 32n));
  const increment = ((((c << 64n) | d) << 1n) | 1n) & MASK128;
  let state = (increment + ((a << 64n) | b)) & MASK128;
  state = (state * MULTIPLIER + increment) & MASK128;
  let waiting = null;
  return () => {
    if (waiting !== null) {
      const word = waiting;
      waiting = null;
      return word;
    }
    state = (state * MULTIPLIER + increment) & MASK128;
    const folded = (state >> 64n) ^ (state & MASK64), turn = state >> 122n;
    const bits = ((folded >> turn) | (folded << (64n - turn))) & MASK64;
    waiting = Number(bits >> 32n);
    return Number(bits & MASK32);
  };
};

/* The ziggurat of Marsaglia and Tsang (2000) with 256 layers of equal area below exp(-x^2 / 2). */
const LAYERS = 256, EDGE = 3.6541528853610088, UNIT = 2 ** 23;
const height = (x) => Math.exp(-0.5 * x * x);
const widths = new Float32Array(LAYERS), heights = new Float32Array(LAYERS), inside = new Uint32Array(LAYERS);
{
  const tail = 0.00032339576466332173; // the area of exp(-x^2 / 2) beyond the edge
  const area = EDGE * height(EDGE) + tail;
  const base = area / height(EDGE);
  [widths[0], heights[0], inside[0]] = [base / UNIT, 1, (EDGE / base) * UNIT];
  let outer = EDGE;
  [widths[LAYERS - 1], heights[LAYERS - 1]] = [EDGE / UNIT, height(EDGE)];
  for (let i = LAYERS - 2; i > 0; i--) {
    const x = Math.sqrt(-2 * Math.log(area / outer + height(outer)));
    inside[i + 1] = (x / outer) * UNIT;
    [widths[i], heights[i]] = [x / UNIT, height(x)];
    outer = x;
  }
}

/** Fill a Float32Array with standard normal numbers: noise_generator(seed, image, draw).standard_normal. */
const fillNormal = (out, seed, image, draw) => {
  const next = generator(seed, [image, draw]);
  const uniform = () => (next() >>> 8) / 2 ** 24;
  const edge = Math.fround(EDGE), scale = Math.fround(1 / EDGE);
  const beyond = (negative) => {
    for (;;) {
      const x = Math.fround(-scale * Math.fround(Math.log1p(-uniform())));
      const y = -Math.fround(Math.log1p(-uniform()));
      if (y + y > Math.fround(x * x)) return negative ? -Math.fround(edge + x) : Math.fround(edge + x);
    }
  };
  const one = () => {
    for (;;) {
      const bits = next(), layer = bits & 255, place = bits >>> 9;
      const size = Math.fround(place * widths[layer]);
      const x = (bits >>> 8) & 1 ? -size : size;
      if (place < inside[layer]) return x;
      if (layer === 0) return beyond((place >>> 8) & 1);
      const rise = Math.fround(heights[layer - 1] - heights[layer]);
      if (Math.fround(Math.fround(rise * uniform()) + heights[layer]) < Math.exp(-0.5 * x * x)) return x;
    }
  };
  for (let i = 0; i < out.length; i++) out[i] = one();
};

/** Standard normal noise of images 0 .. count - 1, `size` numbers each, for one draw. */
export const normal = (seed, draw, count, size) => {
  const out = new Float32Array(count * size);
  for (let i = 0; i < count; i++) fillNormal(out.subarray(i * size, (i + 1) * size), seed, i, draw);
  return out;
};
