// The Vercel AI SDK with real tools, through both of its providers, whole and streamed: one line of JSON a run.
// In: GATEWAY, MODEL, and the working directory for the files in FOLDER.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";
import { readFile, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";

const { FOLDER, GATEWAY, MODEL } = process.env;
const models = {
  chat: createOpenAICompatible({ name: "helexa", baseURL: `${GATEWAY}/v1`, apiKey: "none", includeUsage: true })(MODEL),
  messages: createAnthropic({ baseURL: `${GATEWAY}/v1`, apiKey: "none" })(MODEL),
};
const text = { type: "string" };
const schema = (properties) =>
  jsonSchema({ type: "object", properties, required: Object.keys(properties), additionalProperties: false });
const tools = {
  read: tool({
    description: "Reads a file.",
    inputSchema: schema({ path: text }),
    execute: ({ path }) => readFile(join(FOLDER, path), "utf8"),
  }),
  write: tool({
    description: "Writes a file.",
    inputSchema: schema({ path: text, content: text }),
    execute: async ({ path, content }) => {
      await writeFile(join(FOLDER, path), content);
      return "written";
    },
  }),
};
const parts = (steps, kind) => steps.flatMap((step) => step.content).filter((part) => part.type === kind);

for (const [dialect, model] of Object.entries(models)) {
  for (const streamed of [false, true]) {
    await rm(join(FOLDER, "greeting.txt"), { force: true });
    const ask = {
      model,
      tools,
      prompt: "Write a greeting.",
      stopWhen: stepCountIs(8),
      maxRetries: 0,
      maxOutputTokens: 4096,
      providerOptions: { anthropic: { thinking: { type: "enabled", budgetTokens: 1024 } } },
    };
    const result = streamed ? streamText(ask) : await generateText(ask);
    if (streamed) for await (const part of result.fullStream) if (part.type === "error") throw part.error;
    const steps = await result.steps;
    console.log(
      JSON.stringify({
        dialect,
        streamed,
        text: await result.text,
        finish: await result.finishReason,
        reasoning: parts(steps, "reasoning").map((part) => part.text.trim()),
        calls: parts(steps, "tool-call").map((part) => part.toolName),
        errors: parts(steps, "tool-error").length,
        file: await readFile(join(FOLDER, "greeting.txt"), "utf8"),
        usage: steps.at(-1).usage,
      }),
    );
  }
}
