// Vercel's AI SDK against a server whose address is the argument; prints what it found as JSON.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, Output, streamText, tool } from "ai";

const baseURL = `${process.argv[2]}/v1`;
const provider = createOpenAICompatible({ name: "dsv2", baseURL, includeUsage: true, supportsStructuredOutputs: true });
const model = provider("any");
const asked = { model, prompt: "What is a violin?", temperature: 0, maxOutputTokens: 8 };
const onError = ({ error }) => {
  throw error;
};
const object = (properties) =>
  jsonSchema({ type: "object", properties, required: Object.keys(properties), additionalProperties: false });

const whole = await generateText(asked);
const stream = streamText({ ...asked, onError });
let streamed = "";
for await (const piece of stream.textStream) streamed += piece;

const weather = tool({
  inputSchema: object({ city: { enum: ["Paris", "Rome"] } }),
  execute: async ({ city }) => `rain in ${city}`,
});
const called = streamText({ ...asked, tools: { weather }, toolChoice: "required", maxOutputTokens: 100, onError });
await called.consumeStream();

const output = Output.object({ schema: object({ colour: { enum: ["red", "blue"] } }) });
const structured = await generateText({ ...asked, output, maxOutputTokens: 100 });

console.log(
  JSON.stringify({
    text: whole.text,
    reason: whole.finishReason,
    streamed,
    streamedReason: await stream.finishReason,
    tokens: (await stream.usage).outputTokens,
    cities: (await called.toolCalls).map((call) => call.input.city),
    results: (await called.toolResults).map((result) => result.output),
    callReason: await called.finishReason,
    structured: structured.output,
  }),
);
