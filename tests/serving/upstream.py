"""An OpenAI-compatible server to be killed: `python upstream.py PORT SECONDS` answers n choices after a while."""

import json
import random
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(float(sys.argv[2]))
        asked = content["messages"][-1]["content"] if "messages" in content else content["prompt"]
        if "refuse me" in asked:
            return self.answer(400, {"error": {"message": "not this one"}})
        texts = [f"{random.randrange(1000)}" for _ in range(content["n"])]
        choices = [
            {"index": i, "finish_reason": "stop", "text": text, "message": {"role": "assistant", "content": text}}
            for i, text in enumerate(texts)
        ]
        return self.answer(200, {"choices": choices, "usage": {"completion_tokens": 3 * len(texts)}})

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    print("ready", server.server_address[1], flush=True)
    server.serve_forever()
