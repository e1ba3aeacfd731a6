"""A preference server in a thread of a test."""

import socket
import threading
import time

import uvicorn

from trl_fdfo.preference.server import create_app
from trl_fdfo.preference.store import Store


class Running:
    """A server in a thread, on a port of loopback that stays the same when it is stopped and started again."""

    def __init__(self, database, token=None):
        self.database, self.token, self.port = database, token, 0
        self.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(("127.0.0.1", self.port))
        self.port = self.socket.getsockname()[1]
        self.store = Store(self.database)
        config = uvicorn.Config(create_app(self.store, self.token), log_level="warning", timeout_graceful_shutdown=0)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def stop(self):
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(20)
        self.socket.close()
        self.store.close()
