"""``chatbridge serve``: ChatBridge over HTTP with OpenAI's chat completions and completions.

`requests` reads what a client asks, `app` answers over HTTP, `command` starts both. Nothing is imported here: fastapi
and uvicorn belong to the extra ``serve``.
"""
