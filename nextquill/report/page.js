// The page can be read and printed without this. It puts into words what one points at: a token's probabilities, the
// items of the history it depends on, the values of the curves. All listeners are the document's, whatever the page holds.
'use strict';
document.documentElement.classList.add('js');

const readout = document.createElement('div');
readout.id = 'readout';
readout.hidden = true;
readout.setAttribute('role', 'status');
document.body.append(readout);

function show(text, box) {
  readout.textContent = text;
  readout.hidden = false;
  const left = Math.min(box.left, document.documentElement.clientWidth - readout.offsetWidth - 8);
  const below = box.bottom + 8 + readout.offsetHeight < innerHeight;
  readout.style.left = `${Math.max(8, left)}px`;
  readout.style.top = `${Math.max(8, below ? box.bottom + 8 : box.top - readout.offsetHeight - 8)}px`;
}

// ---- tokens: hover, tap, or Tab to a response and the arrow keys inside it

const tokenOf = target => target instanceof Element ? target.closest('.tokens > span') : null;
const itemsOf = token => token.closest('.variant').querySelector('.items');
const placeOf = token => [...token.parentElement.children].indexOf(token);
const percent = text => text === '–' ? 'not measured' : `${text}%`;

function describe(token) {
  const [own, none, other] = token.dataset.p.split(' ');
  const lines = [`“${token.textContent}”`, `with the history: ${percent(own)}`, `without it: ${percent(none)}`];
  if (other !== undefined) lines.push(`with another user's: ${percent(other)}`);
  const against = token.parentElement.dataset.against ? other : none;
  const effect = Number((own - against).toFixed(1));  // NaN where one was not measured
  if (Number.isFinite(effect)) lines.push(`effect: ${effect < 0 ? '−' : '+'}${Math.abs(effect).toFixed(1)} points`);
  const items = itemsOf(token);
  if (items) {
    const values = [...items.querySelectorAll('li')].map(row => effectsOf(row)[placeOf(token)]);
    const most = values.indexOf(Math.max(...values));
    if (dependsOn(values[most], values[most])) lines.push(`most on item ${most + 1}: +${values[most].toFixed(2)} nats`);
  }
  return lines.join('\n');
}

function point(token) {
  show(describe(token), token.getClientRects()[0] || token.getBoundingClientRect());
  if (itemsOf(token)) showToken(itemsOf(token), placeOf(token));
}

function leave(token) {
  readout.hidden = true;
  if (itemsOf(token)) showToken(itemsOf(token), -1);
}

document.addEventListener('pointerover', event => {
  const token = tokenOf(event.target);
  if (token) point(token);
});
document.addEventListener('pointerout', event => {
  const token = tokenOf(event.target);
  if (!token) return;
  leave(token);
  const focused = tokenOf(document.activeElement);
  if (focused && event.pointerType === 'mouse') point(focused);
});
document.addEventListener('click', event => {
  const token = tokenOf(event.target);
  if (token) focusToken(token);
});
document.addEventListener('focusin', event => {
  const token = tokenOf(event.target);
  if (!token) return;
  token.setAttribute('role', 'img');
  token.setAttribute('aria-label', describe(token).replaceAll('\n', ', '));
  point(token);
});
document.addEventListener('focusout', event => {
  const token = tokenOf(event.target);
  if (!token) return;
  token.removeAttribute('role');
  token.removeAttribute('aria-label');
  leave(token);
});

function focusToken(token) {
  for (const other of token.parentElement.querySelectorAll('[tabindex]')) other.removeAttribute('tabindex');
  token.tabIndex = 0;
  token.focus();
}

document.addEventListener('keydown', event => {
  if (event.key === 'Escape') readout.hidden = true;
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const token = tokenOf(event.target);
  if (token) {
    const next = {
      ArrowRight: token.nextElementSibling, ArrowLeft: token.previousElementSibling,
      Home: token.parentElement.firstElementChild, End: token.parentElement.lastElementChild,
    }[event.key];
    if (event.key.startsWith('Arrow') || next) event.preventDefault();
    if (next) focusToken(next);
  } else if (event.target.matches?.('.plot')) {
    const by = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    step(event.target, by);
  }
});

// ---- items: a token's own figures as bars, and an item's figures as the tokens' colours

const effectsOf = row => row.effects ??= row.dataset.e.split(' ').map(Number);
const colour = (effect, full) => {
  const size = Math.floor(Math.min(1, Math.abs(effect) / full) * 10 + 0.5);
  return size ? (effect > 0 ? 'p' : 'n') + size : '';
};

// A token depends on the items that come within half of the one it depends on most, if that is worth a tenth of a nat.
const dependsOn = (effect, largest) => effect >= 0.1 && effect >= largest / 2;

