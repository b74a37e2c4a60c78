"""An OpenAI-compatible server on 127.0.0.1 that does what it is told."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text, top=None):
    """A chat completion; `top` are log-probabilities of its first token and of others by their names."""
    logprobs = top and {
        "content": [
            {"token": text, "logprob": top[text], "top_logprobs": [{"token": t, "logprob": p} for t, p in top.items()]}
        ]
    }
    choice = {"message": {"role": "assistant", "content": text}, "logprobs": logprobs}
    return 200, {"choices": [choice], "usage": {"prompt_tokens": 30, "completion_tokens": 1}}


class Stub:
    """A server whose answers are those of reply(body, number); it keeps what it was asked."""

    def __init__(self, reply):
        self.reply, self.asked, self.keys, self.lock = reply, [], [], threading.Lock()
        self.now, self.most = 0, 0
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub.lock:
                    stub.asked.append(body)
                    stub.keys.append(self.headers["Authorization"])
                    number = len(stub.asked) - 1
                    stub.now += 1
                    stub.most = max(stub.most, stub.now)
                status, content, *headers = stub.reply(body, number)
                data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
                with stub.lock:
                    stub.now -= 1
                try:
                    self.send_response(status)
                    for name, value in headers:
                        self.send_header(name, value)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # the client has gone
                    pass

            def log_message(self, *_): ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def start(self):
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def stop(self):
        self.http.shutdown()
        self.http.server_close()
