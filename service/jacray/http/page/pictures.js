// Heat maps and spectra, drawn from numbers alone.

const LOW = [[33, 102, 172], [146, 197, 222]], HIGH = [[178, 24, 43], [244, 165, 130]], HOLE = [138, 143, 150];

/** Blue below zero, white at zero, red above; grey where there is no number. */
function colour(value, limit) {
  if (!Number.isFinite(value)) return HOLE;
  const share = limit ? Math.min(1, Math.abs(value) / limit) : 0;
  const [full, half] = value < 0 ? LOW : HIGH, white = [247, 247, 247];
  const [from, to, at] = share < .5 ? [white, half, 2 * share] : [half, full, 2 * share - 1];
  return from.map((x, i) => Math.round(x + (to[i] - x) * at));
}

/** A scale that single extremes do not wash out: nine hundred and ninety of a thousand numbers lie within. */
export function limitOf(data) {
  const sizes = Float64Array.from(data, Math.abs).filter(Number.isFinite).sort();
  return sizes.length ? sizes[Math.floor(.99 * (sizes.length - 1))] || sizes[sizes.length - 1] : 0;
}

export function heatMap(values, rows, columns, limit) {
  const canvas = document.createElement("canvas");
  canvas.width = columns; canvas.height = rows;
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
  for (let i = 0; i < rows * columns; i++) image.data.set([...colour(values[i], limit), 255], 4 * i);
  context.putImageData(image, 0, 0);
  canvas.setAttribute("role", "img");
  return canvas;
}

export const short = (x) => (!Number.isFinite(x) ? String(x)
  : x !== 0 && (Math.abs(x) >= 1e5 || Math.abs(x) < 1e-3) ? x.toExponential(2) : String(Number(x.toPrecision(3)))).replaceAll("-", "\u2212");

export function scale(limit) {
  const row = document.createElement("p"), steps = 101;
  row.className = "scale";
  const ramp = Array.from({ length: steps }, (_, i) => limit * (2 * i / (steps - 1) - 1));
  row.append(`≤\u00a0${short(-limit)}`, heatMap(ramp, 1, steps, limit), `≥\u00a0${short(limit)}`);
  row.querySelector("canvas").setAttribute("aria-label", "blue is negative, white zero, red positive");
  return row;
}

const SVG = "http://www.w3.org/2000/svg";
function add(parent, name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

/** Singular values over their index, on a logarithmic axis. */
export function spectrum(values) {
  const top = values[0], floor = top * 1e-8, seen = values.map((v) => Math.max(v, floor));
  const svg = document.createElementNS(SVG, "svg"), W = 420, H = 230, L = 62, R = 12, T = 12, B = 40;
  svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `singular values from ${short(top)} to ${short(values[values.length - 1])}`);
  const high = Math.log10(top) + .05, low = Math.min(Math.log10(seen[seen.length - 1]), high - .5) - .05;
  const x = (i) => L + (W - L - R) * (values.length > 1 ? i / (values.length - 1) : .5);
  const y = (v) => T + (H - T - B) * (high - Math.log10(v)) / (high - low);
  const step = Math.max(1, Math.ceil((high - low) / 5)), first = Math.floor(low);
  const between = high - low < .8 ? [1, 1.5, 2, 3, 4, 6] : high - low < 1.6 ? [1, 2, 5] : [1];
  const ticks = Array.from({ length: 40 }, (_, i) => between.map((d) => d * 10 ** (first + i * step))).flat()
    .filter((v) => Math.log10(v) <= high && Math.log10(v) >= low);
  for (const tick of ticks) {
    add(svg, "line", { class: "axis", x1: L, x2: W - R, y1: y(tick), y2: y(tick) });
    add(svg, "text", { x: L - 6, y: y(tick) + 4, "text-anchor": "end" }, short(tick));
  }
  const count = values.length, marks = [...new Set([0, Math.floor((count - 1) / 2), count - 1])];
  for (const i of marks) add(svg, "text", { x: x(i), y: H - B + 17, "text-anchor": "middle" }, i + 1);
  add(svg, "text", { x: (L + W - R) / 2, y: H - 5, "text-anchor": "middle" }, "index of the singular value");
  add(svg, "polyline", { class: "mark", points: seen.map((v, i) => `${x(i)},${y(v)}`).join(" ") });
  if (count <= 64) seen.forEach((v, i) => add(svg, "circle", { class: "dot", cx: x(i), cy: y(v), r: 3 }));
  return svg;
}
