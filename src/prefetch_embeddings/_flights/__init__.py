"""The core: flights, who runs them, and who waits for them. No LangChain, no Redis."""
