// Classify headlines with the ONNX INT8 artefact, in Node: the folder a lab wrote is all it needs.
//
//     npm install --ignore-scripts        # onnxruntime-node's own install step would fetch a CUDA build
//     node classify.js ../../quantised-model-optimum "Your headline" …
//
// Prints one JSON object a headline, in the form of `predict.py --json`. A folder built with `--recheck` has a second
// graph, which decides where INT8's two best logits lie closer together than the manifest's threshold.

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { Tokenizer } from "@huggingface/tokenizers";

process.env.ORT_DISABLE_TELEMETRY ??= "1"; // read when ONNX Runtime is loaded, so it is imported after this line
const { default: ort } = await import("onnxruntime-node");

const [folder = "", ...headlines] = process.argv.slice(2);
const readJson = (name) => JSON.parse(readFileSync(join(folder, name), "utf8"));

function readManifest() {
  const manifest = readJson("manifest.json");
  for (const [name, { sha256 }] of Object.entries(manifest.files)) {
    const digest = createHash("sha256").update(readFileSync(join(folder, name))).digest("hex");
    if (digest !== sha256) throw new Error(`${name} was edited: run python lab04-optimum.py`);
  }
  return manifest;
}

/** A function from a text to its token ids: cut on the manifest's side, then surrounded as tokenizer.json says. */
function openTokeniser(manifest) {
  const { max_length: longest, truncation_side: side } = manifest.tokenizer;
  const file = readJson("tokenizer.json");
  if (file.added_tokens.some((token) => token.single_word))
    throw new Error("tokenizer.json has tokens that are whole words only, which @huggingface/tokenizers does not know");
  const tokenizer = new Tokenizer(file, {}); // tokenizer_config.json changes nothing in Python either
  const encode = (text, add_special_tokens) => tokenizer.encode(text, { add_special_tokens }).ids;
  const [alone, whole] = [encode("a", false), encode("a", true)];
  const start = whole.findIndex((_, at) => alone.every((id, index) => whole[at + index] === id));
  const [before, after] = [whole.slice(0, start), whole.slice(start + alone.length)];
  const room = longest - before.length - after.length;
  return (text) => {
    if (!text.trim()) throw new Error("a headline is empty");
    const ids = encode(text, false);
    return [...before, ...(side === "left" ? ids.slice(-room) : ids.slice(0, room)), ...after];
  };
}

/** The inputs of one unpadded headline: every position counts, and there is one segment. */
function feeds(names, ids) {
  const values = { input_ids: ids, attention_mask: ids.map(() => 1), token_type_ids: ids.map(() => 0) };
  const tensor = (name) => new ort.Tensor("int64", BigInt64Array.from(values[name], BigInt), [1, ids.length]);
  return Object.fromEntries(names.map((name) => [name, tensor(name)]));
}

/** Open one of the folder's graphs; returns a function from the token ids of a headline to its logits. */
async function open(file) {
  const session = await ort.InferenceSession.create(join(folder, file), {
    intraOpNumThreads: 1,
    interOpNumThreads: 1,
    extra: { "mlas.disable_kleidiai": "1" }, // its kernels for ARM's SME change labels
  });
  return async (ids) => (await session.run(feeds(session.inputNames, ids)))[session.outputNames[0]].data;
}

function softmax(logits) {
  const highest = Math.max(...logits);
  const exponentials = Array.from(logits, (logit) => Math.exp(logit - highest));
  const sum = exponentials.reduce((a, b) => a + b);
  return exponentials.map((value) => value / sum);
}

async function main() {
  if (!headlines.length) throw new Error('say node classify.js FOLDER "Your headline"');
  const manifest = readManifest();
  const labels = Object.values(readJson("config.json").id2label); // integer keys: JavaScript keeps them in order
  const tokenise = openTokeniser(manifest);
  const run = await open(manifest.model_file);
  const recheck = manifest.recheck && { ...manifest.recheck, run: await open(manifest.recheck.graph) };
  for (const text of headlines) {
    const ids = tokenise(text);
    const started = performance.now();
    let logits = await run(ids);
    const [best, second] = Float32Array.from(logits).sort().reverse();
    const rechecked = recheck && best - second < recheck.threshold;
    if (rechecked) logits = await recheck.run(ids);
    const ms = performance.now() - started;
    const scores = softmax(logits);
    const id = scores.indexOf(Math.max(...scores));
    const probabilities = Object.fromEntries(labels.map((label, index) => [label, scores[index]]));
    console.log(JSON.stringify({ text, tokens: ids.length, label: labels[id], id, probabilities, ms, rechecked }));
  }
}

main().catch((error) => {
  console.error(`classify.js: ${error.message}`);
  process.exitCode = 2;
});
