// Blocks and requests on their way: small squares that fly from one element to another.

import { svg } from "./dom.js";

const FLIGHT_MS = 900;
const GAP_MS = 70;
const MAX_SQUARES = 8;
const MAX_IN_FLIGHT = 150;

export class Flows {
  constructor(stage, layer) {
    this.stage = stage;
    this.layer = layer;
    this.links = svg("g");
    layer.append(this.links);
    this.calm = matchMedia("(prefers-reduced-motion: reduce)");
  }

  /** A line from the foot of one element to the head of each of others; `lost` ones are broken. */
  link(from, others, lost) {
    const origin = this.stage.getBoundingClientRect();
    const box = from.getBoundingClientRect();
    const start = { x: box.left + box.width / 2 - origin.left, y: box.bottom - origin.top };
    const paths = others.map((other, i) => {
      const to = other.getBoundingClientRect();
      const end = { x: to.left + to.width / 2 - origin.left, y: to.top - origin.top };
      const middle = (start.y + end.y) / 2;
      const d = `M${start.x},${start.y} C${start.x},${middle} ${end.x},${middle} ${end.x},${end.y}`;
      // Rows below the first would be reached through the cards above them.
      const isFirst = to.top < others[0].getBoundingClientRect().bottom;
      return isFirst ? svg("path", { class: lost[i] ? "link lost" : "link", d }) : null;
    });
    this.links.replaceChildren(...paths.filter(Boolean));
  }

  /** `blocks` of them from element to element, as a few squares of class `kind`. */
  move(from, to, blocks, kind) {
    if (!from || !to || this.calm.matches || document.hidden) return;
    const origin = this.stage.getBoundingClientRect();
    const [start, end] = [center(from, origin), center(to, origin)];
    const squares = Math.min(MAX_SQUARES, Math.ceil(Math.log2(blocks + 1)));
    for (let i = 0; i < squares; i++) {
      if (this.layer.childElementCount > MAX_IN_FLIGHT) return;
      this.fly(start, end, kind, i * GAP_MS);
    }
  }

  fly(start, end, kind, delay) {
    const size = kind === "request" ? 8 : 6;
    const square = svg("rect", {
      class: kind,
      x: -size / 2,
      y: -size / 2,
      width: size,
      height: size,
      rx: kind === "request" ? size / 2 : 1.5,
    });
    square.style.opacity = 0;
    this.layer.append(square);
    // A bow, so that ways there and back are told apart.
    const [dx, dy] = [end.x - start.x, end.y - start.y];
    const bow = 0.12;
    const middle = { x: start.x + dx / 2 - dy * bow, y: start.y + dy / 2 + dx * bow };
    const at = ({ x, y }) => `translate(${x}px, ${y}px)`;
    const flight = square.animate(
      [
        { transform: at(start), opacity: 0 },
        { transform: at(start), opacity: 1, offset: 0.05 },
        { transform: at(middle), opacity: 1, offset: 0.5 },
        { transform: at(end), opacity: 1, offset: 0.95 },
        { transform: at(end), opacity: 0 },
      ],
      { duration: FLIGHT_MS, delay, easing: "ease-in-out", fill: "backwards" },
    );
    flight.onfinish = () => square.remove();
    flight.oncancel = () => square.remove();
  }
}

function center(element, origin) {
  const box = element.getBoundingClientRect();
  return { x: box.left + box.width / 2 - origin.left, y: box.top + box.height / 2 - origin.top };
}