// Position -1 stands for the whole response.
function showToken(items, position) {
  const rows = [...items.querySelectorAll('li')];
  for (const row of rows) row.total ??= Number(row.querySelector('.nats').textContent);
  const values = rows.map(row => position < 0 ? row.total : effectsOf(row)[position]);
  const largest = Math.max(...values);
  const full = Number(position < 0 ? items.dataset.longest : items.dataset.full);
  rows.forEach((row, index) => {
    const value = values[index];
    const width = 50 * Math.min(1, Math.abs(value) / full);
    const bar = row.querySelector('rect');
    bar.setAttribute('class', value < 0 ? 'n10' : 'p10');
    bar.setAttribute('x', value < 0 ? 50 - width : 50);
    bar.setAttribute('width', width);
    row.querySelector('.nats').textContent = (value <= -0.005 ? '-' : '+') + Math.abs(value).toFixed(2);
    row.classList.toggle('depends', position >= 0 && dependsOn(value, largest));
  });
}

function press(button, isPressed) {
  const items = button.closest('.items');
  for (const other of items.querySelectorAll('button')) other.setAttribute('aria-pressed', 'false');
  button.setAttribute('aria-pressed', String(isPressed));
  const full = Number(items.dataset.full);
  const effects = effectsOf(button.closest('li'));
  items.closest('.variant').querySelectorAll('.tokens > span').forEach((token, index) => {
    token.plain ??= token.className;
    token.className = isPressed ? colour(effects[index], full) : token.plain;
  });
  const number = [...items.querySelectorAll('button')].indexOf(button) + 1;  // titles may be the same
  items.querySelector('.coloured').textContent = isPressed
    ? `The tokens above are coloured by what they lose without item ${number}, “${button.textContent}”, fully at ${full} nats.` : '';
}

document.addEventListener('click', event => {
  const button = event.target instanceof Element ? event.target.closest('.items button') : null;
  if (button) press(button, button.getAttribute('aria-pressed') !== 'true');
});
// Paper has the page's own colours, which its legend explains.
addEventListener('beforeprint', () => {
  for (const button of document.querySelectorAll('.items button[aria-pressed="true"]')) press(button, false);
  for (const folded of document.querySelectorAll('details')) folded.open = true;
  for (const guide of document.querySelectorAll('.guide')) guide.setAttribute('d', '');
});

// ---- curves: the values at the step nearest to the pointer, or under the arrow keys

function curvesOf(plot) {
  return plot.curves ??= [...plot.querySelectorAll('.curve')].map(line => ({
    label: line.dataset.label,
    at: line.getAttribute('points').split(' ').map(pair => Number(pair.split(',')[0])),
    x: line.dataset.x.split(' ').map(Number),
    y: line.dataset.y.split(' '),
  }));
}

function nearest(values, wanted) {
  let best = 0;
  values.forEach((value, index) => { if (Math.abs(value - wanted) < Math.abs(values[best] - wanted)) best = index; });
  return best;
}

function read(plot, at) {
  const lines = [`${plot.dataset.xLabel} ${plot.here = at.x}`];
  for (const curve of curvesOf(plot)) {
    const index = nearest(curve.x, at.x);
    lines.push(`${curve.label}: ${curve.y[index]}` + (curve.x[index] === at.x ? '' : ` (at ${curve.x[index]})`));
  }
  plot.querySelector('.guide').setAttribute('d', `M${at.place} 8V180`);
  const box = plot.getBoundingClientRect();
  const left = box.left + at.place / 400 * box.width + 12;
  show(lines.join('\n'), { left, top: box.top, bottom: box.top });
}

function stops(plot) {
  return plot.stops ??= [...new Map(curvesOf(plot).flatMap(
    curve => curve.x.map((x, index) => [x, { x, place: curve.at[index] }]),
  )).values()].sort((a, b) => a.x - b.x);
}

function step(plot, by) {
  const all = stops(plot);
  const from = plot.here === undefined ? -1 : all.findIndex(stop => stop.x === plot.here);
  read(plot, all[Math.min(all.length - 1, Math.max(0, from + by))]);
}

document.addEventListener('pointermove', event => {
  const plot = event.target instanceof Element ? event.target.closest('.plot') : null;
  if (!plot) return;
  const box = plot.getBoundingClientRect();
  const all = stops(plot);
  read(plot, all[nearest(all.map(stop => stop.place), (event.clientX - box.left) / box.width * 400)]);
});
function clear(event) {
  const plot = event.target instanceof Element ? event.target.closest('.plot') : null;
  if (!plot || plot.contains(event.relatedTarget)) return;
  plot.querySelector('.guide').setAttribute('d', '');
  readout.hidden = true;
}
document.addEventListener('pointerout', clear);
document.addEventListener('focusout', clear);
