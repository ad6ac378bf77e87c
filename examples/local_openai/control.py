"""The endpoint's control port: a few JSON calls over plain HTTP, and their client.

    GET  /stats                 the counts
    POST /asked                 {"text": ...}: how often this text was asked for
    POST /delays                the fields of `Delays`
    POST /connections           {"idle_close": seconds or null, "handshake_delay": seconds}
    POST /fail                  the fields of `FaultRule`
    POST /heal                  drop all fault rules and release what hangs
    POST /release               release what hangs
    POST /reset                 counts back to zero
    POST /wait                  {"count": name, "at_least": n, "at_most": n, "timeout": seconds}

It is apart from the endpoint's own port, so that looking changes no count.
"""

import asyncio
import dataclasses
import http.client
import json
from collections.abc import Mapping
from typing import Any

from examples.local_openai.delays import Delays
from examples.local_openai.faults import Fault, FaultRule
from examples.local_openai.server import EmbeddingsServer
from examples.local_openai.wire import Request, Response, json_response


class Control:
    """Carries out control calls on a server.

    Args:
        server: The server to control, on whose event loop the calls arrive.
    """

    def __init__(self, server: EmbeddingsServer) -> None:
        self._server = server

    async def answer(self, request: Request) -> Response:
        """Answer one request on the control port."""
        try:
            arguments = json.loads(request.body or b"{}")
            result = await self._call(request.path.strip("/"), arguments)
        except TimeoutError:
            return json_response(408, {"error": f"still {dataclasses.asdict(self._server.stats)}"})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            return json_response(400, {"error": f"{type(error).__name__}: {error}"})
        return json_response(200, result)

    async def _call(self, name: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        server = self._server
        match name:
            case "stats":
                pass
            case "asked":
                return {"times": server.asked[arguments["text"]]}
            case "delays":
                extra = tuple(arguments.get("straggler_extra", Delays().straggler_extra))
                server.delays = Delays(**{**arguments, "straggler_extra": extra})
            case "connections":
                server.idle_close = arguments.get("idle_close")
                server.handshake_delay = float(arguments.get("handshake_delay", 0.0))
            case "fail":
                fault = Fault(arguments["fault"])
                server.plan.rules.append(FaultRule(**{**arguments, "fault": fault}))
            case "heal":
                server.plan.rules.clear()
                server.release()
            case "release":
                server.release()
            case "reset":
                server.reset_counts()
            case "wait":
                async with asyncio.timeout(arguments["timeout"]):
                    await server.wait_until(
                        arguments["count"], arguments.get("at_least"), arguments.get("at_most")
                    )
            case _:
                raise ValueError(f"no control call {name!r}")
        return dataclasses.asdict(server.stats)


def call(port: int, name: str, arguments: Mapping[str, Any], *, timeout: float) -> dict[str, Any]:
    """Make one control call and return what it answers.

    Args:
        port: The control port.
        name: The call, without its slash.
        arguments: Its JSON arguments.
        timeout: Seconds to wait for the answer.

    Raises:
        TimeoutError: A ``wait`` took longer than it was given.
        ValueError: The endpoint did not understand the call.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("POST", f"/{name}", json.dumps(arguments), {"Connection": "close"})
        response = connection.getresponse()
        result: dict[str, Any] = json.loads(response.read())
    finally:
        connection.close()
    if response.status == 408:
        raise TimeoutError(result["error"])
    if response.status != 200:
        raise ValueError(result["error"])
    return result
