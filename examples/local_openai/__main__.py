"""Run the stand-in by itself: ``python -m examples.local_openai``.

It prints the environment variables that lead an OpenAI client to it, and serves until it is
interrupted. With a command after ``--`` it runs that command with these variables instead:

    python -m examples.local_openai --p5 0.39 --p95 1.16 -- python -m examples.quickstart
"""

import argparse
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from examples.local_openai.delays import Delays
from examples.local_openai.endpoint import LocalOpenAI, serve


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.local_openai",
        description="A local stand-in for OpenAI's embeddings endpoint.",
    )
    parser.add_argument("--p5", type=float, default=0.0, help="5th percentile of delays, seconds")
    parser.add_argument("--p95", type=float, default=0.0, help="95th percentile of delays, seconds")
    parser.add_argument("--seed", type=int, default=0, help="seed of the delays")
    parser.add_argument("--secure", action="store_true", help="serve HTTPS")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--certificate", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("command", nargs="*", help="run this, led to the endpoint")
    options = parser.parse_args(arguments)
    if options.child:
        asyncio.run(_serve_for_parent(options.certificate))
        return 0
    delays = Delays(p5=options.p5, p95=options.p95, seed=options.seed)
    with LocalOpenAI(delays=delays, secure=options.secure) as server:
        environment = server.environment()
        if options.command:
            run = subprocess.run(options.command, env={**os.environ, **environment}, check=False)  # noqa: S603
            return run.returncode
        for name, value in environment.items():
            print(f"{name}={value}")
        print(f"# a stand-in, not a model; control: {server.control_url}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    return 0


async def _serve_for_parent(certificate: Path | None) -> None:
    """Serve until the parent process closes this one's standard input, or is gone."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            pass
        loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to act on
    await serve(certificate, lambda *ports: print(*ports, flush=True), stop)


if __name__ == "__main__":
    sys.exit(main())
