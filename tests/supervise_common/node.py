"""A vLLM-shaped server. Arguments: port, marker, mode, directory."""

import http.server
import json
import mmap
import os
import signal
import subprocess
import sys
import time

PORT, MARKER, MODE, DIR = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)", MARKER]

print("hello from", os.environ["PEGAFLOW_NODE"], os.environ["PEGAFLOW_INCARNATION"], flush=True)
if MODE == "usage":
    print("node.py: error: unrecognized arguments: --frob", file=sys.stderr)
    sys.exit(2)
if MODE == "crash":
    print("ValueError: bad luck", file=sys.stderr)
    sys.exit(1)
if MODE == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if MODE == "shm":
    fd = os.open(f"/dev/shm/pegaflow-{MARKER}-{os.environ['PEGAFLOW_INCARNATION']}", os.O_CREAT | os.O_RDWR)
    os.ftruncate(fd, 4096)
    kept = mmap.mmap(fd, 4096)
# Two that hold the log's pipe, one of them out of reach of the process group.
subprocess.Popen(SLEEP)
subprocess.Popen(SLEEP, start_new_session=True)


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, status, body):
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self):
        if os.path.exists(DIR + "/deaf"):
            time.sleep(3)
        self.answer(503 if os.path.exists(DIR + "/dead") else 200, {})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, {})


http.server.ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
