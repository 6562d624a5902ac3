"""``chatbridge serve``: ChatBridge over HTTP, in the words of OpenAI's chat completions.

``requests`` reads what a client asks, ``attachments`` fetches its media, ``engine`` answers many at once, ``app``
speaks HTTP, ``command`` starts it all. Nothing is imported here: fastapi and uvicorn are the extra ``serve``.
"""
