"""An HTTP server on the loopback interface that is slow, or answers some requests badly."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FaultyServer(ThreadingHTTPServer):
    """
    Runs in threads while its context is entered. A subclass says `answer(body) -> text` to a POST.

    Args:
        fault (`Callable`): `fault(n)` says what goes wrong with the n-th POST, if anything: an HTTP status, alone or with a text
            and headers; `"close"` (the connection); `"half"` (an answer that ends in the middle); `"hang"`; or the text of an
            answer.
        delay (`float`): Seconds until a request is answered.

    Attributes:
        url (`str`): Address of the server.
        bodies (`list[bytes]`), headers (`list[Message]`): Of the POSTs so far.
        peak (`int`): The most POSTs at once.
        path (`str`, *optional*): The only path that exists for POSTs. None: all do.
        listing (`str`): The answer to a GET.
    """

    daemon_threads = True
    request_queue_size = 64
    path: str | None = None
    listing = ""

    def __init__(self, fault=lambda n: None, delay: float = 0.0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.fault, self.delay = fault, delay
        self.bodies, self.headers = [], []
        self.in_flight = self.peak = 0
        self.lock, self.stopped = threading.Lock(), threading.Event()

    def answer(self, body: bytes) -> str:
        raise NotImplementedError

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.stopped.set()
        self.shutdown()
        self.thread.join()
        super().__exit__(*error)


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(200, self.server.listing)

    def do_POST(self):
        server = self.server
        body = self.rfile.read(int(self.headers["content-length"]))
        with server.lock:
            number = len(server.bodies)
            server.bodies.append(body)
            server.headers.append(self.headers)
            server.in_flight += 1
            server.peak = max(server.peak, server.in_flight)
        time.sleep(server.delay)
        with server.lock:
            server.in_flight -= 1
        fault = server.fault(number) if server.path in (None, self.path) else 404
        if fault == "hang":
            server.stopped.wait()
        elif fault == "close":
            self.close_connection = True
        elif fault == "half":
            answer = server.answer(body).encode()
            self.send_response(200)
            self.send_header("content-length", str(2 * len(answer)))
            self.end_headers()
            self.wfile.write(answer)
            self.close_connection = True
        elif isinstance(fault, int):
            self.reply(fault, f"status {fault}, said to {self.headers['authorization']}")
        elif isinstance(fault, tuple):
            self.reply(*fault)
        else:
            self.reply(200, fault or server.answer(body))

    def reply(self, status: int, text: str, headers: dict | None = None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass
