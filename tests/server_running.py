"""A server that really listens: uvicorn on a free port of this machine, in a thread."""

import contextlib
import threading
import time

import uvicorn


@contextlib.contextmanager
def running(app):
    """The server's address, "http://127.0.0.1:PORT", while it runs."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server has ended while it started"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
