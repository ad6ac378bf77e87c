"""The HTTP library that the installed OpenAI client is made of: HTTPX2, or before it HTTPX."""

from __future__ import annotations

import importlib
from typing import Any

import openai

http: Any = importlib.import_module(type(openai.DEFAULT_CONNECTION_LIMITS).__module__)
"""The library's module."""

core = http.__name__.replace("httpx", "httpcore")
"""The name of the library under it."""
