"use strict";
// Session and cached page as Express teams have them: express-session with connect-redis, one GET per cached page.
const express = require("express");
const session = require("express-session");
const { RedisStore } = require("connect-redis");
const { createClient } = require("redis");

async function main() {
  const client = createClient({ url: process.env.BENCH_REDIS_URL });
  await client.connect();
  const app = express();
  app.disable("x-powered-by");
  app.disable("etag");

  // The cached page stands before the session, as a team would place it: it needs none.
  async function page(key) {
    let body = await client.get(key);
    if (body === null) {
      await new Promise((done) => setTimeout(done, 20));
      body = "<ul>" + Array.from({ length: 120 }, (_, i) => `<li>item ${i} of the catalogue</li>`).join("") + "</ul>";
      await client.set(key, body, { EX: 300 });
    }
    return body;
  }
  app.get("/cached", async (request, response) => response.send(await page("page:cached")));
  app.get("/memoized", async (request, response) => response.send(await page("memo:catalogue:1")));

  const subscribers = new Set();
  const listener = client.duplicate();
  await listener.connect();
  await listener.subscribe("bench", (text) => {
    const event = `data: ${text}\n\n`;
    for (const response of subscribers) response.write(event);
  });
  app.get("/events", (request, response) => {
    response.writeHead(200, { "Content-Type": "text/event-stream" });
    response.flushHeaders();
    subscribers.add(response);
    request.on("close", () => subscribers.delete(response));
  });
  app.post("/publish/:text", async (request, response) => {
    await client.publish("bench", request.params.text);
    response.send("ok");
  });

  // resave and saveUninitialized false is what the manual of express-session advises for a store with `touch`.
  const store = new RedisStore({ client });
  app.use(session({ store, secret: "benchmark", resave: false, saveUninitialized: false }));
  app.post("/login", (request, response) => {
    Object.assign(request.session, {
      user: "ada", count: 0, cart: { book: 2, pen: 5 }, theme: "dark", seen: Array.from({ length: 20 }, (_, i) => i),
    });
    response.send("ok");
  });
  app.get("/read", (request, response) => response.send(`${request.session.user} ${request.session.count}`));
  app.post("/write", (request, response) => {
    request.session.count = (request.session.count ?? 0) + 1;
    response.send(String(request.session.count));
  });

  const server = app.listen(Number(process.env.PORT), "127.0.0.1");
  server.keepAliveTimeout = 75000;
}

main();
