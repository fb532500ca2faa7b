// tests/programs/lab.py on Node: the same lines on stdin, the same lines on stdout, the same paths over HTTP.
const cluster = require('cluster')
const fs = require('fs')
const http = require('http')
const readline = require('readline')

function say (fact) {
  fs.writeSync(1, JSON.stringify({ at: performance.now() / 1000, ...fact }) + '\n')
}

function run (code) {
  try {
    return (0, eval)(code) ?? null
  } catch (error) {
    return { raised: error.name, errno: error.errno ?? null, text: String(error) }
  }
}

Object.assign(globalThis, { cluster, say, fs })

if (cluster.isPrimary) {
  for (const event of ['fork', 'online', 'listening', 'disconnect', 'exit']) {
    cluster.on(event, (worker, ...rest) => say({
      level: 'cluster', event, id: worker.id, state: worker.state, asked: worker.exitedAfterDisconnect ?? null,
      arguments: rest.map((each) => [typeof each, each ?? null])
    }))
  }
  cluster.on('message', (worker, message) => {
    if (message?.lab !== undefined) say({ answer: message.lab, result: message.result })
    else say({ level: 'cluster', event: 'message', id: worker.id, message })
  })
  globalThis.fork = (count = 1) => Array.from({ length: count }, () => cluster.fork().id)
  globalThis.at = (id, number, code) => cluster.workers[id].send({ lab: number, code })
  readline.createInterface({ input: process.stdin }).on('line', (line) => {
    const [number, code] = JSON.parse(line)
    say({ answer: number, result: run(code) })
  })
  say({ started: process.pid })
} else {
  const heard = []
  const servers = []
  const block = (seconds) => Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, seconds * 1000)
  const serve = (port = 0) => new Promise((resolve, reject) => {
    const server = http.createServer((request, response) => {
      const [, what, value] = request.url.split('/')
      const answer = () => {
        const body = JSON.stringify({ id: cluster.worker.id, pid: process.pid })
        response.writeHead(200, { 'Content-Length': body.length })
        response.end(body)
      }
      if (what === 'slow') return setTimeout(answer, value * 1000)
      if (what === 'block') block(value)
      if (what === 'exit') process.exit(value)
      answer()
    })
    server.on('error', (error) => resolve({ raised: error.name, errno: error.errno, text: String(error) }))
    server.listen(port, '127.0.0.1', () => resolve(server.address().port))
    servers.push(server)
  })
  Object.assign(globalThis, { heard, servers, block, serve })
  process.on('message', async (message) => {
    if (message?.lab !== undefined) process.send({ lab: message.lab, result: await run(message.code) })
    else heard.push(message)
  })
}
