// A streamed chat completion with OpenAI's own client for Node: npm install openai, then node openai_client.mjs.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.env.BASE ?? "http://127.0.0.1:8000"}/v1`, apiKey: process.env.API_KEY ?? "none" });
const stream = await client.chat.completions.create({
    model: process.env.MODEL ?? "tiny",
    messages: [{ role: "user", content: "The quick brown fox" }],
    max_tokens: 16,
    stream: true,
});
for await (const chunk of stream) process.stdout.write(chunk.choices[0]?.delta?.content ?? "");
process.stdout.write("\n");
