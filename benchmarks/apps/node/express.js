"use strict";
// Express without state. ETag and X-Powered-By are off: Flask sends neither, and both cost Express time.
const express = require("express");

const app = express();
app.disable("x-powered-by");
app.disable("etag");
app.get("/", (request, response) => response.send("Hello, World!"));
app.get("/json", (request, response) =>
  response.json({ id: 7, name: "sharedcluster", tags: ["flask", "gevent", "redis"], price: 12.5, stock: null }),
);
app.get("/wait/:ms", (request, response) => setTimeout(() => response.send("waited"), Number(request.params.ms)));
app.get("/spin/:ms", (request, response) => {
  const end = performance.now() + Number(request.params.ms);
  while (performance.now() < end);
  response.send("computed");
});

const server = app.listen(Number(process.env.PORT), "127.0.0.1");
server.keepAliveTimeout = 75000;
