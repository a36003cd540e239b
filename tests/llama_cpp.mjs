// What llama.cpp (by the npm package node-llama-cpp) makes of a GGUF file: tests/test_llama_cpp.py asks, in one JSON object
// on standard input, and reads one JSON object from standard output.
//
// {model, tokenize: [text], markup: [text], greedy: [{tokens, count}]} -> {tokenized: [[token]], markup: ..., greedy: ...}
// markup: control tokens are meant by their names, as in what a chat template makes.
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const folder = process.argv[2];
const entry = createRequire(folder + "/").resolve("node-llama-cpp");
const {getLlama} = await import(pathToFileURL(entry));

let text = "";
for await (const piece of process.stdin) text += piece;
const request = JSON.parse(text);

const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: request.model});
const tokenized = (request.tokenize ?? []).map((each) => Array.from(model.tokenize(each)));
const markup = (request.markup ?? []).map((each) => Array.from(model.tokenize(each, true)));
const greedy = [];
for (const {tokens, count} of request.greedy ?? []) {
    const context = await model.createContext({
        contextSize: tokens.length + count + 8, batchSize: 512, threads: 1, flashAttention: false,
    });
    const found = [];
    for await (const token of context.getSequence().evaluate(tokens, {temperature: 0, yieldEogToken: true})) {
        found.push(token);
        if (found.length === count) break;
    }
    greedy.push(found);
    await context.dispose();
}
process.stdout.write(JSON.stringify({tokenized, markup, greedy}) + "\n", () => process.exit(0));
