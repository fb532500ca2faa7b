"use strict";
// Node has no WSGI; its own http module is what stands in the place of the plain callable.
const http = require("node:http");

const hello = Buffer.from("Hello, World!");
const megabyte = Buffer.alloc(1 << 20, 7);
const chunk = Buffer.alloc(1024, "x");

function answer(response, body) {
  response.writeHead(200, { "Content-Type": "text/plain", "Content-Length": body.length });
  response.end(body);
}

const server = http.createServer((request, response) => {
  switch (request.url) {
    case "/download":
      return answer(response, megabyte);
    case "/upload": {
      let total = 0;
      request.on("data", (piece) => (total += piece.length));
      request.on("end", () => answer(response, Buffer.from(String(total))));
      return;
    }
    case "/stream":
      response.writeHead(200, { "Content-Type": "text/plain" });
      for (let i = 0; i < 100; i++) response.write(chunk);
      return response.end();
    default:
      return answer(response, hello);
  }
});
server.keepAliveTimeout = 75000;
server.listen(Number(process.env.PORT), "127.0.0.1");
