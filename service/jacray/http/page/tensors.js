// Results as they travel: safetensors, that is a length, a JSON header, then raw little-endian numbers.

const READERS = {
  F64: (buffer, at, count) => new Float64Array(buffer.slice(at, at + 8 * count)),
  F32: (buffer, at, count) => new Float32Array(buffer.slice(at, at + 4 * count)),
  I64: (buffer, at, count) => Float64Array.from(new BigInt64Array(buffer.slice(at, at + 8 * count)), Number),
  I32: (buffer, at, count) => new Int32Array(buffer.slice(at, at + 4 * count)),
  U8: (buffer, at, count) => new Uint8Array(buffer.slice(at, at + count)),
  BOOL: (buffer, at, count) => new Uint8Array(buffer.slice(at, at + count)),
  F16: (buffer, at, count) => Float32Array.from(new Uint16Array(buffer.slice(at, at + 2 * count)), half),
  BF16: (buffer, at, count) => {
    const wide = new Uint32Array(count);
    new Uint16Array(buffer.slice(at, at + 2 * count)).forEach((bits, i) => { wide[i] = bits << 16; });
    return new Float32Array(wide.buffer);
  },
};

function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}

/** The tensors of a message: name -> {shape, data}. */
export function read(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const found = {};
  for (const [name, entry] of Object.entries(header)) {
    const reader = READERS[entry.dtype];
    if (name === "__metadata__" || !reader) continue;
    const count = entry.shape.reduce((a, b) => a * b, 1);
    found[name] = { shape: entry.shape, data: reader(buffer, 8 + length + entry.data_offsets[0], count) };
  }
  return found;
}

/** Singular values of a matrix of rows, largest first, by one-sided Jacobi rotations (Hestenes 1958). */
export function singularValues(rows) {
  const a = rows.map((row) => Float64Array.from(row)), n = a.length;
  for (let sweep = 0; sweep < 30; sweep++) {
    let turned = false;
    for (let p = 0; p < n; p++) {
      for (let q = p + 1; q < n; q++) {
        let pp = 0, qq = 0, pq = 0;
        for (let i = 0; i < a[p].length; i++) { pp += a[p][i] ** 2; qq += a[q][i] ** 2; pq += a[p][i] * a[q][i]; }
        if (pq === 0 || Math.abs(pq) <= 1e-12 * Math.sqrt(pp * qq)) continue;
        turned = true;
        const zeta = (qq - pp) / (2 * pq), t = Math.sign(zeta || 1) / (Math.abs(zeta) + Math.hypot(1, zeta));
        const c = 1 / Math.hypot(1, t), s = c * t;
        for (let i = 0; i < a[p].length; i++) {
          const x = a[p][i], y = a[q][i];
          a[p][i] = c * x - s * y; a[q][i] = s * x + c * y;
        }
      }
    }
    if (!turned) break;
  }
  return a.map((row) => Math.sqrt(row.reduce((sum, x) => sum + x * x, 0))).sort((x, y) => y - x);
}
